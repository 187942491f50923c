"""What a request asks of accelerators at least, whoever serves it and however well, if it is to be within its SLO; and
what those of one endpoint in a window of time ask together. The proofs are in docs/lower-bound.md.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from tidegate.sim.compute import GANG_EFFICIENCY
from tidegate.sim.profile import FleetProfile

Interval = tuple[float, float, float]
"""(start, end, what is needed within), in ms"""


class Ask(NamedTuple):
    """One request. Instants in ms, without the SLO of TTFT, by which its prefill and its last token must be over at the
    latest; times in ms of one accelerator with nothing else to do.

    `read_ms`: reading its own KV once for each token; `shared_ms`: that and its part of the readings of the weights, at
    least, as only so many requests have room for their KV beside it; `weights_ms`: reading the weights for each token;
    `held_bytes`: memory it holds at least from its prefill to its last token.
    """

    at_ms: float
    prefilled_ms: float
    last_ms: float
    prefill_ms: float
    read_ms: float
    shared_ms: float
    weights_ms: float
    held_bytes: float


class Asking:
    """What the requests of one endpoint ask for, from its model and the hardware."""

    def __init__(self, profile: FleetProfile, endpoint: str) -> None:
        hardware, model = profile.accelerator, profile.model_of(endpoint)
        self.weight_bytes = model.weight_bytes
        self._tpot_ms = profile.tpot_ms
        self._token_ms = 2.0 * model.params / (hardware.dense_flop_per_ms * model.flop_rate_factor)
        self._kv_bytes = model.kv_bytes_per_token
        self._kv_ms = model.kv_bytes_per_token / hardware.memory_bytes_per_ms
        self._weight_ms = model.weight_bytes / hardware.memory_bytes_per_ms
        each = hardware.memory_bytes - hardware.workspace_bytes
        rooms = [(share, s * each - model.weight_bytes) for s, share in GANG_EFFICIENCY.items()]
        self._rooms = [(share, model.kv_bytes_per_token / room) for share, room in rooms if room > 0]

    def ask(self, at_ms: float, input_tokens: int, output_tokens: int) -> Ask:
        gaps, tokens = output_tokens - 1, input_tokens + output_tokens
        prefill_ms, weights_ms = input_tokens * self._token_ms, gaps * self._weight_ms
        read_ms = (gaps * input_tokens + gaps * (gaps - 1) // 2) * self._kv_ms
        shared_ms = read_ms
        if self._rooms:
            shared_ms = min((read_ms + weights_ms * min(1.0, tokens * part)) / share for share, part in self._rooms)
        prefilled_ms = at_ms + prefill_ms
        last_ms = prefilled_ms + gaps * self._tpot_ms
        # One whose KV is larger than all its engine has runs alone, and that engine holds its weights.
        held_bytes = float(min(tokens * self._kv_bytes, self.weight_bytes))
        return Ask(at_ms, prefilled_ms, last_ms, prefill_ms, read_ms, shared_ms, weights_ms, held_bytes)


@dataclass(slots=True)
class Needs:
    """By request: accelerator-ms of compute, and byte-ms of memory in the time of one accelerator. `later`: of those
    that need not be over yet, how much of the first may still be to do (ms), and the memory they hold until it is.
    """

    times_ms: list[float] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    later: list[tuple[float, float]] = field(default_factory=list)

    def add(self, other: "Needs") -> None:
        self.times_ms += other.times_ms
        self.volumes += other.volumes
        self.later += other.later

    def sort(self) -> None:
        """Largest first; of what may be done later that which holds the least memory for its time."""
        self.times_ms.sort(reverse=True)
        self.volumes.sort(reverse=True)
        self.later.sort(key=lambda left: left[1] / left[0])

    def without_largest(self, count: int) -> "Needs":
        """Of sorted ones."""
        return Needs(self.times_ms[count:], self.volumes[count:], self.later)

    def later_ms(self, memory_bytes: float) -> float:
        """Of sorted ones: how much may still be to do at the end, at most, when so much memory holds the KV of it."""
        total_ms = 0.0
        for left_ms, held_bytes in self.later:
            if held_bytes >= memory_bytes:
                return total_ms + left_ms * memory_bytes / held_bytes
            memory_bytes -= held_bytes
            total_ms += left_ms
        return total_ms


def needs(asks: list[Ask], limit_ms: float, slo_ms: float, weight_bytes: int) -> Needs:
    """What requests of one endpoint ask for by `limit_ms` and the SLO of TTFT, if their prefill must be over by then.
    The sum without any of them is a bound for the rest, too.
    """
    begun = [ask for ask in asks if ask.prefilled_ms <= limit_ms]
    over = [index for index, ask in enumerate(begun) if ask.last_ms <= limit_ms]
    apart = heaviest_disjoint([(begun[k].at_ms, begun[k].last_ms + slo_ms, begun[k].weights_ms) for k in over])
    shared_ms = sum(ask.shared_ms - ask.read_ms for ask in begun)
    together = shared_ms > sum(begun[over[k]].weights_ms for k in apart)
    decode_ms = [ask.shared_ms if together else ask.read_ms for ask in begun]
    later = [
        (own_ms, ask.held_bytes)
        for ask, own_ms in zip(begun, decode_ms, strict=True)
        if ask.last_ms > limit_ms and own_ms > 0.0
    ]
    times_ms = [ask.prefill_ms + own_ms for ask, own_ms in zip(begun, decode_ms, strict=True)]
    if not together:
        for k in apart:
            times_ms[over[k]] += begun[over[k]].weights_ms
    intervals = []
    for ask in asks:
        need_ms = ask.prefill_ms + ask.read_ms + ask.weights_ms
        if ask.at_ms + need_ms <= limit_ms:
            intervals.append((ask.at_ms, ask.at_ms + slo_ms + need_ms, need_ms))
    return Needs(times_ms, [weight_bytes * intervals[k][2] for k in heaviest_disjoint(intervals)], later)


def heaviest_disjoint(intervals: list[Interval]) -> list[int]:
    """Which of them are disjoint with the largest sum of needs: weighted interval scheduling, a dynamic programme over
    ends in O(n log n).
    """
    order = sorted(range(len(intervals)), key=lambda k: intervals[k][1])
    ends = [intervals[k][1] for k in order]
    best = [0.0] * (len(order) + 1)
    before = [0] * len(order)
    for index, k in enumerate(order):
        start, _, need = intervals[k]
        before[index] = bisect_right(ends, start, 0, index)
        best[index + 1] = max(best[index], need + best[before[index]])
    chosen: list[int] = []
    index = len(order)
    while index:
        if best[index] > best[index - 1]:
            chosen.append(order[index - 1])
            index = before[index - 1]
        else:
            index -= 1
    return chosen
