"""One replica at a time: the commands that move it, and what a node's report of it means.

The order that keeps memory honest: Drain → every fence → Sleep or Stop → a report that shows the bytes freed → the book
lets go → the next Wake or Start is reserved and issued. Nothing here skips a link of that chain.
"""

from typing import assert_never

from tidegate.domain.fleet import Tier
from tidegate.domain.plan import Drain, Pause, Reason, ReplicaStatus, Resume, Sleep, Start, Stop, Wake
from tidegate.domain.replica import ReplicaState
from tidegate.policy.book import Place
from tidegate.policy.reconcile import hostroom, regret
from tidegate.policy.reconcile.fleet import Activation, Fleet, Replica

S = ReplicaState
Inputs = tuple[tuple[str, str | int | float], ...]


# --- activation: plan → pledge → reserve → command --------------------------------------------------------------------


def begin(fleet: Fleet, activation: Activation, now_ms: int) -> None:
    """Issue it now if its room is free, else pledge the room and wait in line for it."""
    fleet.activations[activation.id] = activation
    fleet.endpoints[activation.endpoint].activations[activation.id] = activation
    fleet.book.pledge(activation.id, activation.places, activation.bytes_each)
    for place in activation.places:
        fleet.pending[place][activation.id] = activation
    issue_pending(fleet, activation.places[:1], now_ms)


def cancel(fleet: Fleet, activation: Activation) -> None:
    """Take back a plan that was not issued yet. Victims already draining go on: the room will find a taker."""
    fleet.book.unpledge(activation.id)
    for place in activation.places:
        del fleet.pending[place][activation.id]
    del fleet.activations[activation.id]
    endpoint = fleet.endpoints[activation.endpoint]
    del endpoint.activations[activation.id]
    fleet.touch(endpoint.name)


def issue_pending(fleet: Fleet, places: tuple[Place, ...], now_ms: int) -> None:
    """Memory came free on `places`: issue what waits there, first come first served, skipping what does not fit yet."""
    for place in places:
        for activation in list(fleet.pending[place].values()):
            if fleet.book.fits_now(activation.places, activation.bytes_each):
                cancel(fleet, activation)
                _issue(fleet, activation, now_ms)


def _issue(fleet: Fleet, activation: Activation, now_ms: int) -> None:
    endpoint = fleet.endpoints[activation.endpoint]
    reason = Reason(activation.rule, activation.inputs)
    accelerators = tuple(accelerator for _, accelerator in activation.places)
    replica = activation.wake
    if replica is not None:
        assert replica.state is S.ASLEEP, f"wake of {replica.id} in {replica.state}"
        fleet.settle_on(replica, activation.places, activation.bytes_each)
        fleet.enter(replica, S.WAKING, now_ms)
        fleet.out.append(Wake(replica.id, replica.node, accelerators, activation.bytes_each, reason))
        watch(fleet, replica, fleet.settings.wake_ms_max)
        return
    deployment = endpoint.deployment
    id, node, generation = activation.id, activation.node, deployment.generation
    replica = Replica(id, endpoint.name, node, activation.places, deployment, generation, S.STARTING, now_ms)
    replica.cold = fleet.cold_tier(deployment.model, node)
    fleet.add(replica)
    fleet.settle_on(replica, activation.places, activation.bytes_each)
    fleet.touch(endpoint.name)
    fleet.out.append(Start(replica.id, replica.node, accelerators, deployment, activation.bytes_each, reason))
    watch(fleet, replica, fleet.settings.start_ms_max)


# --- the way out ------------------------------------------------------------------------------------------------------


def drain(
    fleet: Fleet, replica: Replica, now_ms: int, rule: str, inputs: Inputs = (), keep: bool = True, sticky: bool = False
) -> None:
    """No new requests; once every live gateway has fenced it off, it sleeps (`keep`) or stops."""
    if replica.state is S.STARTING:  # batch on its way: no gateway knows of it
        stop(fleet, replica, now_ms, rule, inputs)
        return
    assert replica.state is S.READY, f"drain of {replica.id} in {replica.state}"
    replica.fence += 1
    replica.fences = dict.fromkeys(fleet.gateways)
    batch = replica.endpoint in fleet.batch  # aborted at once: its finished lines are kept, the rest is queued again
    replica.keep, replica.sticky, replica.rule = keep, sticky or batch, rule
    fleet.enter(replica, S.DRAINING, now_ms)
    fleet.book.set_releasing(replica.id, True)
    reason = Reason(rule, inputs)
    fleet.out.append(Drain(replica.id, replica.node, replica.endpoint, reason, replica.fence, abort=batch))
    watch(fleet, replica, fleet.settings.drain_ms_max)
    if not replica.fences:
        retire(fleet, replica, now_ms)


def resume(fleet: Fleet, replica: Replica, now_ms: int, rule: str) -> None:
    """Call a drain off before anything was freed. Whoever waited for the room plans anew."""
    assert replica.state is S.DRAINING
    assert not replica.sticky
    fleet.book.set_releasing(replica.id, False)
    replica.fences = {}
    fleet.enter(replica, S.READY, now_ms)
    fleet.out.append(Resume(replica.id, replica.node, replica.endpoint, Reason(rule)))
    for place in replica.places:
        for activation in list(fleet.pending[place].values()):
            if fleet.book.accounts[place].headroom < 0:
                cancel(fleet, activation)


