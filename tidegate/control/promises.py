"""What an endpoint is promised and gets, as metrics: concurrency limits, activation bounds, attainment."""

from collections.abc import Collection, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from tidegate.control.meters import Meters
from tidegate.domain.endpoint import Deployment
from tidegate.domain.replica import ReplicaState
from tidegate.domain.units import GIB
from tidegate.policy.view import EndpointView, FleetView
from tidegate.wire import admin
from tidegate.wire.promises import SizeBounds


def concurrency(wanted: Deployment, seen: EndpointView | None) -> admin.ConcurrencyView:
    ready = sum(r.state is ReplicaState.READY for r in seen.replicas) if seen else 0
    return admin.ConcurrencyView(ready * wanted.slots, wanted.max_replicas * wanted.slots)


def bound(times: Collection[int]) -> admin.BoundView:
    """Nearest-rank percentiles of at least one time: each is a time that was measured."""
    ordered = sorted(times)
    p50, p95, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95, 99))
    return admin.BoundView(len(ordered), p50, p95, p99)


SIZES = (("up to 1 GiB", GIB), ("up to 4 GiB", 4 * GIB), ("up to 16 GiB", 16 * GIB), ("up to 64 GiB", 64 * GIB),
         ("above 64 GiB", None))  # fmt: skip


def bounds_by_size(deployments: Sequence[Deployment], meters: Meters) -> list[SizeBounds]:
    """What activations took lately, over all endpoints with models of a size; sizes without any are left out."""
    found: dict[str, dict[str, list[int]]] = {}
    for wanted in deployments:
        size = next(name for name, most in SIZES if most is None or wanted.model.weight_bytes <= most)
        for tier, times in meters.activation_ms.get(wanted.endpoint, {}).items():
            found.setdefault(size, {}).setdefault(tier, []).extend(times)
    return [
        SizeBounds(name, most, {tier: bound(times) for tier, times in found[name].items()})
        for name, most in SIZES
        if name in found
    ]


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
            _quantiles(bounds, [name, tier], bound(times))
        for window, slo in slo_status(wanted, meters, now_ms).items():
            for family, share in zip(kept, (slo.attainment, slo.availability, slo.error_budget), strict=True):
                if share is not None:
                    family.add_metric([name, window], share)
    sizes = GaugeMetricFamily(
        "tidegate_size_activation_bound_seconds", "Measured activations", labels=["size", "from_tier", "quantile"]
    )
    for group in bounds_by_size(deployments, meters):
        for tier, took in group.tiers.items():
            _quantiles(sizes, [group.size, tier], took)
    yield from (limits, bounds, sizes, *kept)


def _quantiles(family: GaugeMetricFamily, labels: list[str], took: admin.BoundView) -> None:
    for quantile, ms in (("0.5", took.p50_ms), ("0.95", took.p95_ms), ("0.99", took.p99_ms)):
        family.add_metric([*labels, quantile], ms / 1_000)
