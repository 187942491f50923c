"""What an endpoint is promised and gets, as metrics: concurrency limits, activation bounds, attainment."""

from collections.abc import Collection, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from tidegate.control.meters import Meters
from tidegate.domain.endpoint import Deployment
from tidegate.domain.replica import ReplicaState
from tidegate.policy.view import EndpointView, FleetView
from tidegate.wire import admin


def concurrency(wanted: Deployment, seen: EndpointView | None) -> admin.ConcurrencyView:
    ready = sum(r.state is ReplicaState.READY for r in seen.replicas) if seen else 0
    return admin.ConcurrencyView(ready * wanted.slots, wanted.max_replicas * wanted.slots)


def bound(times: Collection[int]) -> admin.BoundView:
    """Nearest-rank percentiles of at least one time: each is a time that was measured."""
    ordered = sorted(times)
    p50, p95, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95, 99))
    return admin.BoundView(len(ordered), p50, p95, p99)


def slo_status(wanted: Deployment, meters: Meters, now_ms: int) -> dict[str, admin.SloView]:
    return {
        window: admin.SloView(
            kept.requests, kept.attainment, kept.availability, kept.budget_left(wanted.slo.percentile)
        )
        for window, kept in meters.attainment.kept(wanted.endpoint, now_ms).items()
    }


def endpoint_metrics(
    deployments: Sequence[Deployment], view: FleetView, meters: Meters, now_ms: int
) -> Iterator[Metric]:
    """A share is left out where there were no requests."""
    limits = GaugeMetricFamily("tidegate_endpoint_concurrency", "Requests at once", labels=["endpoint", "limit"])
    bounds = GaugeMetricFamily(
        "tidegate_activation_bound_seconds", "Measured activations", labels=["endpoint", "from_tier", "quantile"]
    )
    kept = [
        GaugeMetricFamily(f"tidegate_{name}", what, labels=["endpoint", "window"])
        for name, what in (
            ("slo_attainment", "Share of requests within the SLO"),
            ("availability", "Share of requests answered"),
            ("error_budget", "Share of the misses the SLO allows that is left"),
        )
    ]
    seen = {endpoint.endpoint: endpoint for endpoint in view.endpoints}
    for wanted in deployments:
        name = wanted.endpoint
        now = concurrency(wanted, seen.get(name))
        limits.add_metric([name, "current"], now.current)
        limits.add_metric([name, "full"], now.full)
        for tier, times in meters.activation_ms.get(name, {}).items():
            took = bound(times)
            for quantile, ms in (("0.5", took.p50_ms), ("0.95", took.p95_ms), ("0.99", took.p99_ms)):
                bounds.add_metric([name, tier, quantile], ms / 1_000)
        for window, slo in slo_status(wanted, meters, now_ms).items():
            for family, share in zip(kept, (slo.attainment, slo.availability, slo.error_budget), strict=True):
                if share is not None:
                    family.add_metric([name, window], share)
    yield from (limits, bounds, *kept)
