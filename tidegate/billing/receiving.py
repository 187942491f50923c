"""Journals that gateways on other machines ship here: kept as they come, answered once they are on disk.

`billing.ingest` reads them like those of this machine. A gateway that is silent for `GONE_MS_MAX` is taken for gone
for ever: its running streams are then billed up to their last checkpoint.
"""

import asyncio
import logging
from collections.abc import Iterator
from typing import Protocol

from prometheus_client.metrics_core import GaugeMetricFamily

from tidegate.domain.errors import LinkFault, StoreFault
from tidegate.domain.ports import Clock, Link, Listener
from tidegate.domain.units import MS_PER_HOUR
from tidegate.wire.joining import JOURNAL_PIECE_BYTES_MAX, JournalEnded, JournalHeld, JournalOffered, JournalPiece

LINKS_MAX = 256
GONE_MS_MAX = 72 * MS_PER_HOUR
SWEEP_S = 60.0

log = logging.getLogger(__name__)


class Held(Protocol):
    @property
    def segment(self) -> int: ...

    @property
    def offset(self) -> int: ...


class Mirror(Protocol):
    """Journals of other machines on this machine's disk. Every method blocks on it and may raise StoreFault."""

    def boots(self) -> list[str]: ...

    def begin(self, boot: str) -> Held: ...

    def write(self, boot: str, segment: int, offset: int, data: bytes) -> Held: ...

    def end(self, boot: str) -> None: ...


class Receiver:
    """`run` serves links until it is cancelled. Also a Prometheus collector: how long each gateway has been silent."""

    def __init__(self, listener: Listener, mirror: Mirror, clock: Clock) -> None:
        self._listener, self._mirror, self._clock = listener, mirror, clock
        self._disk = asyncio.Lock()  # one writer at a time
        self._heard_ms: dict[str, int] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """While the seconds of a gateway grow, its usage records wait on its own disk."""
        what = "Seconds since the journal of a gateway on another machine was heard of"
        family = GaugeMetricFamily("tidegate_journal_silence_seconds", what, labels=["gateway"])
        now_ms = self._clock.now_ms()
        silent: dict[str, int] = {}
        for boot, heard_ms in self._heard_ms.items():
            name = boot.partition("+")[0]
            silent[name] = min(silent.get(name, now_ms), now_ms - heard_ms)
        for name, ms in sorted(silent.items()):
            family.add_metric([name], max(ms, 0) / 1_000)
        yield family

    async def run(self) -> None:
        links: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sweep())
                while True:
                    link = await self._listener.accept()
                    if len(links) >= LINKS_MAX:
                        await link.close()
                        continue
                    task = group.create_task(self._serve(link))
                    links.add(task)
                    task.add_done_callback(links.discard)
        finally:
            await self._listener.close()

    async def _serve(self, link: Link) -> None:
        try:
            while True:
                await link.send(await self._answer(link.peer, await link.receive()))
        except (LinkFault, StoreFault) as fault:
            log.info("journals of %s: %s", link.peer, fault.reason)
        finally:
            await link.close()

    async def _answer(self, peer: str, message: object) -> JournalHeld:
        match message:
            case JournalOffered(boot) | JournalPiece(boot, _, _, _) | JournalEnded(boot) if _of(peer, boot):
                self._heard_ms[boot] = self._clock.now_ms()
            case _:
                raise LinkFault(f"it may not send {type(message).__name__}")
        async with self._disk:
            match message:
                case JournalOffered():
                    held = await asyncio.to_thread(self._mirror.begin, boot)
                case JournalPiece(_, segment, offset, data):
                    if not data or len(data) > JOURNAL_PIECE_BYTES_MAX or segment < 1 or offset < 0:
                        raise LinkFault("what it sent is no piece of a journal")
                    held = await asyncio.to_thread(self._mirror.write, boot, segment, offset, data)
                case JournalEnded():
                    await asyncio.to_thread(self._mirror.end, boot)
                    self._heard_ms.pop(boot, None)
                    return JournalHeld(boot, 0, 0)
        return JournalHeld(boot, held.segment, held.offset)

    async def _sweep(self) -> None:
        """Gives up gateways that were silent for too long, counted from this start on."""
        while True:
            now_ms = self._clock.now_ms()
            for boot in self._mirror.boots():
                if now_ms - self._heard_ms.setdefault(boot, now_ms) > GONE_MS_MAX:
                    hours = GONE_MS_MAX // MS_PER_HOUR
                    log.warning("gateway %s was silent for %d h and is taken for gone", boot, hours)
                    async with self._disk:
                        await asyncio.to_thread(self._mirror.end, boot)
                    del self._heard_ms[boot]
            await asyncio.sleep(SWEEP_S)


def _of(peer: str, boot: str) -> bool:
    """Whether a boot id is one of this gateway's: ``NAME+…`` (names have no plus sign)."""
    role, _, name = peer.partition("/")
    return role == "gateway" and boot.startswith(name.partition("/")[0] + "+") and "/" not in boot
