"""What a run is judged by, in memory that does not grow with the trace: log-scaled histograms and counters by
endpoint.
"""

from dataclasses import dataclass, field
from math import exp, log

from tidegate.sim.compute import Request

BINS_PER_E = 50  # 2 % wide
OFFSET_MS = 1.0
ENDPOINT_REQUESTS_MIN = 100
HOUR_MS = 3_600_000.0


class Histogram:
    """Counts of durations in ms; quantiles are right to 2 %."""

    __slots__ = ("bins", "count")

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}
        self.count = 0

    def add(self, value_ms: float) -> None:
        index = int(log(max(value_ms, 0.0) + OFFSET_MS) * BINS_PER_E)
        self.bins[index] = self.bins.get(index, 0) + 1
        self.count += 1

    def quantile(self, q: float) -> float:
        need, seen = q * self.count, 0
        for index in sorted(self.bins):
            seen += self.bins[index]
            if seen >= need:
                return exp((index + 0.5) / BINS_PER_E) - OFFSET_MS
        return 0.0


@dataclass(slots=True)
class EndpointMeter:
    requests: int = 0
    attained: int = 0
    misses: dict[str, int] = field(default_factory=dict)


def _why_late(request: Request) -> str:
    """The longest part of a late first token: no replica was up (`activation`); those that were had no free slot
    (`slots`); its engine had others to prefill first, or no KV for it (`queue`); or the prefill shared its
    accelerator (`prefill`).
    """
    held_ms = request.granted_ms - request.arrived_ms
    parts = {
        "activation": request.activation_ms,
        "slots": held_ms - request.activation_ms,
        "queue": request.begun_ms - request.granted_ms,
        "prefill": request.first_ms - request.begun_ms - request.prefill_ms,
    }
    return max(parts, key=lambda part: parts[part])


@dataclass(slots=True)
class Meter:
    """`slo_ttft_ms` is TTFT beyond the prefill itself; a request also needs its TPOT, and to be served at all."""

    slo_ttft_ms: float
    slo_tpot_ms: float
    ttft: Histogram = field(default_factory=Histogram)
    beyond: Histogram = field(default_factory=Histogram)
    endpoints: dict[str, EndpointMeter] = field(default_factory=dict)
    requests: int = 0
    attained: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    missed_by_hour: dict[int, int] = field(default_factory=dict)
    began_ms: float = 0.0
    cold: int = 0
    output_tokens: int = 0
    activations: int = 0
    starts: int = 0
    evictions: int = 0
    undone: int = 0

    def served(self, request: Request, ended_ms: float) -> bool:
        """True if within the SLO."""
        self.requests += 1
        self.output_tokens += request.output_tokens
        gaps = request.output_tokens - 1
        tpot_ms = (ended_ms - request.first_ms) / gaps if gaps else 0.0
        self.ttft.add(request.first_ms - request.arrived_ms)
        self.beyond.add(request.beyond_ms)
        if request.activation_ms > 0:
            self.cold += 1
        if request.beyond_ms > self.slo_ttft_ms:
            return self.count(request, _why_late(request))
        return self.count(request, "decode" if tpot_ms > self.slo_tpot_ms else "")

    def not_served(self, request: Request) -> None:
        self.requests += 1
        self.count(request, "refused")

    def count(self, request: Request, missed: str) -> bool:
        """One request has ended; `missed` says why it is outside its SLO, "" if it is not. True if within."""
        meter = self.endpoints.get(request.endpoint)
        if meter is None:
            meter = self.endpoints[request.endpoint] = EndpointMeter()
        meter.requests += 1
        if not missed:
            meter.attained += 1
            self.attained += 1
            return True
        meter.misses[missed] = meter.misses.get(missed, 0) + 1
        self.misses[missed] = self.misses.get(missed, 0) + 1
        hour = int((request.arrived_ms - self.began_ms) // HOUR_MS)
        self.missed_by_hour[hour] = self.missed_by_hour.get(hour, 0) + 1
        return False

    def begin(self, now_ms: float) -> None:
        """The trace begins: what was swapped before is not counted."""
        self.began_ms = now_ms
        self.activations = self.starts = self.evictions = self.undone = 0

    def shares(self) -> dict[str, float]:
        """Attainment of each endpoint with enough requests to tell."""
        return {
            name: m.attained / m.requests for name, m in self.endpoints.items() if m.requests >= ENDPOINT_REQUESTS_MIN
        }

    def pooled_rest(self) -> float:
        """Attainment pooled over the endpoints with fewer."""
        rest = [m for m in self.endpoints.values() if m.requests < ENDPOINT_REQUESTS_MIN]
        requests = sum(m.requests for m in rest)
        return sum(m.attained for m in rest) / requests if requests else 1.0

    def missed_most(self, count: int) -> list[tuple[str, EndpointMeter]]:
        """The endpoints with the most misses, most first."""
        by_misses = sorted(self.endpoints.items(), key=lambda e: (e[1].attained - e[1].requests, e[0]))
        return [(name, found) for name, found in by_misses[:count] if found.misses]
