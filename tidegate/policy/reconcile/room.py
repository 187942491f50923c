"""Finding room for one more replica: where it goes, who has to leave for it, and who must never leave."""

from enum import Enum, auto

from tidegate.domain.endpoint import Mode
from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState
from tidegate.policy import placement
from tidegate.policy.book import Place
from tidegate.policy.eviction import Candidate
from tidegate.policy.reconcile import lifecycle, regret
from tidegate.policy.reconcile.fleet import ABORTABLE, CLASS_RANK, Activation, Endpoint, Fleet, Replica

S = ReplicaState

# What a second replica may cost others where it rescues nobody, as a share of its own wake.
SPARE_REGRET_SHARE = 0.1
# Regret is what is missed in about a second; one more replica stays for a stable window at least.
SPARE_STAYS_S = 60
# A swap ahead of demand must save this many times what its victims will be missed: both are only expected.
AHEAD_WORTH = 2.0
# Every neighbour on an accelerator takes its turn in each round of compute: one with all the requests that its
# concurrency target allows counts as a quarter of the usual SLO, others by their share of them in the last minute.
CROWD_MS = 500


class Press(Enum):
    """How hard room is looked for: where nothing is lost, from replicas hardly missed, from idle ones, or busy ones
    too; or ahead of demand, from those missed far less.
    """

    GENTLE = auto()
    SPARE = auto()
    NORMAL = auto()
    FORCE = auto()
    AHEAD = auto()


Nodes = dict[str, None] | None
"""Where to look; None: everywhere."""


def activate(
    fleet: Fleet, endpoint: Endpoint, now_ms: int, rule: str, press: Press, nodes: Nodes, seen: lifecycle.Inputs = ()
) -> bool:
    """Plan one more replica of `endpoint`: wake the one that comes up soonest, else start a new one. False: no room
    now.

    FORCE lets busy replicas drain for it (their requests finish first).
    """
    option = _best_wake(fleet, endpoint, now_ms, press, nodes)
    if option is None and (endpoint.waits_for_wake() or (press is Press.AHEAD and endpoint.replicas)):
        return False  # a wake, now or in a moment, is far sooner than a start
    if option is None:
        option = _best_start(fleet, endpoint, now_ms, press, nodes)
    if option is None:
        return False
    chosen, sleeper = option
    node = chosen.places[0][0]
    inputs = (
        *seen,
        ("queued", endpoint.queued),
        ("in_flight", endpoint.in_flight),
        ("required", endpoint.required),
        ("served_per_s", round(endpoint.service.served_per_s or 0.0, 2)),
        ("ready_ms", chosen.ready_ms),
        ("regret_ms", round(chosen.regret_ms, 1)),
    )
    name, bytes_each = endpoint.name, endpoint.deployment.accelerator_bytes
    plan = Activation(fleet.new_id(name, now_ms), name, node, chosen.places, bytes_each, sleeper, rule, inputs)
    lifecycle.begin(fleet, plan, now_ms)
    for victim_id in chosen.victims:
        victim = fleet.replicas[victim_id]
        why = (("for", endpoint.name), ("regret_ms", round(chosen.regret_ms, 1)))
        owner = fleet.endpoints[victim.endpoint]
        sticky = press is Press.FORCE
        how = "outdated" if owner is endpoint else "evict_busy" if sticky else "evict"
        lifecycle.drain(fleet, victim, now_ms, how, why, keep=owner.current(victim), sticky=sticky)
    return True


Option = tuple[placement.Placement, Replica | None]


def _best_wake(fleet: Fleet, endpoint: Endpoint, now_ms: int, press: Press, nodes: Nodes) -> Option | None:
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


