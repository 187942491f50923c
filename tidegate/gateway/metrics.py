"""What a gateway counts, and its Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/).

Our own instead of prometheus-client: that costs a lock and a label lookup for each observation, and memory the data
plane's budget does not have.
"""

from bisect import bisect_left
from collections.abc import Iterable

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """One histogram a label value. Observations are milliseconds, the text is in seconds."""

    def __init__(self, name: str, text: str, label: str) -> None:
        self._name = name
        self._help = text
        self._label = label
        self._bounds_ms = [bound * 1000 for bound in SECONDS]
        self._cells: dict[str, tuple[list[int], list[int]]] = {}  # label value -> (count a bucket, [sum in ms])

    def observe(self, value: str, ms: int) -> None:
        cell = self._cells.get(value)
        if cell is None:
            cell = self._cells[value] = ([0] * (len(SECONDS) + 1), [0])
        cell[0][bisect_left(self._bounds_ms, ms)] += 1
        cell[1][0] += ms

    def forget(self, value: str) -> None:
        self._cells.pop(value, None)

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self._name} {self._help}"
        yield f"# TYPE {self._name} histogram"
        for value, (buckets, total) in self._cells.items():
            label, count = f'{self._label}="{escape(value)}"', 0
            for bound, bucket in zip([*map(str, SECONDS), "+Inf"], buckets, strict=True):
                count += bucket
                yield f'{self._name}_bucket{{{label},le="{bound}"}} {count}'
            yield f"{self._name}_sum{{{label}}} {total[0] / 1000}"
            yield f"{self._name}_count{{{label}}} {count}"


class Counter:
    """`labels` are names; each cell is keyed by as many values."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self._name = name
        self._help = text
        self._labels = labels
        self._cells: dict[tuple[str, ...], int] = {}

    def add(self, values: tuple[str, ...], amount: int = 1) -> None:
        self._cells[values] = self._cells.get(values, 0) + amount

    def get(self, *values: str) -> int:
        return self._cells.get(values, 0)

    def forget(self, first: str) -> None:
        self._cells = {values: count for values, count in self._cells.items() if values[0] != first}

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self._name} {self._help}"
        yield f"# TYPE {self._name} counter"
        for values, count in self._cells.items():
            labels = ",".join(f'{n}="{escape(v)}"' for n, v in zip(self._labels, values, strict=True))
            yield f"{self._name}{{{labels}}} {count}"


class Metrics:
    """Label values are endpoints of the catalog and our own words only, so what is kept is bounded by the catalog."""

    def __init__(self) -> None:
        self.requests = Counter(
            "tidegate_requests_total", "Requests by endpoint and how they ended.", "endpoint", "outcome"
        )
        self.tokens = Counter("tidegate_tokens_total", "Tokens delivered (output) or read (input).", "endpoint", "kind")
        self.refusals = Counter("tidegate_refusals_total", "Refusals by code, before or after admission.", "code")
        self.hold = Histogram("tidegate_hold_seconds", "How long granted requests were held.", "endpoint")
        self.ttft = Histogram("tidegate_ttft_seconds", "Arrival to first byte of an answer.", "endpoint")

    def forget(self, endpoint: str) -> None:
        """The endpoint is gone from the catalog."""
        self.requests.forget(endpoint)
        self.tokens.forget(endpoint)
        self.hold.forget(endpoint)
        self.ttft.forget(endpoint)

    def text(self, gauges: Iterable[tuple[str, str, Iterable[tuple[str, int]]]]) -> str:
        """`gauges` are (name, help, (labels, value) pairs)."""
        lines: list[str] = []
        for metric in (self.requests, self.tokens, self.refusals, self.hold, self.ttft):
            lines += metric.lines()
        for name, text, cells in gauges:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
            lines += [f"{name}{labels} {value}" for labels, value in cells]
        return "\n".join(lines) + "\n"


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
