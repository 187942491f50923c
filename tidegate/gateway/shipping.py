"""Journals of a gateway on another machine, on their way to the ledger: piece by piece, each answered once on disk.

The other side says how far it is and that counts, so whatever is lost on the way is sent again and nothing is kept
twice. While the platform is away the journals wait on this machine's disk.
"""

import asyncio
import logging
from typing import Protocol

from tidegate.domain.errors import LinkFault, StoreFault
from tidegate.domain.ports import Connect, Link
from tidegate.wire.joining import (
    JOURNAL_PIECE_BYTES_MAX,
    JournalEnded,
    JournalHeld,
    JournalOffered,
    JournalPiece,
)

POLL_MS = 200
RETRY_MS_MIN = 200
RETRY_MS_MAX = 5_000

log = logging.getLogger(__name__)


class Read(Protocol):
    """Bytes at `offset` of `segment`; none and `ended`: there will never be more."""

    @property
    def segment(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def data(self) -> bytes: ...

    @property
    def ended(self) -> bool: ...


class Tail(Protocol):
    """The journals on this machine. Every method blocks on a disk and may raise StoreFault."""

    def boots(self) -> list[str]: ...

    def read(self, boot: str, segment: int, offset: int, bytes_max: int) -> Read: ...

    def forget(self, boot: str, segment: int) -> None: ...

    def remove(self, boot: str) -> None: ...


class Shipper:
    """`run` ships for ever; `done` is set once every journal here has ended and is on the other side's disk."""

    def __init__(self, tail: Tail, connect: Connect) -> None:
        self._tail, self._connect = tail, connect
        self._at: dict[str, JournalHeld] = {}
        self.done = asyncio.Event()

    async def run(self) -> None:
        pause_ms = RETRY_MS_MIN
        while True:
            try:
                link = await self._connect()
                try:
                    self._at.clear()
                    while True:
                        moved = await self._turn(link)
                        pause_ms = RETRY_MS_MIN
                        if not moved:
                            await asyncio.sleep(POLL_MS / 1000)
                finally:
                    await link.close()
            except (LinkFault, StoreFault) as fault:
                log.info("usage records wait on this machine, next attempt in %d ms: %s", pause_ms, fault.reason)
            await asyncio.sleep(pause_ms / 1000)
            pause_ms = min(pause_ms * 2, RETRY_MS_MAX)

    async def _turn(self, link: Link) -> bool:
        """One piece of each journal; whether there was any."""
        moved = False
        if not (boots := await asyncio.to_thread(self._tail.boots)):
            self.done.set()
        for boot in boots:
            at = self._at.get(boot) or await self._held(link, JournalOffered(boot))
            piece = await asyncio.to_thread(self._tail.read, boot, at.segment, at.offset, JOURNAL_PIECE_BYTES_MAX)
            if piece.data:
                held = await self._held(link, JournalPiece(boot, piece.segment, piece.offset, piece.data))
                if (held.segment, held.offset) <= (at.segment, at.offset):
                    raise LinkFault("the other side took a piece of the journal and is no further")
                await asyncio.to_thread(self._tail.forget, boot, held.segment)
                moved = True
            elif piece.ended:
                await self._held(link, JournalEnded(boot))
                self._at.pop(boot, None)
                await asyncio.to_thread(self._tail.remove, boot)
            else:
                await self._held(link, JournalOffered(boot))  # a word now and then: is the other side still there?
        return moved

    async def _held(self, link: Link, message: JournalOffered | JournalPiece | JournalEnded) -> JournalHeld:
        await link.send(message)
        answer = await link.receive()
        if not isinstance(answer, JournalHeld) or answer.boot != message.boot:
            raise LinkFault(f"a {type(answer).__name__} message does not say how far the journal is")
        self._at[message.boot] = answer
        return answer
