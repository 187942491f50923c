"""A lower bound on the accelerators any policy needs, clairvoyant ones included: the *window bound*.

Proof in docs/lower-bound.md. For each window of time, of several lengths, what the requests that arrive in it and must
be over soon after ask for at least (`sim.asks`) is held against what n accelerators have: compute time, and memory x
time. Where they have too little, so many of the requests miss as must go, largest first, until the rest fits. Windows
that do not overlap add up: the bound is the smallest n for which the misses of no set of such windows are more than
what the attainment allows.

Asked of each endpoint, that holds for each of them alone, with the whole fleet to itself, for its own misses; and for
all of them together in each window, after each endpoint has dropped from it all that it may miss in the whole trace.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from tidegate.sim import trace
from tidegate.sim.asks import Ask, Asking, Needs, needs
from tidegate.sim.compute import GANG_EFFICIENCY
from tidegate.sim.profile import FleetProfile

NAME = "window bound (compute and memory, clairvoyant)"
WINDOWS_MS = tuple(8_000.0 * 2**doubled for doubled in range(11))
"""Each divides the next: from a burst of seconds to a storm of hours."""
SHIFTS_MS = (0.0, WINDOWS_MS[-1] / 3.0)
"""Where windows begin, of each length a third of it apart: a storm across the end of one is within another."""
SPARE = 1e-6  # of what there is: rounding must not make a miss

Misses = list[int]
"""By number of accelerators, from 1 on: how many requests must miss at least. Ends before the first 0."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A window that asks for many accelerators even after each endpoint dropped from it what it may miss."""

    from_s: float
    to_s: float
    accelerators: int


@dataclass(frozen=True, slots=True)
class Bound:
    """`alone`: what each endpoint with an allowance of its own needs with the fleet to itself; `peak` is None unless
    the attainment is asked of each of several.
    """

    name: str
    accelerators: int
    alone: dict[str, int]
    peak: Peak | None


@dataclass(frozen=True, slots=True)
class _Fleet:
    """What n accelerators have in a window of so many ms."""

    memory_bytes: int

    def time_ms(self, n: int, span_ms: float, asked: Needs) -> float:
        """What may be done after the window counts as if there were time for it."""
        return (n * span_ms + asked.later_ms(float(n * self.memory_bytes))) * (1.0 + SPARE)

    def volume(self, n: int, span_ms: float) -> float:
        """Byte-ms, in the time of one accelerator: a replica over several needs its weights for that much shorter."""
        fastest = max(s * share for s, share in GANG_EFFICIENCY.items() if s <= n)
        return n * span_ms * self.memory_bytes * fastest * (1.0 + SPARE)

    def misses(self, asked: Needs, span_ms: float) -> Misses:
        found: Misses = []
        while True:
            n = len(found) + 1
            late = _to_remove(asked.times_ms, self.time_ms(n, span_ms, asked))
            late = max(late, _to_remove(asked.volumes, self.volume(n, span_ms)))
            if not late:
                return found
            found.append(late)

    def least(self, asked: Needs, span_ms: float) -> int:
        """How many have room for all of it."""
        n, time_ms, volume = 1, sum(asked.times_ms), sum(asked.volumes)
        while time_ms > self.time_ms(n, span_ms, asked) or volume > self.volume(n, span_ms):
            n += 1
        return n


def lower_bound(profile: FleetProfile, path: Path, allowed: Mapping[str, float], slo_ttft_ms: float) -> Bound:
    """`allowed` misses by endpoint; endpoints that are not in it share what is allowed under the key "".

    Raises Refusal for a bad trace.
    """
    may_miss = {key: int(count + SPARE) for key, count in allowed.items()}
    sweeps = [_Sweep(profile, slo_ttft_ms, may_miss, shift_ms) for shift_ms in SHIFTS_MS]
    alone, pooled, peak = dict.fromkeys(may_miss, 1), 1, None
    for sweep in sweeps:
        sweep.run(path)
        for key, misses in sweep.alone.items():
            alone[key] = max(alone.get(key, 1), _fewest(misses, may_miss.get(key, 0)))
        pooled = max(pooled, _fewest(sweep.pooled, sum(may_miss.values())))
        if len(may_miss) > 1 and sweep.peak is not None:
            peak = max(peak or sweep.peak, sweep.peak, key=lambda found: found.accelerators)
    accelerators = max(pooled, *alone.values(), peak.accelerators if peak is not None else 1)
    return Bound(NAME, accelerators, {key: n for key, n in alone.items() if key}, peak)


