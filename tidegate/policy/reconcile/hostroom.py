"""Which sleeping replicas to drop from a node's host memory so that another can sleep there."""

from tidegate.domain.replica import ReplicaState
from tidegate.policy.eviction import Candidate, choose
from tidegate.policy.reconcile import regret
from tidegate.policy.reconcile.fleet import Fleet, Replica

S = ReplicaState
AWAKE = frozenset({S.STARTING, S.READY, S.DRAINING, S.WAKING})


def sleepers_to_drop(
    fleet: Fleet, node: str, need_bytes: int, worth_ms: float, now_ms: int
) -> tuple[Replica, ...] | None:
    """The least missed sleepers that make `need_bytes` free, counting what is already being dropped; () if that does.
    None where it cannot be done, or only at the cost of sleepers that would be missed more than `worth_ms`.
    """
    book = fleet.book
    going, candidates = 0, []
    for replica in fleet.node_replicas[node].values():
        nbytes = book.host_bytes(replica.id, node)
        if not nbytes:
            continue
        if replica.state is S.STOPPING:
            going += nbytes
        owner = fleet.endpoints.get(replica.endpoint)
        if replica.state is S.ASLEEP and owner is not None and not owner.activations and not owner.busy:
            missed_ms = regret.of_forgetting(fleet, owner, replica, now_ms)
            if missed_ms < worth_ms:
                candidates.append(Candidate(replica.id, nbytes, missed_ms))
    victims = choose(candidates, need_bytes - book.host_free(node) - going)
    return None if victims is None else tuple(fleet.replicas[v.replica] for v in victims)


def wanted_free(fleet: Fleet, node: str, now_ms: int) -> tuple[int, float]:
    """Room that lets every awake replica of the node sleep at once, at most half of host memory; and how much the one
    that is least missed there is worth in host memory.
    """
    total, least_ms = 0, float("inf")
    for replica in fleet.node_replicas[node].values():
        owner = fleet.endpoints.get(replica.endpoint)
        if replica.state in AWAKE and replica.deployment is not None and owner is not None:
            total += replica.deployment.host_bytes - fleet.book.host_bytes(replica.id, node)
            least_ms = min(least_ms, regret.of_forgetting(fleet, owner, replica, now_ms))
    return min(total, fleet.book.host_capacity(node) // 2), least_ms
