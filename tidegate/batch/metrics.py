"""What the operator watches about offline work."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric


class BatchMetrics:
    """On a registry of their own: whoever serves ``/metrics`` registers that one with theirs. `open_batches` counts
    unfinished batches by status, `lines_left` the lines that are not done, by endpoint.
    """

    def __init__(
        self, open_batches: Callable[[], Mapping[str, int]], lines_left: Callable[[], Mapping[str, int]]
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._open_batches, self._lines_left = open_batches, lines_left
        self.lines = Counter(
            "tidegate_batch_lines_total",
            "Tries of batch lines by what came of them",
            ["endpoint", "outcome"],
            registry=registry,
        )
        registry.register(self)

    def collect(self) -> list[Metric]:
        batches = GaugeMetricFamily("tidegate_batches_open", "Batches that have not ended", labels=["status"])
        for status, count in self._open_batches().items():
            batches.add_metric([status], count)
        left = GaugeMetricFamily("tidegate_batch_lines_left", "Lines of open batches not done yet", labels=["endpoint"])
        for endpoint, count in self._lines_left().items():
            left.add_metric([endpoint], count)
        return [batches, left]
