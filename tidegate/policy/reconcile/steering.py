"""One endpoint at a time: compare what it must have with what it has, and let go of or queue up for the difference."""

from tidegate.domain.endpoint import Mode
from tidegate.domain.replica import ReplicaState
from tidegate.policy import scaling, schedule
from tidegate.policy.reconcile import lifecycle, prewarm
from tidegate.policy.reconcile.fleet import Endpoint, Fleet
from tidegate.policy.reconcile.room import Press, activate
from tidegate.policy.reconcile.waiting import leave_queue, queue_up

S = ReplicaState


def steer(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Bring one endpoint nearer to its desired state; what lacks room is queued in `fleet.waiting`."""
    fleet.unrouted[endpoint.name] = None
    deployment = endpoint.deployment
    if endpoint.withdrawn:
        endpoint.required = 0
        _withdraw(fleet, endpoint, now_ms)
        return
    _drop_outdated(fleet, endpoint, now_ms)
    if deployment.mode is Mode.BATCH:
        _pause_beside_workers(fleet, endpoint, now_ms)
    endpoint.required, retained = _want(fleet, endpoint, now_ms)
    _call_off_drains(fleet, endpoint, now_ms)
    live = endpoint.supply()
    planned = len(endpoint.activations)
    if live + planned > endpoint.required:
        for activation in list(endpoint.activations.values())[: live + planned - endpoint.required]:
            if activation.rule not in ("first_load", "return_home", "prewarm"):
                lifecycle.cancel(fleet, activation)
    if live >= endpoint.required:
        endpoint.waiting_since_ms = None
    if live + len(endpoint.activations) < endpoint.required:
        queue_up(fleet, endpoint, now_ms)
    else:
        leave_queue(fleet, endpoint)
    if fleet.settings.first_load and not endpoint.loaded_once and not live and not endpoint.activations:
        fleet.first_loads[endpoint.name] = None
    _return_home(fleet, endpoint, now_ms)
    _give_back(fleet, endpoint, retained, now_ms)
    if endpoint.retry_ms > now_ms:
        fleet.look_again(endpoint, endpoint.retry_ms)
    if not (live or endpoint.busy or endpoint.activations):
        prewarm.watch(fleet, endpoint, now_ms)
    endpoint.calm_ready = _calm_ready(endpoint)
    fleet.count_idle(endpoint)


def absorb(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> bool:
    """The usual case, in constant time: replicas that serve take the demand as it is now, and nothing else is due.

    Only while a timer of the endpoint runs, which will see to keep-alive and scale-down.
    """
    deployment = endpoint.deployment
    required = scaling.replicas(endpoint.in_flight, deployment)
    if not 0 < endpoint.calm_ready >= required or endpoint.queued or endpoint.timer_ms is None:
        return False
    required = max(required, endpoint.floor)
    if endpoint.calm_ready > max(required, 1) and endpoint.timer_ms > now_ms + endpoint.window.bucket_ms:
        return False  # a surplus is looked at sooner than a keep-alive
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


def _want(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> tuple[int, int]:
    """(required, retained) by load, minimum, schedule and keep-alive."""
    deployment, settings = endpoint.deployment, fleet.settings
    if deployment.schedule:
        if now_ms >= endpoint.scheduled_until_ms:
            endpoint.scheduled, endpoint.scheduled_until_ms = schedule.in_force(deployment.schedule, now_ms)
        fleet.look_again(endpoint, endpoint.scheduled_until_ms)
    minimum, scheduled = endpoint.floor, endpoint.scheduled
    maximum = scheduled.max_replicas if scheduled is not None else deployment.max_replicas
    if endpoint.woken_until_ms > now_ms:
        minimum = max(minimum, 1)
        fleet.look_again(endpoint, endpoint.woken_until_ms)
    if not endpoint.busy and _retry_failed(endpoint, settings.failures_max):
        minimum = max(minimum, 1)
    zero_ms = deployment.scaling.zero_window_ms
    idle_until_ms = endpoint.quiet_since_ms + (settings.idle_ms_max if zero_ms is None else zero_ms)
    warm_until = max(idle_until_ms, endpoint.ahead_until_ms)
    reactive, peak = _reactive(fleet, endpoint, now_ms), endpoint.window.peak(now_ms)
    warm = endpoint.busy or warm_until > now_ms
    required, retained = scaling.decide(reactive, minimum, max(maximum, minimum), peak, warm)
    endpoint.window.push(now_ms, required)
    if retained > required or (endpoint.live_count() and not endpoint.busy):
        again = now_ms + endpoint.window.bucket_ms if retained > 1 else warm_until
        if again > now_ms:
            fleet.look_again(endpoint, again)
    return required, retained


def _reactive(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> int:
    """What the load asks for; more than there are only once that has lasted for the up window."""
    wanted, have = scaling.replicas(endpoint.load, endpoint.deployment), endpoint.live_count()
    if wanted <= max(have, 1):
        endpoint.over_since_ms = None
        return wanted
    if endpoint.over_since_ms is None:
        endpoint.over_since_ms = now_ms
    due_ms = endpoint.over_since_ms + endpoint.deployment.scaling.up_window_ms
    if due_ms <= now_ms:
        return wanted
    fleet.look_again(endpoint, due_ms)
    return max(have, 1)


def _retry_failed(endpoint: Endpoint, failures_max: int) -> bool:
    """A FAILED endpoint is refused at the gateways, so no demand will ask for the slow retry: it asks for itself. Not
    for one that drains because it was idle: the retry would call it back at once, for ever.
    """
    failed = endpoint.failures >= failures_max
    return failed and not any(r.state in (S.READY, S.DRAINING) for r in endpoint.replicas.values())


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
    outdated = [r for r in endpoint.replicas.values() if r.deployment is not endpoint.deployment]
    replaced = bool(outdated) and any(r.state is S.READY and endpoint.current(r) for r in endpoint.replicas.values())
    for replica in outdated:
        match replica.state:
            case S.STARTING | S.WAKING | S.ASLEEP:
                lifecycle.stop(fleet, replica, now_ms, "outdated", (("generation", replica.generation),))
            case S.READY if replaced or not (endpoint.busy or endpoint.deployment.min_replicas):
                endpoint.loaded_once = endpoint.loaded_once and replaced
                lifecycle.drain(fleet, replica, now_ms, "outdated", keep=False, sticky=True)
            case S.DRAINING:
                replica.keep = False


def _pause_beside_workers(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Batch computes beside nobody who works: it stands still meanwhile, with all it holds. If that takes long, its
    memory is of no use there, and what it began may be done elsewhere.
    """
    for replica in [r for r in endpoint.replicas.values() if r.state is S.READY]:
        worker = next((r.endpoint for r in fleet.neighbours(replica) if fleet.works(r)), "")
        if bool(worker) is (replica.paused_ms is None):
            lifecycle.pause(fleet, replica, now_ms, worker)
        if replica.paused_ms is not None:
            fleet.look_again(endpoint, replica.paused_ms + fleet.settings.pause_ms_max)
            if replica.paused_ms + fleet.settings.pause_ms_max <= now_ms:
                lifecycle.drain(fleet, replica, now_ms, "paused_long", (("for", worker),))


def _call_off_drains(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Its own demand came back before the fence was complete: nothing was freed yet, so serve on."""
    for replica in [r for r in endpoint.replicas.values() if r.state is S.DRAINING and endpoint.current(r)]:
        if replica.fences and not replica.sticky and endpoint.live_count() < endpoint.required:
            lifecycle.resume(fleet, replica, now_ms, "demand_returned")


def _return_home(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """What was borrowed in another region is replaced by a replica at home as soon as there is free room for it; not
    while it is on its way: a second start beside it would only make both slower.
    """
    home = endpoint.deployment.regions[0]
    if endpoint.coming() or all(endpoint.at_home(fleet, r) for r in endpoint.replicas.values() if endpoint.live(r)):
        return
    nodes = dict.fromkeys(fleet.region_nodes.get(home, ()))
    if not nodes or not activate(fleet, endpoint, now_ms, "return_home", Press.GENTLE, nodes):
        fleet.look_again(endpoint, now_ms + fleet.settings.return_home_ms)


def _give_back(fleet: Fleet, endpoint: Endpoint, retained: int, now_ms: int) -> None:
    """Replicas beyond what may be retained sleep: surplus of a past peak, or quiet beyond the keep-alive."""
    ready = [r for r in endpoint.replicas.values() if r.state is S.READY and endpoint.current(r)]
    kept = endpoint.deployment.min_replicas if endpoint.scheduled is None else endpoint.floor
    surplus = len(ready) - max(retained, kept)
    rule = "scale_down" if retained else "idle"
    for replica in sorted(ready, key=lambda r: endpoint.at_home(fleet, r))[:surplus] if surplus > 0 else ():
        if now_ms - replica.ready_ms >= fleet.settings.residency_ms_min:
            lifecycle.drain(fleet, replica, now_ms, rule, (("retained", retained),))
        else:
            fleet.look_again(endpoint, replica.ready_ms + fleet.settings.residency_ms_min)