def _fewest(misses: Misses, may_miss: int) -> int:
    """Misses never rise with the number of accelerators, so those that miss too many come first."""
    return 1 + sum(1 for count in misses if count > may_miss)


@dataclass(slots=True)
class _Open:
    """The window of one length that is under way, and the misses of the smaller ones within it."""

    index: int = 0
    asks: dict[str, list[Ask]] = field(default_factory=dict)
    alone: dict[str, Misses] = field(default_factory=dict)
    pooled: Misses = field(default_factory=list)


class _Sweep:
    """One pass over the trace, all lengths of window at once; keeps what is in the largest one."""

    def __init__(self, profile: FleetProfile, slo_ms: float, may_miss: Mapping[str, int], shift_ms: float) -> None:
        self._profile, self._slo_ms, self._may_miss, self._shift_ms = profile, slo_ms, may_miss, shift_ms
        self._fleet = _Fleet(profile.accelerator.memory_bytes)
        self._asking: dict[str, Asking] = {}
        self._open = [_Open() for _ in WINDOWS_MS]
        self.alone: dict[str, Misses] = {}
        self.pooled: Misses = []
        self.peak: Peak | None = None

    def run(self, path: Path) -> None:
        for at_ms, endpoint, input_tokens, output_tokens in trace.rows(path):
            for level, length_ms in enumerate(WINDOWS_MS):
                index = int((at_ms + self._shift_ms) // length_ms)
                if index == self._open[level].index:
                    break  # then none of the longer ones is over either
                self._close(level)
                self._open[level].index = index
            asking = self._asking.get(endpoint)
            if asking is None:
                asking = self._asking[endpoint] = Asking(self._profile, endpoint)
            ask = asking.ask(at_ms, input_tokens, output_tokens)
            for window in self._open:
                window.asks.setdefault(endpoint, []).append(ask)
        for level in range(len(WINDOWS_MS)):
            self._close(level)

    def _close(self, level: int) -> None:
        """Its misses, or those of the smaller ones within it where they are more, are handed to the next larger."""
        window, length_ms, fleet = self._open[level], WINDOWS_MS[level], self._fleet
        limit_ms, span_ms = (window.index + 1) * length_ms - self._shift_ms, length_ms + self._slo_ms
        by_key: dict[str, Needs] = {}
        for endpoint, asks in window.asks.items():
            mine = by_key.setdefault(endpoint if endpoint in self._may_miss else "", Needs())
            mine.add(needs(asks, limit_ms, self._slo_ms, self._asking[endpoint].weight_bytes))
        every, kept = Needs(), Needs()
        for key, mine in by_key.items():
            mine.sort()
            every.add(mine)
            kept.add(mine.without_largest(self._may_miss.get(key, 0)))
            if misses := _most(fleet.misses(mine, span_ms), window.alone.get(key, ())):
                window.alone[key] = misses
        every.sort()
        pooled = _most(fleet.misses(every, span_ms), window.pooled)
        n = fleet.least(kept, span_ms)
        if n > (self.peak.accelerators if self.peak is not None else 1):
            self.peak = Peak((limit_ms - length_ms) / 1e3, limit_ms / 1e3, n)
        if level + 1 < len(WINDOWS_MS):
            larger = self._open[level + 1]
            larger.alone = _sums(larger.alone, window.alone)
            larger.pooled = _sum(larger.pooled, pooled)
        else:
            self.alone, self.pooled = _sums(self.alone, window.alone), _sum(self.pooled, pooled)
        self._open[level] = _Open(window.index)


def _most(own: Iterable[int], within: Iterable[int]) -> Misses:
    return [max(a, b) for a, b in zip_longest(own, within, fillvalue=0)]


def _sum(some: Iterable[int], more: Iterable[int]) -> Misses:
    return [a + b for a, b in zip_longest(some, more, fillvalue=0)]


def _sums(some: dict[str, Misses], more: dict[str, Misses]) -> dict[str, Misses]:
    return {**some, **{key: _sum(some.get(key, ()), misses) for key, misses in more.items()}}


def _to_remove(largest_first: list[float], fits: float) -> int:
    """How many of the largest must go until the rest fits."""
    rest = sum(largest_first) - fits
    removed = 0
    while rest > 0.0:
        rest -= largest_first[removed]
        removed += 1
    return removed