def _best_start(fleet: Fleet, endpoint: Endpoint, now_ms: int, press: Press, only: Nodes) -> Option | None:
    """Nodes of the home region first, and the node where its last start failed after all others; at most
    `nodes_examined_max` a call, beginning further on at each attempt.
    """
    left = fleet.settings.nodes_examined_max
    shunned = endpoint.failed_on if now_ms < endpoint.retry_ms + fleet.settings.failure_forget_ms else ""
    best: tuple[tuple[bool, int, float], placement.Placement] | None = None
    for rank, region in enumerate(endpoint.deployment.regions):
        nodes = fleet.region_nodes.get(region, [])
        if only is not None:
            names = [n for n in only if n in fleet.nodes and fleet.nodes[n].region == region][:left]
        else:
            names = [nodes[(endpoint.attempts + step) % len(nodes)] for step in range(min(len(nodes), left))]
            endpoint.attempts += len(names)
        left -= len(names)
        for name in names:
            places = tuple((name, a.id) for a in fleet.nodes[name].accelerators)
            tier = fleet.cold_tier(endpoint.deployment.model, name)
            chosen = _on_node(fleet, endpoint, places, tier, now_ms, press)
            if chosen is not None:
                option = (name == shunned, rank, chosen.score_ms), chosen
                best = option if best is None or option[0] < best[0] else best
        if best is not None and not best[0][0]:
            break
    return (best[1], None) if best is not None else None


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
    fitting, known = [], dict[str, Candidate | None]()
    for place in places:
        account = fleet.book.accounts[place]
        may_leave = 0 if fleet.settings.victim_order == "none" else fleet.idle_bytes[place]
        headroom = account.headroom
        if press is not Press.FORCE and headroom + may_leave < deployment.accelerator_bytes:
            continue
        residents = fleet.residents[place].values()
        if any(r.endpoint == endpoint.name and endpoint.live(r) for r in residents):
            continue  # a second replica beside the first shares its compute: slots without speed
        if deployment.mode is Mode.BATCH and any(fleet.works(r) for r in residents):
            continue
        if press is not Press.FORCE:  # a busy replica's leaving is not to be counted on yet
            headroom -= sum(fleet.book.bytes_each(r.id) for r in residents if r.state is S.DRAINING and r.sticky)
        need = deployment.accelerator_bytes - headroom
        candidates = _candidates(fleet, endpoint, place, now_ms, press, known) if need > 0 else ()
        if need <= sum([c.nbytes for c in candidates]):  # else it would not do if all of them left
            fitting.append((place, headroom, account.free, candidates))
    count, bytes_each = deployment.accelerators_per_replica, deployment.accelerator_bytes
    if len(fitting) < count:
        return None
    offers = [placement.Offer(*fits, *_delays_ms(fleet, fits[0], ready_ms, now_ms)) for fits in fitting]
    chosen = placement.pick(offers, bytes_each, count, fleet.settings.drain_ms)
    if press is Press.SPARE and chosen is not None and deployment.mode is not Mode.BATCH:  # what is lent is lent
        # One more replica for an endpoint that is served already is worth the requests it can still serve in time, and
        # no more: else one endpoint's storm empties the fleet of everybody else.
        wake_ms = fleet.costs.activation_ms(deployment.model.digest, node, Tier.HOST, deployment.model.weight_bytes)
        worth_ms = SPARE_REGRET_SHARE * wake_ms + _rescued(endpoint, chosen.ready_ms) * regret.SLO_TTFT_MS
        return chosen if chosen.regret_ms * SPARE_STAYS_S <= worth_ms else None
    if press is Press.AHEAD and chosen is not None:
        worth_ms = regret.of_absence(fleet, endpoint, node, tier, now_ms) / AHEAD_WORTH
        return chosen if chosen.regret_ms <= worth_ms else None
    return chosen


