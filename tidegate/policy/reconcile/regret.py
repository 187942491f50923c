"""What it would cost to let a replica go, in milliseconds of weighted waiting: the one measure evictions are ranked
by.
"""

from tidegate.domain.endpoint import Mode
from tidegate.domain.fleet import Tier
from tidegate.policy.forecast import BURST_MS
from tidegate.policy.reconcile.fleet import Endpoint, Fleet, Replica

SLO_TTFT_MS = 2_000
SHORTEST_MS = 1_000
# A probability over horizons of a second and more is good for this long, unless a request came.
P_STALE_MS = 250
# Batch is rated at half the price and nobody waits for it: ten ms of its work weigh as one of a tenant's wait.
BATCH_WORTH_PER_MS = 0.1
# A wait shorter than a twentieth of the usual SLO moves no p99 that is promised within 5 %; longer ones weigh the more.
SMALL_MS = SLO_TTFT_MS / 20
# A burst is taken to go on as it began for this long at most.
BURSTS_MAX = 4.0
# A replica beside another one of its endpoint is missed this much: demand finds the other first.
SPARE_SHARE = 0.1


def of_leaving(fleet: Fleet, owner: Endpoint, replica: Replica, now_ms: int) -> float:
    """Of taking the accelerator from `replica`: it drops to host memory if it fits there, else to disk."""
    if fleet.settings.victim_order == "lru" and owner.deployment.mode is not Mode.BATCH:
        return 1e9 / (1 + now_ms - owner.quiet_since_ms)
    book, node = fleet.book, replica.node
    room = owner.deployment.host_bytes <= book.host_free(node) + book.host_bytes(replica.holder, node)
    back_ms = _return_ms(fleet, owner, replica.node, Tier.HOST if room else Tier.DISK)
    if owner.in_flight:  # what runs ends first, and what comes meanwhile waits for that, too
        back_ms += owner.service.mean_ms
    share = SPARE_SHARE if owner.live_count() > max(owner.required, 1) else 1.0
    return share * _missed(fleet, owner, back_ms, now_ms)


def of_absence(fleet: Fleet, owner: Endpoint, node: str, tier: Tier, now_ms: int) -> float:
    """Of staying on `tier` of `node` until the next request: what bringing it up ahead of that one saves."""
    return _missed(fleet, owner, _return_ms(fleet, owner, node, tier), now_ms)


def of_forgetting(fleet: Fleet, owner: Endpoint, replica: Replica, now_ms: int) -> float:
    """Of dropping a sleeping replica from host memory to disk."""
    dearer_ms = _return_ms(fleet, owner, replica.node, Tier.DISK) - _return_ms(fleet, owner, replica.node, Tier.HOST)
    spare = any(r is not replica and owner.current(r) for r in owner.replicas.values())
    return (SPARE_SHARE if spare else 1.0) * _missed(fleet, owner, max(dearer_ms, 0.0), now_ms)


def lend_after_ms(fleet: Fleet, owner: Endpoint, node: str) -> float:
    """How long an idle replica keeps its place from batch work: as its past gaps advise, within the guard rail of ski-
    rental, whose instant is when what batch forwent equals what coming back will cost.
    """
    back_ms = _back_ms(fleet, owner, node)
    return owner.keep.instant(owner.history.keep_ms(back_ms), back_ms)


def gap_ended(fleet: Fleet, owner: Endpoint, now_ms: int) -> None:
    """A request came: what lending would have cost in the gap before it, whether or not there was a taker."""
    gap_ms = owner.history.quiet_ms(now_ms)
    if not gap_ms:
        return
    node = next((r.node for r in owner.replicas.values()), "")
    back_ms = _back_ms(fleet, owner, node)
    after_ms = back_ms if gap_ms < SHORTEST_MS else owner.keep.instant(owner.history.keep_ms(back_ms), back_ms)
    owner.keep.ended(gap_ms, after_ms, back_ms)


def _back_ms(fleet: Fleet, owner: Endpoint, node: str) -> float:
    """The instant of ski-rental: what batch forwent by then equals what the wait of the owner's next request weighs."""
    back_ms = _return_ms(fleet, owner, node, Tier.HOST)
    return back_ms / BATCH_WORTH_PER_MS * max(1.0, back_ms / SMALL_MS)


def _missed(fleet: Fleet, owner: Endpoint, back_ms: float, now_ms: int) -> float:
    """How much is waited for a return of `back_ms`, by as many requests as it makes late: the one that asks for it,
    and of what its burst brings meanwhile the more, the nearer the return comes to the SLO. Far from it, waiting
    together costs no more than one.
    """
    brought = (max(owner.history.burst, 1.0) - 1.0) * min(back_ms / BURST_MS, BURSTS_MAX)
    late = 1.0 + brought * min(back_ms / SLO_TTFT_MS, 1.0) ** 2
    p_needed = 0.0 if owner.deployment.mode is Mode.BATCH else _p_needed(fleet, owner, now_ms)  # nobody waits for it
    return p_needed * back_ms * late


def _p_needed(fleet: Fleet, owner: Endpoint, now_ms: int) -> float:
    if owner.busy and owner.live_count() <= owner.required:
        return 1.0
    at_ms, known = owner.p_needed
    if 0 <= now_ms - at_ms < P_STALE_MS and owner.history.last_ms is not None and owner.history.last_ms <= at_ms:
        return known
    known = owner.history.needed_soon(now_ms, SHORTEST_MS, fleet.settings.horizon_ms)
    owner.p_needed = (now_ms, known)
    return known


def _return_ms(fleet: Fleet, owner: Endpoint, node: str, tier: Tier) -> float:
    model = owner.deployment.model
    cost_ms = fleet.costs.activation_ms(model.digest, node, tier, model.weight_bytes)
    return cost_ms * SLO_TTFT_MS / max(owner.deployment.slo.ttft_ms, 1)
