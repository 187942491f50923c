"""Which sleeping replicas to drop from a node's host memory so that another can sleep there."""

from collections import Counter

from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState
from tidegate.policy.eviction import Candidate, choose
from tidegate.policy.reconcile import regret
from tidegate.policy.reconcile.fleet import Fleet, Replica

S = ReplicaState
AWAKE = frozenset({S.STARTING, S.READY, S.DRAINING, S.WAKING})


def sleepers_to_drop(fleet: Fleet, node: str, need_bytes: int, worth_ms: float, now_ms: int) -> list[Replica] | None:
    """The least missed sleepers that make `need_bytes` free, counting what is already being dropped; none if that does.
    None where it cannot be done, or only at the cost of sleepers that would be missed more than `worth_ms`.
    """
    book, here = fleet.book, fleet.node_replicas[node]
    going, candidates = 0, []
    sharing = Counter(replica.holder for replica in here.values())
    for replica in here.values():
        # A copy that others share does not leave with it.
        nbytes = sum(book.host_bytes(one, node) for one in {replica.id, replica.holder} if sharing[one] < 2)
        if not nbytes:
            continue
        if replica.state is S.STOPPING:
            going += nbytes
        owner = fleet.endpoints.get(replica.endpoint)
        idle = owner is not None and not owner.activations and not owner.busy
        if replica.state is S.ASLEEP and owner is not None and (idle or owner.name in fleet.batch):
            missed_ms = regret.of_forgetting(fleet, owner, replica, now_ms)
            if missed_ms < worth_ms:
                candidates.append(Candidate(replica.id, nbytes, missed_ms))
    victims = choose(candidates, need_bytes - book.host_free(node) - going)
    return None if victims is None else [fleet.replicas[v.replica] for v in victims]


def wanted_free(fleet: Fleet, node: str) -> tuple[int, float]:
    """Room that lets every awake replica of the node but batch sleep at once, a quarter of host memory at most; and its
    worth: a victim that finds none copies its weights back or ends, and whoever takes its place waits about a wake
    longer.
    """
    # A copy that is there already needs no more room, however many share it.
    there = (r for r in fleet.node_replicas[node].values() if r.state in AWAKE and r.endpoint not in fleet.batch)
    awake = {r.holder: r.deployment for r in there if r.deployment}
    wanted = sum(max(0, d.host_bytes - d.one_copy * fleet.book.host_bytes(name, node)) for name, d in awake.items())
    need_bytes = min(wanted, fleet.book.host_capacity(node) // 4)
    if need_bytes <= fleet.book.host_free(node):
        return need_bytes, 0.0
    wakes = [fleet.costs.activation_ms(d.model.digest, node, Tier.HOST, d.model.weight_bytes) for d in awake.values()]
    return need_bytes, float(max(wakes, default=0))
