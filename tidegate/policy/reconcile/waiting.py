"""The queue of endpoints that must have a replica and have no room for it yet: by class, then without any replica, then
oldest.
"""

from bisect import bisect_left, insort

from tidegate.policy.reconcile.fleet import CLASS_RANK, Endpoint, Fleet


def queue_up(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Enter the queue, or move in it when the endpoint lost its last replica (or got its first). Its wait goes on."""
    if endpoint.waiting_since_ms is None:
        endpoint.waiting_since_ms = now_ms
        endpoint.attempts = 0
    extra = 1 if endpoint.ready_count() else 0
    key = (CLASS_RANK[endpoint.deployment.mode] * 2 + extra, endpoint.waiting_since_ms, endpoint.name)
    if key == endpoint.wait_key:
        return
    leave_queue(fleet, endpoint)
    insort(fleet.waiting, key)
    endpoint.wait_key = key


def leave_queue(fleet: Fleet, endpoint: Endpoint) -> None:
    """A plan was made, or nothing is needed. The wait itself ends when the plan's command is issued."""
    if endpoint.wait_key is not None:
        del fleet.waiting[bisect_left(fleet.waiting, endpoint.wait_key)]
        endpoint.wait_key = None
