"""Serving the queue of endpoints that wait for room, and first loads behind it."""

from collections.abc import Iterable

from tidegate.domain.endpoint import Mode
from tidegate.policy.reconcile.fleet import Endpoint, Fleet
from tidegate.policy.reconcile.room import Press, activate

# A waiting endpoint looks over the fleet at most this often; in between it is offered what comes free.
SEARCH_PAUSE_MS = 200
NO_VICTIM_PAUSE_MS = 1_000  # where nobody gives way (baselines), what comes free is offered; this finds the rest
BATCH_PAUSE_MS = 1_000  # nobody waits for batch, and on a busy fleet it would look at every event


def serve_waiting(fleet: Fleet, touched: Iterable[str], now_ms: int) -> None:
    """Plan for endpoints that wait. Those just touched look everywhere; where room appeared, the first in the queue
    look there only: so an event's cost does not grow with the queue or the fleet.
    """
    for name in touched:
        endpoint = fleet.endpoints.get(name)
        if endpoint is None or endpoint.wait_key is None:
            continue
        pause_ms = BATCH_PAUSE_MS if name in fleet.batch else SEARCH_PAUSE_MS
        overdue = name not in fleet.batch and endpoint.searched_ms < _bound_ms(fleet, endpoint) <= now_ms
        if overdue or now_ms - endpoint.searched_ms >= pause_ms:
            endpoint.searched_ms = now_ms
            _serve(fleet, endpoint, now_ms, None)
        else:
            fleet.look_again(endpoint, endpoint.searched_ms + pause_ms)
    if fleet.room_nodes:
        nodes, fleet.room_nodes = fleet.room_nodes, {}
        for _, _, name in fleet.waiting[: fleet.settings.retries_per_event_max]:
            if name not in fleet.batch:
                _serve(fleet, fleet.endpoints[name], now_ms, nodes)
    if not fleet.waiting and fleet.first_loads:
        _serve_first_load(fleet, now_ms)


def _bound_ms(fleet: Fleet, endpoint: Endpoint) -> int:
    assert endpoint.waiting_since_ms is not None
    return endpoint.waiting_since_ms + fleet.settings.wait_ms_max


def _serve(fleet: Fleet, endpoint: Endpoint, now_ms: int, nodes: dict[str, None] | None) -> None:
    """Plan what `endpoint` lacks, on `nodes` only if given; the rest is looked at again, at its bound at last."""
    if endpoint.wait_key is None or endpoint.retry_ms > now_ms:
        return
    bound_ms = _bound_ms(fleet, endpoint)
    lacks = endpoint.supply() < max(1, endpoint.floor)  # it serves nobody, or has less than what is reserved for it
    rule = "demand" if lacks else "scale_out"
    if endpoint.deployment.mode is Mode.DEDICATED or not endpoint.busy:
        rule = "keep_replicas"
    while endpoint.supply() + len(endpoint.activations) < endpoint.required:
        if activate(fleet, endpoint, now_ms, rule, Press.NORMAL if lacks else Press.SPARE, nodes):
            continue
        # What still runs on a replica on its way out is service, too: an endpoint of long requests would else come back
        # at once each time it gave way, until all memory is held by replicas that drain.
        evicts = fleet.settings.victim_order != "none"
        starves = lacks and (endpoint.floor > 1 or not endpoint.in_flight) and bound_ms <= now_ms and evicts
        if starves and activate(fleet, endpoint, now_ms, "wait_bound", Press.FORCE, nodes):
            continue
        if nodes is None:
            again_ms = bound_ms if bound_ms > now_ms else now_ms + fleet.settings.wait_ms_max
            if lacks:  # what became ready a moment ago may leave when its minimum residency ends: no event says so
                soon_ms = max(SEARCH_PAUSE_MS, fleet.settings.residency_ms_min) if evicts else NO_VICTIM_PAUSE_MS
                again_ms = min(again_ms, now_ms + soon_ms + 1)
            fleet.look_again(endpoint, again_ms)
        return


def _serve_first_load(fleet: Fleet, now_ms: int) -> None:
    """Load a new endpoint once, so that its first request finds it in host memory. Never at anybody's cost."""
    for name in list(fleet.first_loads)[: fleet.settings.first_loads_max]:
        endpoint = fleet.endpoints.get(name)
        if endpoint is None or endpoint.loaded_once or endpoint.failures >= fleet.settings.failures_max:
            del fleet.first_loads[name]
        elif endpoint.live_count() or endpoint.activations or endpoint.retry_ms > now_ms:
            continue
        elif not activate(fleet, endpoint, now_ms, "first_load", Press.GENTLE, None):
            fleet.first_loads[name] = fleet.first_loads.pop(name)  # to the end: another may fit
