"""What a gateway counts, and its Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/).

Our own instead of prometheus-client: that costs a lock and a label lookup for each observation, and memory the data
plane's budget does not have.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable

from tidegate.domain.usage import Outcome

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BOUNDS_MS = [bound * 1000 for bound in SECONDS]

Sample = tuple[str, float]
Family = tuple[str, str, str, Iterable[Sample]]
"""(name, type, help, samples); a sample is (what follows the name, value)."""


class Histogram:
    """Observations are milliseconds, the text is in seconds."""

    __slots__ = ("_buckets", "_sum_ms")

    def __init__(self) -> None:
        self._buckets = [0] * (len(SECONDS) + 1)
        self._sum_ms = 0

    def observe(self, ms: int) -> None:
        self._buckets[bisect_left(_BOUNDS_MS, ms)] += 1
        self._sum_ms += ms

    def samples(self, label: str) -> Iterable[Sample]:
        count = 0
        for bound, bucket in zip([*map(str, SECONDS), "+Inf"], self._buckets, strict=True):
            count += bucket
            yield f'_bucket{{{label},le="{bound}"}}', count
        yield f"_sum{{{label}}}", self._sum_ms / 1000
        yield f"_count{{{label}}}", count


class EndpointMetrics:
    """`served`, `attained`, `failed` are those of `ServiceReported`."""

    __slots__ = ("attained", "failed", "hold", "input_tokens", "outcomes", "output_tokens", "served", "ttft")

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = {}
        self.input_tokens = 0
        self.output_tokens = 0
        self.served = self.attained = self.failed = 0
        self.hold = Histogram()
        self.ttft = Histogram()


class Metrics:
    """Label values are endpoints of the catalog and our own words only, so what is kept is bounded by the catalog."""

    def __init__(self) -> None:
        self._endpoints: dict[str, EndpointMetrics] = {}
        self._refusals: dict[str, int] = {}
        self._overflows: dict[tuple[str, str, str], int] = {}
        self._residency_denied: dict[str, int] = {}
        self._news: set[str] = set()

    def endpoint(self, name: str) -> EndpointMetrics:
        found = self._endpoints.get(name)
        if found is None:
            found = self._endpoints[name] = EndpointMetrics()
        return found

    def service_changed(self, endpoint: str) -> None:
        """Its `served`, `attained` or `failed` have news."""
        self._news.add(endpoint)

    def services(self, *, every: bool) -> list[tuple[str, int, int, int]]:
        """(endpoint, served, attained, failed) of those with news since the last call, or of `every` one."""
        news, self._news = self._news, set()
        cells = ((name, self._endpoints.get(name)) for name in (self._endpoints if every else news))
        return [(name, cell.served, cell.attained, cell.failed) for name, cell in cells if cell is not None]

    def refused(self, code: str) -> None:
        self._refusals[code] = self._refusals.get(code, 0) + 1

    def overflowed(self, endpoint: str, to: str, reason: str) -> None:
        key = (endpoint, to, reason)
        self._overflows[key] = self._overflows.get(key, 0) + 1

    def residency_denied(self, endpoint: str) -> None:
        self._residency_denied[endpoint] = self._residency_denied.get(endpoint, 0) + 1

    def forget(self, endpoint: str) -> None:
        """The endpoint is gone from the catalog."""
        self._endpoints.pop(endpoint, None)
        self._residency_denied.pop(endpoint, None)
        self._overflows = {key: count for key, count in self._overflows.items() if endpoint not in key[:2]}

    def text(self, gauges: Iterable[Family]) -> str:
        """Everything, and `gauges` behind it."""
        return "".join(line for family in (*self._families(), *gauges) for line in _lines(*family))

    def _families(self) -> Iterable[Family]:
        yield (
            "tidegate_requests_total", "counter", "Requests by endpoint and how they ended.",
            (
                (f'{{{_label(name)},outcome="{outcome}"}}', count)
                for name, cell in self._endpoints.items()
                for outcome, count in cell.outcomes.items()
            ),
        )  # fmt: skip
        yield (
            "tidegate_tokens_total", "counter", "Tokens read (input) and delivered (output).",
            (
                (f'{{{_label(name)},kind="{kind}"}}', count)
                for name, cell in self._endpoints.items()
                for kind, count in (("input", cell.input_tokens), ("output", cell.output_tokens))
            ),
        )  # fmt: skip
        yield (
            "tidegate_refusals_total", "counter", "Refusals by code, before and after admission.",
            ((f'{{code="{code}"}}', count) for code, count in self._refusals.items()),
        )  # fmt: skip
        yield (
            "tidegate_overflow_requests_total", "counter", "Requests another endpoint was asked to serve, and why.",
            (
                (f'{{{_label(endpoint)},{_label(to, "to")},reason="{reason}"}}', count)
                for (endpoint, to, reason), count in self._overflows.items()
            ),
        )  # fmt: skip
        yield (
            "tidegate_residency_denied_total", "counter", "Requests refused because no node of its regions is there.",
            per_endpoint(self._residency_denied.items()),
        )  # fmt: skip
        yield "tidegate_hold_seconds", "histogram", "How long granted requests were held.", self._all(lambda c: c.hold)
        yield "tidegate_ttft_seconds", "histogram", "Arrival to first byte of an answer.", self._all(lambda c: c.ttft)

    def _all(self, pick: Callable[[EndpointMetrics], Histogram]) -> Iterable[Sample]:
        return (s for name, cell in self._endpoints.items() for s in pick(cell).samples(_label(name)))


def per_endpoint(values: Iterable[tuple[str, int]]) -> Iterable[Sample]:
    return ((f"{{{_label(name)}}}", value) for name, value in values)


def _label(endpoint: str, name: str = "endpoint") -> str:
    escaped = endpoint.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


def _lines(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for suffix, value in samples:
        yield f"{name}{suffix} {value}\n"