def pause(fleet: Fleet, replica: Replica, now_ms: int, worker: str) -> None:
    """It stands still while `worker` has a request beside it, with all it holds; with nobody there, it goes on."""
    replica.paused_ms = now_ms if worker else None
    reason = Reason("neighbour_works", (("for", worker),)) if worker else Reason("nobody_works")
    fleet.out.append(Pause(replica.id, replica.node, bool(worker), reason))


def fenced(fleet: Fleet, replica: Replica, gateway: str, fence: int, now_ms: int) -> None:
    """`fence` 0 is a gateway that does not number its confirmations; another number belongs to a drain called off."""
    if replica.state is not S.DRAINING or fence not in (0, replica.fence):
        return
    replica.fences.pop(gateway, None)
    if not replica.fences:
        retire(fleet, replica, now_ms)


def retire(fleet: Fleet, replica: Replica, now_ms: int) -> None:
    """Fenced off: sleep if host memory has room or a less missed sleeper can be dropped for it, otherwise stop."""
    nbytes = replica.deployment.host_bytes if replica.deployment is not None else 0
    book = fleet.book
    room = book.host_free(replica.node) + book.host_bytes(replica.holder, replica.node)
    owner = fleet.endpoints.get(replica.endpoint)
    if replica.keep and nbytes > room and owner is not None:
        worth_ms = regret.of_forgetting(fleet, owner, replica, now_ms)
        if _drop_sleepers(fleet, replica.node, nbytes, worth_ms, now_ms):
            return  # fenced and still DRAINING: tried again when a dropped sleeper is gone
    if not replica.keep or nbytes > room:
        stop(fleet, replica, now_ms, replica.rule, (("host_room_bytes", room),) if replica.keep else ())
        return
    book.reserve_host(replica.holder, replica.node, nbytes)
    fleet.enter(replica, S.SLEEPING, now_ms)
    fleet.out.append(Sleep(replica.id, replica.node, Reason(replica.rule)))
    watch(fleet, replica, fleet.settings.sleep_ms_max)


def _drop_sleepers(fleet: Fleet, node: str, need_bytes: int, worth_ms: float, now_ms: int) -> bool:
    """Have sleepers worth less end. True if their bytes, once gone, make `need_bytes` free."""
    victims = hostroom.sleepers_to_drop(fleet, node, need_bytes, worth_ms, now_ms)
    for victim in victims or ():
        stop(fleet, victim, now_ms, "host_room", (("need_bytes", need_bytes),))
    return victims is not None


def keep_host_room(fleet: Fleet, node: str, now_ms: int) -> None:
    """Make room before it is needed: a victim should not have to wait for a sleeper to end."""
    need_bytes, worth_ms = hostroom.wanted_free(fleet, node)
    if need_bytes > fleet.book.host_free(node):
        _drop_sleepers(fleet, node, need_bytes, worth_ms, now_ms)


def stop(fleet: Fleet, replica: Replica, now_ms: int, rule: str, inputs: Inputs = ()) -> None:
    """End the process whatever it does. Its reservation stays until the node reports it gone."""
    drop_wake_plans(fleet, replica)
    replica.fences = {}
    fleet.book.set_releasing(replica.id, True)
    fleet.enter(replica, S.STOPPING, now_ms)
    fleet.out.append(Stop(replica.id, replica.node, Reason(rule, inputs)))
    watch(fleet, replica, fleet.settings.stop_ms_max)


def drop_wake_plans(fleet: Fleet, replica: Replica) -> None:
    """A sleeping replica that is about to end cannot be woken any more."""
    endpoint = fleet.endpoints.get(replica.endpoint)
    if endpoint is not None:
        for activation in list(endpoint.activations.values()):
            if activation.wake is replica:
                cancel(fleet, activation)


def watch(fleet: Fleet, replica: Replica, bound_ms: int) -> None:
    fleet.set_timer(replica.since_ms + bound_ms, "replica", replica.id, replica.since_ms)


def overdue(fleet: Fleet, replica_id: str, since_ms: int, now_ms: int) -> None:
    """The step that began at `since_ms` has outrun its bound."""
    replica = fleet.replicas.get(replica_id)
    if replica is None or replica.since_ms != since_ms:
        return
    match replica.state:
        case S.STARTING | S.WAKING:
            failed(fleet, replica, f"{replica.state.value} for longer than allowed", now_ms)
        case S.DRAINING | S.SLEEPING | S.STOPPING | S.FAILED:
            stop(fleet, replica, now_ms, "overdue", (("state", replica.state.value),))
        case S.READY | S.ASLEEP | S.STOPPED:
            pass  # the step ended within this very millisecond
        case _:
            assert_never(replica.state)


# --- what a node says -------------------------------------------------------------------------------------------------


