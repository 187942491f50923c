"""What the running fleet is measured by: a fold over the fleet loop's events and commands, shown at ``/metrics``.

* activation: from the first request that found nothing ready (or the command, if none waited) to ready.
* swap: from the drain of a victim to the readiness of the replica that got its place.
* reclaim: an activation that had to make somebody leave; what "the owner takes it back" costs.
* lent: accelerator-seconds of endpoints that are away from home while others use their room (`money.accelerator_time`).
* thrash ratio: share of the last evictions that were undone (the victim's endpoint activated again) within `thrash_ms`.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tidegate.control.attainment import Attainment
from tidegate.domain import plan
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.plan import Drain, Resume, Route, Sleep, Start, Stop, Wake
from tidegate.domain.replica import ReplicaState
from tidegate.money.accelerator_time import AcceleratorTime, Place
from tidegate.policy.view import FleetView

EVICTIONS_MAX = 1_000
ACTIVATIONS_KEPT = 200
MODELS_MAX = 10_000
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(slots=True)
class Coming:
    """A replica on its way to ready: since when, from which tier, and when the first victim in its way was drained."""

    command_ms: int
    tier: str
    model: str
    drain_ms: int | None


@dataclass(slots=True)
class Eviction:
    endpoint: str
    at_ms: int
    undone: bool = False


class Meters:
    """Only the fleet loop writes to it; everybody may read."""

    def __init__(self, thrash_ms: int, time: AcceleratorTime | None = None) -> None:
        self.time = time or AcceleratorTime(0)
        self.registry = CollectorRegistry()
        self.start_ms: dict[str, int] = {}  # model digest -> longest start measured
        self.activations: dict[str, int] = {}
        self.activation_ms_last: dict[str, int] = {}
        self.activation_ms: dict[str, dict[str, deque[int]]] = {}  # endpoint -> tier it came from -> the newest
        self.attainment = Attainment()
        self._thrash_ms = thrash_ms
        self._coming: dict[str, Coming] = {}
        self._ready: dict[str, set[str]] = {}
        self._ready_for: dict[str, str] = {}  # ready replica -> its endpoint
        self._waiting_since_ms: dict[str, int] = {}
        self._drained: dict[str, tuple[tuple[Place, ...], int]] = {}  # victim -> its places, when its drain began
        self._freed: dict[Place, int] = {}  # place -> when the drain that freed it began
        self._places: dict[str, tuple[Place, ...]] = {}
        self._evictions: deque[Eviction] = deque(maxlen=EVICTIONS_MAX)
        own = self.registry

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(name, what, ["from_tier"], buckets=SECONDS, registry=own)

        self._swap = seconds("tidegate_swap_seconds", "Drain of a victim to readiness of its successor")
        self._reclaim = seconds("tidegate_reclaim_seconds", "Activation that had to make somebody leave")
        self._activation = seconds("tidegate_activation_seconds", "First waiting request (or command) to ready")
        self._commands = Counter("tidegate_core_commands", "Commands of the capacity core", ["kind"], registry=own)
        self._failures = Counter("tidegate_replica_failures", "Replicas that failed", registry=own)
        name, what = "tidegate_residency_configurations_refused", "Configurations that would have left the regions"
        self._residency_denied = Counter(name, what, ["endpoint"], registry=own)
        self._thrash = Gauge("tidegate_thrash_ratio", "Share of recent evictions undone soon after", registry=own)
        self._thrash.set_function(self.thrash_ratio)

    def residency_denied(self, endpoint: str) -> None:
        self._residency_denied.labels(endpoint).inc()

    def thrash_ratio(self) -> float:
        """Over the last `EVICTIONS_MAX` evictions; 0 when there were none."""
        return sum(e.undone for e in self._evictions) / len(self._evictions) if self._evictions else 0.0

    def event(self, event: plan.Event, now_ms: int) -> None:
        self.time.event(event, now_ms)
        match event:
            case plan.NodeJoined(_, replicas):
                for status in replicas:
                    self._replica(status, now_ms)
            case plan.NodeLost(node_id):
                for replica in [r for r, places in self._places.items() if places[:1] and places[0][0] == node_id]:
                    self._gone(replica)
            case plan.ReplicaChanged(status):
                self._replica(status, now_ms)
            case plan.DemandReported():
                self._demand(event, now_ms)
            case plan.EndpointRemoved(endpoint):
                self._forget_endpoint(endpoint)
            case _:
                pass  # the rest moves no meter

    def command(self, command: plan.Command, endpoint: str, now_ms: int) -> None:
        """`endpoint` is the one the command is about."""
        self.time.command(command)
        self._commands.labels(type(command).__name__.lower()).inc()
        match command:
            case Start() | Wake():
                places = tuple((command.node, accelerator) for accelerator in command.accelerators)
                drains = [self._freed.pop(place) for place in places if place in self._freed]
                model = command.deployment.model.digest if isinstance(command, Start) else ""
                tier = "disk" if isinstance(command, Start) else "host"
                self._coming[command.replica] = Coming(now_ms, tier, model, min(drains, default=None))
                self._places[command.replica] = places
                self._undo(endpoint, now_ms)
            case Drain():
                self._drained[command.replica] = (self._places.get(command.replica, ()), now_ms)
            case Resume():
                self._drained.pop(command.replica, None)
            case Sleep() | Stop():
                places, since_ms = self._drained.pop(command.replica, ((), now_ms))
                if places:
                    self._evictions.append(Eviction(endpoint, now_ms))
                    self._freed.update(dict.fromkeys(places, since_ms))
            case Route():
                pass

    def lent_seconds(self, now_ms: int) -> dict[str, float]:
        """Accelerator-seconds each owner has lent so far."""
        return self.time.lent_seconds(now_ms)

    def _demand(self, event: plan.DemandReported, now_ms: int) -> None:
        if event.queued and not self._ready.get(event.endpoint):
            self._waiting_since_ms.setdefault(event.endpoint, now_ms - event.oldest_wait_ms)
        elif not event.queued and not self._ready.get(event.endpoint):
            self._waiting_since_ms.pop(event.endpoint, None)

    def _replica(self, status: plan.ReplicaStatus, now_ms: int) -> None:
        if status.accelerators:
            self._places[status.replica] = tuple((status.node, accelerator) for accelerator in status.accelerators)
        match status.state:
            case ReplicaState.READY:
                self._ready.setdefault(status.endpoint, set()).add(status.replica)
                self._ready_for[status.replica] = status.endpoint
                self._arrived(status, now_ms)
            case ReplicaState.STARTING | ReplicaState.WAKING:
                pass
            case ReplicaState.FAILED:
                self._failures.inc()
                self._coming.pop(status.replica, None)
                self._unready(status.replica)
            case ReplicaState.STOPPED:
                self._unready(status.replica)
                self._gone(status.replica)
            case ReplicaState.DRAINING | ReplicaState.SLEEPING | ReplicaState.ASLEEP | ReplicaState.STOPPING:
                self._unready(status.replica)

    def _arrived(self, status: plan.ReplicaStatus, now_ms: int) -> None:
        coming = self._coming.pop(status.replica, None)
        waiting_ms = self._waiting_since_ms.pop(status.endpoint, None)
        if coming is None:
            return
        took_ms = now_ms - min(coming.command_ms, waiting_ms if waiting_ms is not None else coming.command_ms)
        self.activations[status.endpoint] = self.activations.get(status.endpoint, 0) + 1
        self.activation_ms_last[status.endpoint] = took_ms
        tiers = self.activation_ms.setdefault(status.endpoint, {})
        tiers.setdefault(coming.tier, deque(maxlen=ACTIVATIONS_KEPT)).append(took_ms)
        self._activation.labels(coming.tier).observe(took_ms / 1_000)
        if coming.drain_ms is not None:
            self._swap.labels(coming.tier).observe((now_ms - coming.drain_ms) / 1_000)
            self._reclaim.labels(coming.tier).observe(took_ms / 1_000)
        if coming.model:
            if len(self.start_ms) >= MODELS_MAX:
                del self.start_ms[next(iter(self.start_ms))]
            self.start_ms[coming.model] = max(self.start_ms.get(coming.model, 0), status.took_ms)

    def _undo(self, endpoint: str, now_ms: int) -> None:
        for eviction in reversed(self._evictions):
            if now_ms - eviction.at_ms > self._thrash_ms:
                return
            if eviction.endpoint == endpoint and not eviction.undone:
                eviction.undone = True
                return

    def _unready(self, replica: str) -> None:
        self._ready.get(self._ready_for.pop(replica, ""), set()).discard(replica)

    def _gone(self, replica: str) -> None:
        self._coming.pop(replica, None)
        self._drained.pop(replica, None)
        self._places.pop(replica, None)
        self._unready(replica)

    def _forget_endpoint(self, endpoint: str) -> None:
        self._ready.pop(endpoint, None)
        self._waiting_since_ms.pop(endpoint, None)
        self.activations.pop(endpoint, None)
        self.activation_ms_last.pop(endpoint, None)
        self.activation_ms.pop(endpoint, None)
        self.attainment.forget(endpoint)


def fleet_metrics(view: FleetView, nodes: int, gateways: int, lent_s: Mapping[str, float]) -> Iterator[Metric]:
    """What is read off the core's view at the instant of a scrape. `lent_s` is `Meters.lent_seconds`."""
    lent = CounterMetricFamily("tidegate_lent_accelerator_seconds", "Accelerator time lent", labels=["owner"])
    for owner, seconds in lent_s.items():
        lent.add_metric([owner], seconds)
    yield lent
    yield GaugeMetricFamily("tidegate_nodes", "Nodes with a live link", value=nodes)
    yield GaugeMetricFamily("tidegate_gateways", "Gateways with a live link", value=gateways)
    replicas = GaugeMetricFamily("tidegate_replicas", "Replicas by state", labels=["state"])
    for state, count in _count(ReplicaState, (r.state for e in view.endpoints for r in e.replicas)):
        replicas.add_metric([state], count)
    yield replicas
    endpoints = GaugeMetricFamily("tidegate_endpoints", "Endpoints by state", labels=["state"])
    for state, count in _count(EndpointState, (e.state for e in view.endpoints)):
        endpoints.add_metric([state], count)
    yield endpoints
    labels = ["node", "accelerator"]
    capacity = GaugeMetricFamily("tidegate_accelerator_memory_bytes", "What replicas may reserve", labels=labels)
    reserved = GaugeMetricFamily("tidegate_accelerator_reserved_bytes", "What they have reserved", labels=labels)
    for accelerator in view.accelerators:
        capacity.add_metric([accelerator.node, accelerator.accelerator], accelerator.capacity_bytes)
        reserved.add_metric([accelerator.node, accelerator.accelerator], accelerator.reserved_bytes)
    yield from (capacity, reserved)


def _count(kinds: type[ReplicaState] | type[EndpointState], states: Iterable[str]) -> list[tuple[str, int]]:
    counts = dict.fromkeys((kind.value for kind in kinds), 0)
    for state in states:
        counts[str(state)] += 1
    return list(counts.items())
