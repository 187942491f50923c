"""Links inside one process, for one-process set-ups and tests: the same bounds and faults as a socket, no bytes."""

import asyncio
from collections import deque

from tidegate.domain.errors import LinkFault
from tidegate.domain.ports import Connect

MESSAGES_MAX = 65_536
ACCEPTED_MAX = 128


class LocalLink:
    """One end of a pair; implements `ports.Link`."""

    peer = ""

    def __init__(self) -> None:
        self._peer: LocalLink | None = None
        self._inbox: deque[object] = deque()
        self._arrived = asyncio.Event()
        self._closed = False

    async def send(self, message: object) -> None:
        peer = self._peer
        if self._closed or peer is None or peer._closed:
            raise LinkFault("the link is closed")
        if len(peer._inbox) >= MESSAGES_MAX:
            await self.close()
            raise LinkFault(f"the peer does not read: {MESSAGES_MAX} messages wait for it")
        peer._inbox.append(message)
        peer._arrived.set()

    async def receive(self) -> object:
        while not self._inbox:
            if self._closed or self._peer is None or self._peer._closed:
                raise LinkFault("the link is closed")
            self._arrived.clear()
            await self._arrived.wait()
        return self._inbox.popleft()

    async def close(self) -> None:
        self._closed = True
        self._arrived.set()
        if self._peer is not None:
            self._peer._arrived.set()


def pair() -> tuple[LocalLink, LocalLink]:
    """Two connected ends."""
    one, other = LocalLink(), LocalLink()
    one._peer, other._peer = other, one
    return one, other


class LocalListener:
    """Implements `ports.Listener`; `connect` is the matching `ports.Connect`."""

    def __init__(self) -> None:
        self._accepted: asyncio.Queue[LocalLink] = asyncio.Queue(ACCEPTED_MAX)
        self._closed = False

    @property
    def connect(self) -> Connect:
        return self._connect

    async def _connect(self) -> LocalLink:
        if self._closed:
            raise LinkFault("nobody listens")
        one, other = pair()
        try:
            self._accepted.put_nowait(other)
        except asyncio.QueueFull:
            raise LinkFault(f"{ACCEPTED_MAX} links wait to be accepted") from None
        return one

    async def accept(self) -> LocalLink:
        return await self._accepted.get()

    async def close(self) -> None:
        self._closed = True
        while not self._accepted.empty():
            await self._accepted.get_nowait().close()
