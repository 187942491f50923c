"""What a run is judged by, in memory that does not grow with the trace: log-scaled histograms and counters by
endpoint.
"""

from dataclasses import dataclass, field
from math import exp, log

BINS_PER_E = 50  # 2 % wide
OFFSET_MS = 1.0
ENDPOINT_REQUESTS_MIN = 100


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
    late: int = 0
    slow: int = 0
    refused: int = 0
    cold: int = 0
    output_tokens: int = 0
    activations: int = 0
    starts: int = 0
    evictions: int = 0
    undone: int = 0
    batch_tokens: float = 0.0

    def served(
        self, endpoint: str, ttft_ms: float, prefill_ms: float, tpot_ms: float, tokens: int, activation_ms: int
    ) -> None:
        self.requests += 1
        self.output_tokens += tokens
        self.ttft.add(ttft_ms)
        beyond = ttft_ms - prefill_ms
        self.beyond.add(beyond)
        if activation_ms > 0:
            self.cold += 1
        if beyond > self.slo_ttft_ms:
            self.late += 1
        elif tpot_ms > self.slo_tpot_ms:
            self.slow += 1
        self._count(endpoint, beyond <= self.slo_ttft_ms and tpot_ms <= self.slo_tpot_ms)

    def not_served(self, endpoint: str) -> None:
        self.requests += 1
        self.refused += 1
        self._count(endpoint, False)

    def _count(self, endpoint: str, attained: bool) -> None:
        meter = self.endpoints.get(endpoint)
        if meter is None:
            meter = self.endpoints[endpoint] = EndpointMeter()
        meter.requests += 1
        if attained:
            meter.attained += 1
            self.attained += 1

    def forget_swaps(self) -> None:
        """What happened before the first request is not counted."""
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
