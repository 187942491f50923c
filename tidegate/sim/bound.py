"""A lower bound on the accelerators any policy needs, clairvoyant ones included: the *interval-packing bound*.

Proof in docs/lower-bound.md. In short, for a window of time W and requests that arrive and can end in it:

* A request served within its SLO S keeps its model's weights on an accelerator for at least its own prefill and decode
time l, somewhere in [a, a + S + l]. Requests of one endpoint whose intervals are disjoint cannot share that time: the
heaviest disjoint set of each endpoint needs the sum of its l.
* memory: weights x that sum, over all endpoints, is at most accelerators x memory x (|W| + S).
* time: all prefills and readings of KV are at most accelerators x (|W| + S). (The reading of weights is shared by all
that decode together, for as long as they are let: it bounds nothing.)

With n accelerators each window can break these by too much: then at least so many of its largest requests miss. The
bound is the smallest n for which the misses of all windows stay within what the attainment allows.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, log2
from pathlib import Path

from tidegate.sim import trace
from tidegate.sim.compute import GANG_EFFICIENCY
from tidegate.sim.profile import FleetProfile

NAME = "interval-packing bound (memory and time, clairvoyant)"
WINDOW_MS = 120_000.0

Interval = tuple[float, float, float]
"""(start, end, least time the weights are needed), in ms"""


@dataclass(frozen=True, slots=True)
class Bound:
    name: str
    accelerators: int


@dataclass(slots=True)
class _Window:
    """What one window asks for: byte-ms by request and accelerator-ms by request, largest first once closed."""

    intervals: dict[str, list[Interval]] = field(default_factory=dict)
    volumes: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def close(self, profile: FleetProfile) -> None:
        for endpoint, intervals in self.intervals.items():
            weight = profile.model_of(endpoint).weight_bytes
            self.volumes += [weight * need_ms for _, _, need_ms in heaviest_disjoint(intervals)]
        self.volumes.sort(reverse=True)
        self.times.sort(reverse=True)
        self.intervals = {}

    def misses(self, accelerators: int, memory_bytes: int, slo_ms: float) -> int:
        span = accelerators * (WINDOW_MS + slo_ms)
        return max(_to_remove(self.volumes, span * memory_bytes), _to_remove(self.times, span))


def lower_bound(profile: FleetProfile, path: Path, attainment: float, slo_ttft_ms: float) -> Bound:
    """Raises Refusal for a bad trace."""
    windows = list(_windows(profile, path, slo_ttft_ms))
    allowed = int(sum(count for count, _ in windows) * (1.0 - attainment))
    accelerators = 1
    while sum(w.misses(accelerators, profile.accelerator.memory_bytes, slo_ttft_ms) for _, w in windows) > allowed:
        accelerators += 1
    return Bound(NAME, accelerators)


def _windows(profile: FleetProfile, path: Path, slo_ms: float) -> Iterator[tuple[int, _Window]]:
    """(requests that arrive in it, window), closed, in order."""
    hardware = profile.accelerator
    window, index, count = _Window(), 0, 0
    for at_ms, endpoint, input_tokens, output_tokens in trace.rows(path):
        if int(at_ms // WINDOW_MS) != index:
            window.close(profile)
            yield count, window
            window, index, count = _Window(), int(at_ms // WINDOW_MS), 0
        count += 1
        model = profile.model_of(endpoint)
        least = 2 ** max(0, ceil(log2(model.weight_bytes / hardware.memory_bytes)))
        # Over several accelerators a replica is that much faster, over however many it is let span.
        worth = max(s * share for s, share in GANG_EFFICIENCY.items() if s <= max(least, hardware.gang_max))
        prefill_ms = input_tokens * 2.0 * model.params / (hardware.dense_flop_per_ms * model.flop_rate_factor)
        gaps = output_tokens - 1
        decode_ms = gaps * model.weight_bytes / hardware.memory_bytes_per_ms
        need_ms, limit_ms = (prefill_ms + decode_ms) / worth, (index + 1) * WINDOW_MS
        if at_ms + need_ms <= limit_ms:  # else part of it may fall into a later window
            window.intervals.setdefault(endpoint, []).append((at_ms, at_ms + slo_ms + need_ms, need_ms))
        if at_ms + prefill_ms <= limit_ms:
            own_ms = prefill_ms
            if at_ms + prefill_ms + gaps * profile.tpot_ms <= limit_ms:  # each token reads the request's own KV
                read_tokens = gaps * input_tokens + gaps * (gaps - 1) // 2
                own_ms += read_tokens * model.kv_bytes_per_token / hardware.memory_bytes_per_ms
            window.times.append(own_ms)
    window.close(profile)
    yield count, window


def _to_remove(largest_first: list[float], fits: float) -> int:
    """How many of the largest must go until the rest fits."""
    rest = sum(largest_first) - fits
    removed = 0
    while rest > 0.0:
        rest -= largest_first[removed]
        removed += 1
    return removed


def heaviest_disjoint(intervals: list[Interval]) -> list[Interval]:
    """The disjoint ones with the largest sum of needs: weighted interval scheduling, a dynamic programme over ends in
    O(n log n).
    """
    ordered = sorted(intervals, key=lambda r: r[1])
    ends = [interval[1] for interval in ordered]
    best = [0.0] * (len(ordered) + 1)
    before = [0] * len(ordered)
    for index, (start, _, need) in enumerate(ordered):
        before[index] = bisect_right(ends, start, 0, index)
        best[index + 1] = max(best[index], need + best[before[index]])
    chosen: list[Interval] = []
    index = len(ordered)
    while index:
        if best[index] > best[index - 1]:
            chosen.append(ordered[index - 1])
            index = before[index - 1]
        else:
            index -= 1
    return chosen
