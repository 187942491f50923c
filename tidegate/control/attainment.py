"""How well endpoints kept their promise: attainment and availability over four windows, folded from gateways' counts.

A gateway counts what it served since it started, so a lost or doubled report does no harm. What is kept of an endpoint
are counts in buckets of each window, at most 360 in all. `Keeping` writes them down, so that they outlive this process.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tidegate.domain.errors import StoreFault
from tidegate.domain.ports import Clock
from tidegate.wire.internal import ServiceReported

log = logging.getLogger(__name__)

SAVE_MS = 10_000  # a control plane that is killed forgets at most so much

# name -> (bucket in milliseconds, how many of them)
WINDOWS = {"5m": (10_000, 30), "1h": (60_000, 60), "24h": (600_000, 144), "30d": (21_600_000, 120)}

# (endpoint, window, place in the window's ring, number of the bucket, served, attained, failed)
Row = tuple[str, str, int, int, int, int, int]
Load = Callable[[], Sequence[Row]]
Save = Callable[[Sequence[Row], Collection[str]], None]
"""Replaces what is stored in those places, after all of those endpoints is removed."""


@dataclass(slots=True)
class Bucket:
    number: int
    served: int = 0
    attained: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """Counts of one window: requests answered, those within the SLO, and those the platform failed to answer."""

    served: int
    attained: int
    failed: int

    @property
    def requests(self) -> int:
        return self.served + self.failed

    @property
    def attainment(self) -> float | None:
        """Share of all requests answered within the SLO; a request that failed was not. None without requests."""
        return self.attained / self.requests if self.requests else None

    @property
    def availability(self) -> float | None:
        return self.served / self.requests if self.requests else None

    def budget_left(self, percentile: int) -> float | None:
        """What is left of the misses an SLO at `percentile` allows, as a share; below 0 when it is overdrawn."""
        allowed = self.requests * (100 - percentile) / 100
        return 1 - (self.requests - self.attained) / allowed if allowed else None


class Attainment:
    """Only the fleet loop writes to it; everybody may read."""

    def __init__(self) -> None:
        self.since_ms = 0
        self._last: dict[tuple[str, str], ServiceReported] = {}
        self._rings: dict[str, dict[str, deque[Bucket]]] = {}
        self._changed: dict[tuple[str, str, int], Bucket] = {}
        self._gone: set[str] = set()

    def report(self, report: ServiceReported, now_ms: int) -> None:
        """Adds what is new since the last report of that gateway; one that is a baseline only says where it stands."""
        self.since_ms = self.since_ms or now_ms
        key = (report.gateway, report.endpoint)
        last = self._last.get(key)
        self._last[key] = report
        if report.baseline:
            return
        served, attained, failed = report.served, report.attained, report.failed
        if last is not None:
            served, attained, failed = served - last.served, attained - last.attained, failed - last.failed
        rings = self._rings.setdefault(report.endpoint, {})
        for name, (bucket_ms, count) in WINDOWS.items():
            ring = rings.setdefault(name, deque(maxlen=count))
            number = now_ms // bucket_ms
            if not ring or ring[-1].number < number:
                ring.append(Bucket(number))
            ring[-1].served += served
            ring[-1].attained += attained
            ring[-1].failed += failed
            self._changed[report.endpoint, name, number % count] = ring[-1]

    def restore(self, rows: Sequence[Row], now_ms: int) -> None:
        """What an earlier process has kept, before the first report."""
        for endpoint, window, _, number, served, attained, failed in sorted(rows, key=lambda row: row[3]):
            bucket_ms, count = WINDOWS[window]
            if now_ms // bucket_ms - count < number <= now_ms // bucket_ms:
                ring = self._rings.setdefault(endpoint, {}).setdefault(window, deque(maxlen=count))
                ring.append(Bucket(number, served, attained, failed))
                self.since_ms = min(self.since_ms or now_ms, number * bucket_ms)

    def unsaved(self) -> tuple[list[Row], set[str]]:
        """What changed since the last call, and endpoints that were removed: for `Save`. Bounded by what is kept."""
        rows = [(*key, b.number, b.served, b.attained, b.failed) for key, b in self._changed.items()]
        gone, self._changed, self._gone = self._gone, {}, set()
        return rows, gone

    def unsaved_again(self, rows: Sequence[Row], gone: Collection[str]) -> None:
        """They could not be saved; what changed meanwhile is newer."""
        for endpoint, window, place, *counts in rows:
            self._changed.setdefault((endpoint, window, place), Bucket(*counts))
        self._gone |= set(gone)

    def kept(self, endpoint: str, now_ms: int) -> dict[str, Kept]:
        """By window."""
        return {name: self._sum(endpoint, name, now_ms) for name in WINDOWS}

    def _sum(self, endpoint: str, window: str, now_ms: int) -> Kept:
        bucket_ms, count = WINDOWS[window]
        oldest = now_ms // bucket_ms - count + 1
        live = [b for b in self._rings.get(endpoint, {}).get(window, ()) if b.number >= oldest]
        return Kept(sum(b.served for b in live), sum(b.attained for b in live), sum(b.failed for b in live))

    def gateway_lost(self, gateway: str) -> None:
        self._last = {key: report for key, report in self._last.items() if key[0] != gateway}

    def forget(self, endpoint: str) -> None:
        self._rings.pop(endpoint, None)
        self._last = {key: report for key, report in self._last.items() if key[1] != endpoint}
        self._changed = {key: bucket for key, bucket in self._changed.items() if key[0] != endpoint}
        self._gone.add(endpoint)


class Keeping:
    """Loads what an earlier process has counted, and saves what this one counts."""

    def __init__(self, attainment: Attainment, clock: Clock, load: Load, save: Save) -> None:
        self._attainment, self._clock, self._load, self._save = attainment, clock, load, save

    async def load(self) -> None:
        """Before the first report. Raises StoreFault."""
        self._attainment.restore(await asyncio.to_thread(self._load), self._clock.now_ms())

    async def run(self) -> None:
        """Saves every `SAVE_MS` for ever, and once more on cancellation."""
        try:
            while True:
                await asyncio.sleep(SAVE_MS / 1_000)
                await self.save()
        finally:
            self._saved(*self._attainment.unsaved())

    async def save(self) -> None:
        rows, gone = self._attainment.unsaved()
        if (rows or gone) and not await asyncio.to_thread(self._saved, rows, gone):
            self._attainment.unsaved_again(rows, gone)

    def _saved(self, rows: Sequence[Row], gone: Collection[str]) -> bool:
        try:
            self._save(rows, gone)
        except StoreFault as fault:
            log.warning("service levels not written, will be retried: %s", fault.reason)
            return False
        return True