def _rescued(endpoint: Endpoint, ready_ms: int) -> int:
    """How many waiting requests one more replica could serve within the SLO: those beyond what present ones take, as
    many as it takes itself. None if it comes later than that, nor once the oldest has outwaited the SLO: behind it,
    all are late whoever comes.
    """
    deployment = endpoint.deployment
    if ready_ms > deployment.slo.ttft_ms or any(
        d.oldest_wait_ms > deployment.slo.ttft_ms for d in endpoint.demand.values()
    ):
        return 0
    over = endpoint.load - endpoint.supply() * deployment.concurrency_target
    return max(0, min(over, deployment.concurrency_target))


def _delays_ms(fleet: Fleet, place: Place, ready_ms: int, now_ms: int) -> tuple[int, dict[str, int]]:
    """`ready_ms` and what is left of weights on their way to `place`, which share its link; and what each replica there
    takes of its compute, by its load, in whole ms. Batch takes none: it stands still while others work.
    """
    crowd_ms = dict[str, int]()
    for replica in fleet.residents[place].values():
        owner = fleet.endpoints.get(replica.endpoint)
        if owner is not None and owner.deployment.mode is not Mode.BATCH:
            at_once = owner.service.at_once(now_ms, owner.in_flight) / max(1, owner.ready_count())
            crowd_ms[replica.id] = round(CROWD_MS * min(at_once / owner.deployment.concurrency_target, 1.0))
        if replica.state is S.WAKING and replica.deployment is not None:
            model = replica.deployment.model
            whole = fleet.costs.activation_ms(model.digest, replica.node, Tier.HOST, model.weight_bytes)
            ready_ms += max(0, whole - (now_ms - replica.since_ms))
    return ready_ms, crowd_ms


def _candidates(
    fleet: Fleet, taker: Endpoint, place: Place, now_ms: int, press: Press, known: dict[str, Candidate | None]
) -> list[Candidate]:
    """Who may leave `place` for `taker`. The one list of who is safe from eviction, see `_evictable`. `known` spares a
    replica that spans several accelerators from being asked about on each of them.
    """
    found: list[Candidate] = []
    if fleet.settings.victim_order == "none":
        return found
    for replica in fleet.residents[place].values():
        if replica.id not in known:
            owner = fleet.endpoints.get(replica.endpoint)
            may = owner is not None and _evictable(fleet, taker, owner, replica, now_ms, press)
            leaving_ms = regret.of_leaving(fleet, owner, replica, now_ms) if owner is not None and may else 0.0
            known[replica.id] = Candidate(replica.id, fleet.book.bytes_each(replica.id), leaving_ms) if may else None
        candidate = known[replica.id]
        if candidate is not None:
            found.append(candidate)
    return found


def _evictable(fleet: Fleet, taker: Endpoint, owner: Endpoint, replica: Replica, now_ms: int, press: Press) -> bool:
    """Never: what is not READY (loading, draining), within the `floor`, or in its minimum residency.
    Busy ones only where FORCE says so and the owner's class is not above the taker's. Batch always, ready or on its
    way; and batch itself takes only what was idle for so long that lending it is worth the way back.
    """
    mode = owner.deployment.mode
    if mode is Mode.BATCH:
        return replica.state in ABORTABLE and taker.deployment.mode is not Mode.BATCH
    if replica.state is not S.READY:
        return False
    if not owner.current(replica):  # an outdated replica makes room for its own successor only
        return owner is taker
    if owner is taker or owner.ready_count() <= owner.floor:
        return False
    settled_ms = replica.ready_ms + fleet.settings.residency_ms_min
    if settled_ms > now_ms:
        fleet.look_again(taker, settled_ms)
        return False
    spare = owner.ready_count() > owner.required
    if spare and taker.deployment.mode is Mode.BATCH:  # lent once its owner has been quiet for long enough
        lent_ms = owner.quiet_since_ms + int(regret.lend_after_ms(fleet, owner, replica.node))
        if lent_ms > now_ms:
            fleet.look_again(taker, lent_ms)
        return lent_ms <= now_ms and not owner.busy
    if spare:
        return True
    return press is Press.FORCE and CLASS_RANK[mode] >= CLASS_RANK[taker.deployment.mode]
