"""One endpoint at a time: compare what it must have with what it has, and plan the difference."""

from collections.abc import Iterable
from enum import Enum, auto

from tidegate.domain.endpoint import Mode
from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState
from tidegate.policy import placement, scaling
from tidegate.policy.book import Place
from tidegate.policy.eviction import Candidate
from tidegate.policy.reconcile import lifecycle, regret
from tidegate.policy.reconcile.fleet import CLASS_RANK, Activation, Endpoint, Fleet, Replica
from tidegate.policy.reconcile.waiting import leave_queue, queue_up

S = ReplicaState


# What a second replica may cost others, as a share of its own wake.
SPARE_REGRET_SHARE = 0.1
# Every busy neighbour on an accelerator takes its turn in each round of compute.
CROWD_MS = 100


# A waiting endpoint looks over the fleet at most this often; in between it is offered what comes free.
SEARCH_PAUSE_MS = 200


class Press(Enum):
    """How hard room is looked for: where nothing is lost, from replicas hardly missed, from idle ones, or busy ones
    too.
    """

    GENTLE = auto()
    SPARE = auto()
    NORMAL = auto()
    FORCE = auto()


def steer(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Bring one endpoint nearer to its desired state; what lacks room is queued in `fleet.waiting`."""
    fleet.unrouted[endpoint.name] = None
    deployment = endpoint.deployment
    if endpoint.removed or deployment.paused or endpoint.slept_by_hand:
        endpoint.required = 0
        _withdraw(fleet, endpoint, now_ms)
        return
    _drop_outdated(fleet, endpoint, now_ms)
    want = _want(fleet, endpoint, now_ms)
    endpoint.required = want.required
    _call_off_drains(fleet, endpoint, now_ms)
    live = endpoint.supply()
    planned = len(endpoint.activations)
    if live + planned > want.required:
        for activation in list(endpoint.activations.values())[: live + planned - want.required]:
            if activation.rule != "first_load":
                lifecycle.cancel(fleet, activation)
    if live >= want.required:
        endpoint.waiting_since_ms = None
    if live + len(endpoint.activations) < want.required:
        queue_up(fleet, endpoint, now_ms)
    else:
        leave_queue(fleet, endpoint)
    if fleet.settings.first_load and not endpoint.loaded_once and not live and not endpoint.activations:
        fleet.first_loads[endpoint.name] = None
    _give_back(fleet, endpoint, want, now_ms)
    if endpoint.retry_ms > now_ms:
        fleet.look_again(endpoint, endpoint.retry_ms)
    endpoint.calm_ready = _calm_ready(endpoint)
    fleet.count_idle(endpoint)


def absorb(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> bool:
    """The usual case, in constant time: replicas that serve take the demand as it is now, and nothing else is due.

    Only while a timer of the endpoint runs, which will see to keep-alive and scale-down.
    """
    deployment = endpoint.deployment
    required = -(-(endpoint.queued + endpoint.in_flight) // deployment.concurrency_target)
    if not 0 < endpoint.calm_ready >= required or endpoint.queued or endpoint.timer_ms is None:
        return False
    required = max(required, deployment.min_replicas, deployment.mode is Mode.DEDICATED)
    endpoint.required = required
    fleet.count_idle(endpoint)
    endpoint.window.push(now_ms, endpoint.required)
    return True


def _calm_ready(endpoint: Endpoint) -> int:
    """How many replicas serve, if all there are serve or sleep and nothing is planned, failing or to be undone."""
    if endpoint.activations or endpoint.wait_key is not None or endpoint.failures or endpoint.woken_until_ms:
        return 0
    ready = 0
    for replica in endpoint.replicas.values():
        if replica.state is S.READY and endpoint.current(replica):
            ready += 1
        elif replica.state is not S.ASLEEP:
            return 0
    return ready


def _want(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> scaling.Want:
    deployment, settings = endpoint.deployment, fleet.settings
    minimum = max(deployment.min_replicas, 1 if deployment.mode is Mode.DEDICATED else 0)
    if endpoint.woken_until_ms > now_ms:
        minimum = max(minimum, 1)
        fleet.look_again(endpoint, endpoint.woken_until_ms)
    if not endpoint.busy and _retry_failed(endpoint, settings.failures_max):
        minimum = max(minimum, 1)
    warm_until = endpoint.quiet_since_ms + settings.idle_ms_max
    want = scaling.decide(
        load=endpoint.queued + endpoint.in_flight,
        concurrency_target=deployment.concurrency_target,
        minimum=minimum,
        maximum=max(deployment.max_replicas, minimum),
        recent_peak=endpoint.window.peak(now_ms),
        keep_warm=endpoint.busy or warm_until > now_ms,
    )
    endpoint.window.push(now_ms, want.required)
    if want.retained > want.required or (endpoint.live_count() and not endpoint.busy):
        again = now_ms + settings.stable_window_ms // scaling.WINDOW_BUCKETS if want.retained > 1 else warm_until
        if again > now_ms:
            fleet.look_again(endpoint, again)
    return want


def _retry_failed(endpoint: Endpoint, failures_max: int) -> bool:
    """A FAILED endpoint is refused at the gateways, so no demand will ask for the slow retry: it asks for itself."""
    return endpoint.failures >= failures_max and endpoint.ready_count() == 0


def _withdraw(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Removed, paused or put to sleep by hand: take everything out of service."""
    rule = "removed" if endpoint.removed else "paused" if endpoint.deployment.paused else "manual_sleep"
    leave_queue(fleet, endpoint)
    fleet.first_loads.pop(endpoint.name, None)
    for activation in list(endpoint.activations.values()):
        lifecycle.cancel(fleet, activation)
    for replica in list(endpoint.replicas.values()):
        match replica.state:
            case S.READY:
                lifecycle.drain(fleet, replica, now_ms, rule, keep=not endpoint.removed, sticky=True)
            case S.DRAINING if endpoint.removed:
                replica.keep, replica.sticky = False, True
            case S.STARTING | S.WAKING | S.ASLEEP if endpoint.removed:
                lifecycle.stop(fleet, replica, now_ms, rule)


def _drop_outdated(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """A new generation: sleeping and starting replicas of the old one go at once, serving ones once it serves."""
    replaced = any(r.state is S.READY and endpoint.current(r) for r in endpoint.replicas.values())
    for replica in list(endpoint.replicas.values()):
        if endpoint.current(replica):
            continue
        match replica.state:
            case S.STARTING | S.WAKING | S.ASLEEP:
                lifecycle.stop(fleet, replica, now_ms, "outdated", (("generation", replica.generation),))
            case S.READY if replaced or not (endpoint.busy or endpoint.deployment.min_replicas):
                endpoint.loaded_once = endpoint.loaded_once and replaced
                lifecycle.drain(fleet, replica, now_ms, "outdated", keep=False, sticky=True)
            case S.DRAINING:
                replica.keep = False


def _call_off_drains(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Its own demand came back before the fence was complete: nothing was freed yet, so serve on."""
    for replica in list(endpoint.replicas.values()):
        if endpoint.live_count() >= endpoint.required:
            return
        if replica.state is S.DRAINING and replica.fences and not replica.sticky and endpoint.current(replica):
            lifecycle.resume(fleet, replica, now_ms, "demand_returned")


def _give_back(fleet: Fleet, endpoint: Endpoint, want: scaling.Want, now_ms: int) -> None:
    """Replicas beyond what may be retained sleep: surplus of a past peak, or quiet beyond the keep-alive."""
    ready = [r for r in endpoint.replicas.values() if r.state is S.READY and endpoint.current(r)]
    surplus = len(ready) - want.retained
    rule = "scale_down" if want.retained else "idle"
    for replica in ready[: max(0, surplus)]:
        if now_ms - replica.ready_ms >= fleet.settings.residency_ms_min:
            lifecycle.drain(fleet, replica, now_ms, rule, (("retained", want.retained),))
        else:
            fleet.look_again(endpoint, replica.ready_ms + fleet.settings.residency_ms_min)


# --- who waits --------------------------------------------------------------------------------------------------------


def serve_waiting(fleet: Fleet, touched: Iterable[str], now_ms: int) -> None:
    """Plan for endpoints that wait. Those just touched look everywhere; where room appeared, the first in the queue
    look there only: so an event's cost does not grow with the queue or the fleet.
    """
    for name in touched:
        endpoint = fleet.endpoints.get(name)
        if endpoint is None or endpoint.wait_key is None:
            continue
        if now_ms - endpoint.searched_ms >= SEARCH_PAUSE_MS or now_ms >= _bound_ms(fleet, endpoint):
            endpoint.searched_ms = now_ms
            _serve(fleet, endpoint, now_ms, None)
        else:
            fleet.look_again(endpoint, endpoint.searched_ms + SEARCH_PAUSE_MS)
    if fleet.room_nodes:
        nodes, fleet.room_nodes = fleet.room_nodes, {}
        for _, _, name in fleet.waiting[: fleet.settings.retries_per_event_max]:
            _serve(fleet, fleet.endpoints[name], now_ms, nodes)
    if not fleet.waiting and fleet.first_loads:
        _serve_first_load(fleet, now_ms)


def _bound_ms(fleet: Fleet, endpoint: Endpoint) -> int:
    assert endpoint.waiting_since_ms is not None
    return endpoint.waiting_since_ms + fleet.settings.wait_ms_max


def _serve(fleet: Fleet, endpoint: Endpoint, now_ms: int, nodes: dict[str, None] | None) -> None:
    """Plan what `endpoint` lacks, on `nodes` only if given; the rest is looked at again at its bound."""
    if endpoint.wait_key is None or endpoint.retry_ms > now_ms:
        return
    bound_ms = _bound_ms(fleet, endpoint)
    has_none = endpoint.supply() == 0
    rule = "demand" if has_none else "scale_out"
    if endpoint.deployment.mode is Mode.DEDICATED or not endpoint.busy:
        rule = "keep_replicas"
    while endpoint.supply() + len(endpoint.activations) < endpoint.required:
        if activate(fleet, endpoint, now_ms, rule, Press.NORMAL if has_none else Press.SPARE, nodes):
            continue
        if has_none and bound_ms <= now_ms and activate(fleet, endpoint, now_ms, "wait_bound", Press.FORCE, nodes):
            continue
        if nodes is None:
            fleet.look_again(endpoint, bound_ms if bound_ms > now_ms else now_ms + fleet.settings.wait_ms_max)
        return


def _serve_first_load(fleet: Fleet, now_ms: int) -> None:
    """Load a new endpoint once, so that its first request finds it in host memory. Never at anybody's cost."""
    loading = 0
    for name in list(fleet.first_loads)[: fleet.settings.first_loads_max]:
        endpoint = fleet.endpoints.get(name)
        if endpoint is None or endpoint.loaded_once or endpoint.failures >= fleet.settings.failures_max:
            del fleet.first_loads[name]
        elif endpoint.live_count() or endpoint.activations:
            loading += 1
        elif endpoint.retry_ms <= now_ms and not activate(fleet, endpoint, now_ms, "first_load", Press.GENTLE, None):
            fleet.first_loads[name] = fleet.first_loads.pop(name)  # to the end: another may fit


# --- finding room -----------------------------------------------------------------------------------------------------


def activate(
    fleet: Fleet, endpoint: Endpoint, now_ms: int, rule: str, press: Press, nodes: dict[str, None] | None
) -> bool:
    """Plan one more replica of `endpoint`: wake the one that comes up soonest, else start a new one. False: no room
    now.

    FORCE lets busy replicas drain for it (their requests finish first).
    """
    option = _best_wake(fleet, endpoint, now_ms, press, nodes)
    if option is None:
        option = _best_start(fleet, endpoint, now_ms, press, nodes)
    if option is None:
        return False
    chosen, sleeper = option
    if press is Press.SPARE and endpoint.waiting_since_ms is not None:
        # An overload is expected to last as long again as it has lasted: no help that comes up later than that.
        worth_from_ms = endpoint.waiting_since_ms + chosen.ready_ms
        if worth_from_ms > now_ms:
            fleet.look_again(endpoint, worth_from_ms)
            return False
    node = chosen.places[0][0]
    inputs = (
        ("queued", endpoint.queued),
        ("in_flight", endpoint.in_flight),
        ("ready_ms", chosen.ready_ms),
        ("regret_ms", round(chosen.regret_ms, 1)),
    )
    activation = Activation(
        id=fleet.new_id(endpoint.name, now_ms),
        endpoint=endpoint.name,
        node=node,
        places=chosen.places,
        bytes_each=endpoint.deployment.accelerator_bytes,
        wake=sleeper,
        rule=rule,
        inputs=inputs,
        planned_ms=now_ms,
    )
    lifecycle.begin(fleet, activation, now_ms)
    for victim_id in chosen.victims:
        victim = fleet.replicas[victim_id]
        why = (("for", endpoint.name), ("regret_ms", round(chosen.regret_ms, 1)))
        owner = fleet.endpoints[victim.endpoint]
        sticky = press is Press.FORCE
        keep = owner.current(victim)
        lifecycle.drain(fleet, victim, now_ms, "evict_busy" if sticky else "evict", why, keep=keep, sticky=sticky)
    return True


Option = tuple[placement.Placement, Replica | None]


def _best_wake(
    fleet: Fleet, endpoint: Endpoint, now_ms: int, press: Press, nodes: dict[str, None] | None
) -> Option | None:
    planned = {a.wake.id for a in endpoint.activations.values() if a.wake is not None}
    best: Option | None = None
    for replica in endpoint.replicas.values():
        if replica.state is not S.ASLEEP or replica.id in planned or not endpoint.current(replica):
            continue
        if nodes is not None and replica.node not in nodes:
            continue
        places = replica.places
        if endpoint.deployment.movable:
            places = tuple((replica.node, a.id) for a in fleet.nodes[replica.node].accelerators)
        chosen = _on_node(fleet, endpoint, places, Tier.HOST, now_ms, press)
        if chosen is not None and (best is None or chosen.score_ms < best[0].score_ms):
            best = (chosen, replica)
    return best


def _best_start(
    fleet: Fleet, endpoint: Endpoint, now_ms: int, press: Press, only: dict[str, None] | None
) -> Option | None:
    """Nodes of the home region first; at most `nodes_examined_max` a call, beginning further on at each attempt."""
    left = fleet.settings.nodes_examined_max
    for region in endpoint.deployment.regions:
        nodes = fleet.region_nodes.get(region, [])
        if only is not None:
            names = [n for n in only if n in fleet.nodes and fleet.nodes[n].region == region][:left]
        else:
            names = [nodes[(endpoint.attempts + step) % len(nodes)] for step in range(min(len(nodes), left))]
            endpoint.attempts += len(names)
        left -= len(names)
        best: Option | None = None
        for name in names:
            places = tuple((name, a.id) for a in fleet.nodes[name].accelerators)
            chosen = _on_node(fleet, endpoint, places, Tier.DISK, now_ms, press)
            if chosen is not None and (best is None or chosen.score_ms < best[0].score_ms):
                best = (chosen, None)
        if best is not None:
            return best
    return None


def _on_node(
    fleet: Fleet, endpoint: Endpoint, places: tuple[Place, ...], tier: Tier, now_ms: int, press: Press
) -> placement.Placement | None:
    deployment = endpoint.deployment
    if len(places) < deployment.accelerators_per_replica:
        return None
    node = places[0][0]
    if press is Press.GENTLE and fleet.book.host_free(node) < deployment.host_bytes:
        return None
    ready_ms = fleet.costs.activation_ms(deployment.model.digest, node, tier, deployment.model.weight_bytes)
    offers = []
    for place in places:
        account = fleet.book.accounts[place]
        if press is not Press.FORCE and account.headroom + fleet.idle_bytes[place] < deployment.accelerator_bytes:
            continue
        residents = fleet.residents[place].values()
        if any(r.endpoint == endpoint.name and endpoint.live(r) for r in residents):
            continue  # a second replica beside the first shares its compute: slots without speed
        headroom = account.headroom
        if press is not Press.FORCE:  # a busy replica's leaving is not to be counted on yet
            headroom -= sum(fleet.book.bytes_each(r.id) for r in residents if r.state is S.DRAINING and r.sticky)
        need = deployment.accelerator_bytes - headroom
        candidates = _candidates(fleet, endpoint, place, now_ms, press) if need > 0 else ()
        line_ms = _link_ms(fleet, place, now_ms)
        offers.append(placement.Offer(place, headroom, account.free, candidates, ready_ms + line_ms))
    settings = fleet.settings
    chosen = placement.pick(
        offers, deployment.accelerator_bytes, deployment.accelerators_per_replica, settings.drain_ms
    )
    if press is Press.SPARE and chosen is not None:
        # One more replica for an endpoint that is served already, however overloaded, is not worth another's absence:
        # else one endpoint's storm empties the fleet of everybody else.
        wake_ms = fleet.costs.activation_ms(deployment.model.digest, node, Tier.HOST, deployment.model.weight_bytes)
        return chosen if chosen.regret_ms <= SPARE_REGRET_SHARE * wake_ms else None
    return chosen


def _link_ms(fleet: Fleet, place: Place, now_ms: int) -> int:
    """Weights on their way to `place` share its link, and busy neighbours its compute: both delay the next."""
    left = 0
    for replica in fleet.residents[place].values():
        owner = fleet.endpoints.get(replica.endpoint)
        if owner is not None and owner.busy:
            left += CROWD_MS
        if replica.state is S.WAKING and replica.deployment is not None:
            model = replica.deployment.model
            whole = fleet.costs.activation_ms(model.digest, replica.node, Tier.HOST, model.weight_bytes)
            left += max(0, whole - (now_ms - replica.since_ms))
    return left


def _candidates(fleet: Fleet, taker: Endpoint, place: Place, now_ms: int, press: Press) -> list[Candidate]:
    """Who may leave `place` for `taker`. The one list of who is safe from eviction, see `_evictable`."""
    found: list[Candidate] = []
    if fleet.settings.victim_order == "none":
        return found
    for replica in fleet.residents[place].values():
        owner = fleet.endpoints.get(replica.endpoint)
        if owner is not None and _evictable(fleet, taker, owner, replica, now_ms, press):
            leaving_ms = regret.of_leaving(fleet, owner, replica, now_ms)
            found.append(Candidate(replica.id, fleet.book.bytes_each(replica.id), leaving_ms))
    return found


def _evictable(fleet: Fleet, taker: Endpoint, owner: Endpoint, replica: Replica, now_ms: int, press: Press) -> bool:
    """Never: what is not READY (loading, draining), dedicated, below `min_replicas`, or in its minimum residency.
    Busy ones only where FORCE says so and the owner's class is not above the taker's. Batch always, and it evicts
    nobody.
    """
    mode = owner.deployment.mode
    if replica.state is not S.READY or mode is Mode.DEDICATED:
        return False
    if mode is Mode.BATCH:
        return taker.deployment.mode is not Mode.BATCH
    if taker.deployment.mode is Mode.BATCH:
        return False
    if not owner.current(replica):  # an outdated replica makes room for its own successor only
        return owner is taker
    if owner is taker or owner.ready_count() <= owner.deployment.min_replicas:
        return False
    settled_ms = replica.ready_ms + fleet.settings.residency_ms_min
    if settled_ms > now_ms:
        fleet.look_again(taker, settled_ms)
        return False
    if owner.ready_count() > owner.required:
        return True
    return press is Press.FORCE and CLASS_RANK[mode] >= CLASS_RANK[taker.deployment.mode]
