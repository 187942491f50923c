"""What gateways and people are told: the Route of an endpoint, and the view of the whole."""

from tidegate.domain.endpoint import EndpointState
from tidegate.domain.fleet import Node, Tier
from tidegate.domain.plan import Route, Target
from tidegate.domain.replica import COMING, ReplicaState
from tidegate.policy.book import Account
from tidegate.policy.reconcile.fleet import Endpoint, Fleet, Replica
from tidegate.policy.view import AcceleratorView, EndpointView, FleetView, HostView, ReplicaView

S = ReplicaState


def announce(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Issue a Route if what it says changed. Versions never fall behind the clock, so a restarted core's routes win."""
    targets = _targets(fleet, endpoint)
    endpoint.stranded = _stranded(fleet, endpoint, now_ms)
    state, reason = _state(fleet, endpoint, targets)
    endpoint.eta_ms = 0 if targets else _eta_ms(fleet, endpoint, now_ms)
    refusal = "residency_denied" if endpoint.stranded and not targets else ""
    route = (state, targets, reason, refusal)
    if route == endpoint.route:
        return
    endpoint.route = route
    fleet.route_version = max(fleet.route_version + 1, now_ms)
    fleet.out.append(Route(endpoint.name, fleet.route_version, state, targets, endpoint.eta_ms, reason, refusal))


def _targets(fleet: Fleet, endpoint: Endpoint) -> tuple[Target, ...]:
    if endpoint.removed or endpoint.deployment.paused:
        return ()
    own, nodes, ready = endpoint.deployment, fleet.nodes, [r for r in endpoint.replicas.values() if r.state is S.READY]
    return tuple([Target(r.id, r.address, (r.deployment or own).slots, nodes[r.node].region) for r in ready])


def _state(fleet: Fleet, endpoint: Endpoint, targets: tuple[Target, ...]) -> tuple[EndpointState, str]:
    """The state shown, and why, in words that are safe for a tenant."""
    failing = endpoint.failures >= fleet.settings.failures_max
    if endpoint.removed:
        return EndpointState.DRAINING, "endpoint removed"
    if endpoint.deployment.paused:
        return EndpointState.PAUSED, "paused by its owner"
    if targets:
        return (EndpointState.DEGRADED, endpoint.failed_reason) if failing else (EndpointState.READY, "")
    if endpoint.stranded:
        return EndpointState.FAILED, f"no node in {', '.join(endpoint.deployment.regions)}; it may not run elsewhere"
    if failing:
        return EndpointState.FAILED, endpoint.failed_reason
    states = {r.state for r in endpoint.replicas.values()}
    if S.WAKING in states:
        return EndpointState.WAKING, "waking from host memory"
    if S.STARTING in states:
        notes = [r.note for r in endpoint.replicas.values() if r.state is S.STARTING and r.note]
        return EndpointState.LOADING, (notes or ["loading from disk"])[0]
    if endpoint.activations:
        waking = any(a.wake is not None for a in endpoint.activations.values())
        return (EndpointState.WAKING if waking else EndpointState.LOADING), "memory is being freed for it"
    if endpoint.wait_key is not None:
        state = EndpointState.WAKING if S.ASLEEP in states else EndpointState.LOADING
        if endpoint.failures:
            return state, f"next attempt soon after: {endpoint.failed_reason}"
        return state, _why_waiting(fleet, endpoint)
    if S.DRAINING in states:
        return EndpointState.DRAINING, "draining"
    if not endpoint.loaded_once and not endpoint.replicas:
        again = f"next attempt soon after: {endpoint.failed_reason}"
        return EndpointState.CREATING, again if endpoint.failures else "not loaded yet"
    return EndpointState.ASLEEP, "asleep: wakes on the next request"


def _stranded(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> bool:
    """There are nodes, but for `stranded_ms` none where it may run: until then one may only be starting again."""
    regions = endpoint.deployment.regions
    if not fleet.nodes or any(fleet.region_nodes.get(region) for region in regions):
        return False
    due_ms = max(fleet.empty_since_ms.get(region, fleet.began_ms) for region in regions) + fleet.settings.stranded_ms
    if due_ms > now_ms:
        fleet.look_again(endpoint, due_ms)
    return due_ms <= now_ms


def _why_waiting(fleet: Fleet, endpoint: Endpoint) -> str:
    deployment = endpoint.deployment
    if not any(fleet.region_nodes.get(region) for region in deployment.regions):
        return f"no node in {', '.join(deployment.regions)}"
    largest = max((a.capacity for a in fleet.book.accounts.values()), default=0) if len(fleet.nodes) == 1 else 0
    if 0 < largest < deployment.accelerator_bytes:
        return f"no accelerator is large enough: {deployment.accelerator_bytes} bytes needed, {largest} there"
    return "every accelerator is busy"


def _eta_ms(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> int:
    """Until capacity is there: what is left of a step under way, else a whole activation behind what it waits for."""
    best: int | None = None
    for replica in endpoint.replicas.values():
        if replica.state in COMING:
            tier = Tier.HOST if replica.state is S.WAKING else replica.cold
            left = max(1, _activation_ms(fleet, endpoint, replica.node, tier) - (now_ms - replica.since_ms))
            best = left if best is None else min(best, left)
    if best is not None:
        return best
    for activation in endpoint.activations.values():
        cold = fleet.cold_tier(endpoint.deployment.model, activation.node)
        tier = Tier.HOST if activation.wake is not None else cold
        return fleet.settings.drain_ms + _activation_ms(fleet, endpoint, activation.node, tier)
    for replica in endpoint.replicas.values():
        if replica.state is S.ASLEEP:
            waits = fleet.settings.wait_ms_max if endpoint.wait_key is not None else 0
            return waits + _activation_ms(fleet, endpoint, replica.node, Tier.HOST)
    paused_ms = max(0, endpoint.retry_ms - now_ms)
    return paused_ms + _activation_ms(fleet, endpoint, "", fleet.cold_tier(endpoint.deployment.model, *fleet.nodes))


def _activation_ms(fleet: Fleet, endpoint: Endpoint, node: str, tier: Tier) -> int:
    model = endpoint.deployment.model
    return fleet.costs.activation_ms(model.digest, node, tier, model.weight_bytes)


# --- the view ---------------------------------------------------------------------------------------------------------


def view(fleet: Fleet) -> FleetView:
    """A full pass over the fleet: for people and metrics, never for a decision."""
    return FleetView(
        endpoints=tuple(_endpoint_view(fleet, e) for e in fleet.endpoints.values()),
        accelerators=tuple(_accelerator_view(fleet, account) for account in fleet.book.accounts.values()),
        hosts=tuple(_host_view(fleet, node) for node in fleet.nodes.values()),
        gateways=tuple(fleet.gateways),
        waiting=tuple(name for _, _, name in fleet.waiting),
    )


def _accelerator_view(fleet: Fleet, account: Account) -> AcceleratorView:
    node, accelerator = account.place
    residents, region = tuple(fleet.residents[account.place]), fleet.nodes[node].region
    return AcceleratorView(node, accelerator, region, account.capacity, account.reserved, residents)


def _host_view(fleet: Fleet, node: Node) -> HostView:
    capacity, on_disk = node.host_memory_bytes, tuple(sorted(fleet.on_disk.get(node.id, ())))
    return HostView(node.id, node.region, capacity, capacity - fleet.book.host_free(node.id), on_disk)


def _endpoint_view(fleet: Fleet, endpoint: Endpoint) -> EndpointView:
    targets = _targets(fleet, endpoint)
    state, reason = _state(fleet, endpoint, targets)
    if state is EndpointState.READY and not endpoint.busy:
        state = EndpointState.IDLE
    return EndpointView(
        endpoint=endpoint.name,
        mode=endpoint.deployment.mode,
        state=state,
        tier=_tier(fleet, endpoint),
        replicas=tuple(_replica_view(fleet, r) for r in endpoint.replicas.values()),
        required=endpoint.required,
        queued=endpoint.queued,
        in_flight=endpoint.in_flight,
        eta_ms=endpoint.eta_ms,
        reason=reason,
        activation_ms=endpoint.activation_ms,
        failures=endpoint.failures,
    )


def _tier(fleet: Fleet, endpoint: Endpoint) -> Tier:
    states = {r.state for r in endpoint.replicas.values()}
    if states & {S.READY, S.DRAINING}:
        return Tier.ACCELERATOR
    if states & {S.ASLEEP, S.WAKING, S.SLEEPING}:
        return Tier.HOST
    return fleet.cold_tier(endpoint.deployment.model, *fleet.nodes)


def _replica_view(fleet: Fleet, replica: Replica) -> ReplicaView:
    id, node, book = replica.id, replica.node, fleet.book
    accelerators = tuple(accelerator for _, accelerator in replica.places)
    nbytes, host_bytes = book.bytes_each(id) if book.holds(id) else 0, book.host_bytes(id, node)
    state, generation = replica.state, replica.generation
    return ReplicaView(id, node, accelerators, state, generation, nbytes, host_bytes, replica.since_ms)
