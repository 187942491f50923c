"""Links between machines: one message a line as in `transports.socket`, over mutual TLS, with a heartbeat.

The part that connected sends ``~ITS_MS`` once a beat, the other answers ``~ITS_MS THERE_MS``. Whoever hears nothing for
`SILENCE_MS_MAX` takes the link for broken; and from the answers a part learns what the platform's clock says.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from tidegate.domain.errors import LinkFault
from tidegate.domain.ports import Connect
from tidegate.transports.identity import Peer
from tidegate.transports.socket import ACCEPTED_MAX, SocketLink
from tidegate.transports.tls import CONNECT_MS_MAX, Dialer, parse
from tidegate.wire import internal

BEAT_MS = 1_000
SILENCE_MS_MAX = 5_000
UNREAD_MS_MAX = 100
CLOSE_MS_MAX = 1_000
CLOCK_SLACK_MS = 20
CLOCK_WARN_MS = 1_000

log = logging.getLogger(__name__)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class SharedClock:
    """The platform's time on a machine whose own clock may be wrong: own time and a measured difference.

    Implements `ports.Clock`. Usage records and budgets are dated by it, so that a machine an hour ahead does not bill
    into the next month.
    """

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_ms(self) -> int:
        return own_ms() + self.ahead_ms

    def heard(self, sent_ms: int, there_ms: int) -> None:
        """An answer to a beat of `sent_ms` (own time). It was made between then and now: known to half of that."""
        now_ms = own_ms()
        ahead_ms, unsure_ms = there_ms - (sent_ms + now_ms) // 2, max(now_ms - sent_ms, 0) // 2
        if abs(ahead_ms - self.ahead_ms) > unsure_ms + CLOCK_SLACK_MS:
            if abs(ahead_ms - self.ahead_ms) > CLOCK_WARN_MS:
                log.warning("this machine's clock is %d ms off the platform's; the platform's is used", -ahead_ms)
            self.ahead_ms = ahead_ms


class SecureLink(SocketLink):
    """Implements `ports.Link`. `on_beat` is asked at each beat of the other side whether it may stay."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        *,
        may_stay: Callable[[], bool] = lambda: True,
        clock: SharedClock | None = None,
    ) -> None:
        super().__init__(reader, writer)
        self.peer = peer
        self._may_stay, self._clock = may_stay, clock
        self._beats: asyncio.Task[None] | None = None

    def beat(self) -> None:
        """Begins to send beats, as the part that connected does."""
        self._beats = asyncio.create_task(self._beat())

    async def receive(self) -> object:
        while True:
            frame = await self._frame_in_time()
            if not frame.startswith(b"~"):
                return internal.decode(frame)
            self._heard(frame)

    async def _frame_in_time(self) -> bytes:
        """The next frame. When time is up it is looked once more: if this process stood still for as long, what the
        other side said is there and only not read yet, and all links would be given up at once.
        """
        for wait_ms in (SILENCE_MS_MAX, UNREAD_MS_MAX):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_ms / 1000):
                    return await self._frame()
        self._writer.transport.abort()
        raise LinkFault(f"nothing was heard of {self.peer} for {SILENCE_MS_MAX} ms")

    async def close(self) -> None:
        """Says goodbye and does not wait for the answer: a peer that is cut off has none, and whoever closes a link may
        have every other one to serve.
        """
        if self._beats is not None:
            self._beats.cancel()
        self._writer.close()
        asyncio.get_running_loop().call_later(CLOSE_MS_MAX / 1000, self._writer.transport.abort)

    def _heard(self, frame: bytes) -> None:
        sent, *there = frame[1:].split()
        try:
            if there and self._clock is not None:
                self._clock.heard(int(sent), int(there[0]))
        except ValueError:
            raise LinkFault("what it sent is no beat") from None
        if not there:
            if not self._may_stay():
                self._writer.transport.abort()
                raise LinkFault(f"{self.peer} was removed from the platform")
            self._write(b"~%d %d\n" % (int(sent), own_ms()))

    async def _beat(self) -> None:
        while not self._writer.is_closing():
            self._write(b"~%d\n" % own_ms())
            await asyncio.sleep(BEAT_MS / 1000)

    def _write(self, frame: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame)


class SecureListener:
    """Implements `ports.Listener` for one purpose of a `transports.door`."""

    def __init__(self, admitted: Callable[[Peer], bool]) -> None:
        self._admitted = admitted
        self._accepted: asyncio.Queue[SecureLink] = asyncio.Queue(ACCEPTED_MAX)

    async def accept(self) -> SecureLink:
        return await self._accepted.get()

    async def close(self) -> None:
        while not self._accepted.empty():
            await self._accepted.get_nowait().close()

    def serve(self, peer: Peer | None) -> asyncio.Protocol:
        """The protocol of one connection, which becomes a link once it is made."""
        assert peer is not None, "the door lets nobody in here without a certificate"
        return streams(lambda reader, writer: self._put(peer, reader, writer))

    def _put(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = SecureLink(reader, writer, str(peer.identity), may_stay=lambda: self._admitted(peer))
        try:
            self._accepted.put_nowait(link)
        except asyncio.QueueFull:
            writer.transport.abort()


def streams(ready: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]) -> asyncio.Protocol:
    """A protocol whose reader takes messages of full length; `ready` is called when its connection is made."""
    return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=internal.MESSAGE_BYTES_MAX), ready)


def connector(dialer: Dialer, address: str, purpose: str, clock: SharedClock | None = None) -> Connect:
    """A `ports.Connect` to the part at `address`; `clock` is set by what is heard there."""
    where = parse(address)

    async def connect() -> SecureLink:
        made: list[Streams] = []
        try:
            async with asyncio.timeout(CONNECT_MS_MAX / 1000):
                await dialer.open(where, purpose, lambda: streams(lambda *both: made.append(both)))
        except (OSError, TimeoutError) as error:
            raise LinkFault(f"cannot connect to {where.host}:{where.port}: {said(error)}") from error
        link = SecureLink(*made[0], where.part, clock=clock)
        link.beat()
        return link

    return connect


def said(error: Exception) -> str:
    """What a failed connection says of itself; safe to show."""
    return getattr(error, "verify_message", "") or getattr(error, "strerror", "") or type(error).__name__


def own_ms() -> int:
    return time.time_ns() // 1_000_000