def reported(fleet: Fleet, status: ReplicaStatus, now_ms: int) -> None:
    """A report is believed where it fits the step the core ordered; a late or doubled one changes nothing."""
    replica = fleet.replicas.get(status.replica)
    if replica is None:
        if status.node in fleet.nodes and status.state is not S.STOPPED:
            fleet.out.append(Stop(status.replica, status.node, Reason("unknown_replica")))
        return
    if replica.node != status.node:
        return
    match status.state:
        case S.READY:
            _is_ready(fleet, replica, status, now_ms)
        case S.ASLEEP:
            _is_asleep(fleet, replica, status, now_ms)
        case S.STOPPED:
            _is_gone(fleet, replica, status, now_ms)
        case S.FAILED:
            if replica.state not in (S.STOPPING, S.FAILED):
                failed(fleet, replica, status.reason or "engine failed", now_ms)
        case S.STARTING | S.WAKING | S.DRAINING | S.SLEEPING | S.STOPPING:
            # On the way; the step that was ordered is still the truth.
            if status.state is replica.state is S.STARTING and status.reason != replica.note:
                replica.note = status.reason
                fleet.touch(replica.endpoint)
        case _:
            assert_never(status.state)


def _is_ready(fleet: Fleet, replica: Replica, status: ReplicaStatus, now_ms: int) -> None:
    if replica.state is S.READY:
        replica.address = status.address or replica.address
        if status.paused is (replica.paused_ms is None):  # an older report, or an order that was lost: said again
            fleet.out.append(Pause(replica.id, replica.node, not status.paused, Reason("said_again")))
        fleet.touch(replica.endpoint)
        return
    if replica.state not in (S.STARTING, S.WAKING):
        return
    tier = replica.cold if replica.state is S.STARTING else Tier.HOST
    replica.address, replica.ready_ms = status.address, now_ms
    fetched = tier is Tier.REMOTE  # the node's figure leaves the fetch out
    took_ms = status.took_ms if status.took_ms and not fetched else now_ms - replica.since_ms
    fleet.found_in_host(replica, status)
    fleet.enter(replica, S.READY, now_ms)
    endpoint = fleet.endpoints.get(replica.endpoint)
    if endpoint is not None and replica.deployment is not None:
        fleet.costs.observe(replica.deployment.model.digest, replica.node, tier, took_ms)
        endpoint.loaded_once = True
        # Up again, so not FAILED any more; but one that dies right away must not restart its pauses from the shortest.
        endpoint.failures = min(endpoint.failures, fleet.settings.failures_max - 1)
        endpoint.activation_ms = took_ms
        endpoint.quiet_since_ms = now_ms


def _is_asleep(fleet: Fleet, replica: Replica, status: ReplicaStatus, now_ms: int) -> None:
    if replica.state is not S.SLEEPING:
        return
    if status.accelerator_bytes > fleet.settings.slept_accelerator_bytes_max:
        # It says it sleeps and still holds memory: waking the next one on top of it would kill both.
        blame(fleet, replica, "memory was not freed by sleep", now_ms)
        stop(fleet, replica, now_ms, "memory_not_freed", (("accelerator_bytes", status.accelerator_bytes),))
        return
    fleet.found_in_host(replica, status)
    places = fleet.leave(replica)
    fleet.enter(replica, S.ASLEEP, now_ms)
    fleet.room_nodes[replica.node] = None
    issue_pending(fleet, places, now_ms)
    keep_host_room(fleet, replica.node, now_ms)


def _is_gone(fleet: Fleet, replica: Replica, status: ReplicaStatus, now_ms: int) -> None:
    if replica.state in (S.STARTING, S.WAKING, S.READY):
        blame(fleet, replica, status.reason or "engine ended", now_ms)
    drop_wake_plans(fleet, replica)
    places = replica.places if fleet.book.holds(replica.id) else ()
    fleet.forget(replica)
    fleet.room_nodes[replica.node] = None
    for other in list(fleet.node_replicas[replica.node].values()):
        if other.state is S.DRAINING and not other.fences:  # it waited for room in host memory
            retire(fleet, other, now_ms)
    issue_pending(fleet, places, now_ms)


def failed(fleet: Fleet, replica: Replica, reason: str, now_ms: int) -> None:
    """Not to be trusted with a request again: stop it, and start afresh after a pause that grows."""
    blame(fleet, replica, reason, now_ms)
    stop(fleet, replica, now_ms, "failed", (("reason", reason),))


def blame(fleet: Fleet, replica: Replica, reason: str, now_ms: int) -> None:
    endpoint = fleet.endpoints.get(replica.endpoint)
    if endpoint is None or not endpoint.current(replica):
        return
    settings = fleet.settings
    served_well = replica.ready_ms > 0 and now_ms - replica.ready_ms > settings.failure_forget_ms
    endpoint.failures = 1 if served_well else endpoint.failures + 1
    endpoint.failed_reason, endpoint.failed_on = reason, replica.node
    pause_ms = min(settings.backoff_ms_first << min(endpoint.failures - 1, 20), settings.backoff_ms_max)
    endpoint.retry_ms = now_ms + pause_ms
    fleet.touch(endpoint.name)
