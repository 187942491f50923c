"""Whose time it was: every microsecond of every accelerator, as a fold over what nodes and gateways report. Pure.

Replicas may share an accelerator; each has the *share* of it that its reserved bytes are, what nobody has is free, so
the shares of an accelerator sum to its wall time exactly (they are cut so that nothing is lost to rounding). Beside the
share, a cell keeps how long the replica was *held* there, undivided: what a dedicated endpoint pays for.

While an owner is away from home (where it was last ready), what is not free of its room there is *lent* by it to those
who are there. A node that was out of sight is accounted for when it is back: from the instants at which it says the
present states of its replicas began, and `unreported` before them. A silence longer than `BRIDGE_MS_MAX` (counted from
this process's start: it may have been ours) is nobody's time. Time never goes backwards here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ledger import TimeCell, TimePage, TimeReport, TimeState
from tidegate.domain.plan import ReplicaStatus, Start, Wake
from tidegate.domain.replica import ReplicaState
from tidegate.domain.units import MS_PER_HOUR

CHECKPOINT_MS = 10_000  # the most that is unreported after everything was killed at once
BRIDGE_MS_MAX = 60_000
GAP_MS_MAX = 31 * 24 * MS_PER_HOUR  # a node that was away for longer begins anew

Place = tuple[str, str]
"""An accelerator: (node id, accelerator id)."""
Key = tuple[int, str, str, str, str, TimeState, str]

_STATES = {
    ReplicaState.STARTING: TimeState.ACTIVATING,
    ReplicaState.WAKING: TimeState.ACTIVATING,
    ReplicaState.READY: TimeState.IDLE,
    ReplicaState.DRAINING: TimeState.DRAINING,
    ReplicaState.SLEEPING: TimeState.DRAINING,
    ReplicaState.STOPPING: TimeState.DRAINING,
    ReplicaState.FAILED: TimeState.DRAINING,
    ReplicaState.ASLEEP: TimeState.ASLEEP,
}


@dataclass(frozen=True, slots=True)
class _Resident:
    endpoint: str
    nbytes: int
    state: TimeState


@dataclass(slots=True)
class _Spot:
    """One accelerator. `owners`: endpoint → its bytes when at home. `blind`: what is free may not have been."""

    accelerator: Accelerator
    settled_ms: int
    residents: dict[str, _Resident] = field(default_factory=dict)
    sleepers: dict[str, _Resident] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    blind: bool = False


@dataclass(slots=True)
class _Machine:
    """`accounted_ms`: everything before it is in cells or was paged; `paged_ms`: everything before it was paged."""

    accounted_ms: int
    paged_ms: int
    present: bool = False
    spots: dict[str, _Spot] = field(default_factory=dict)
    cells: dict[Key, list[int]] = field(default_factory=dict)
    page: TimePage | None = None


class AcceleratorTime:
    """Implements `ports.TimeSource`. `marks`: node → the instant up to which the ledger has its time."""

    def __init__(self, started_ms: int, marks: Mapping[str, int] | None = None) -> None:
        self._started_ms = self._now_ms = started_ms
        self._machines = {node: _Machine(mark, mark) for node, mark in (marks or {}).items()}
        self._deployments: dict[str, Deployment] = {}
        self._reserved: dict[str, int] = {}  # replica -> bytes on each of its places; a report only knows those touched
        self._held: dict[str, tuple[Place, ...]] = {}
        self._replicas: dict[str, dict[str, None]] = {}  # endpoint -> its replicas that are somewhere
        self._homes: dict[str, tuple[Place, ...]] = {}
        self._busy: dict[str, dict[str, frozenset[str]]] = {}  # endpoint -> gateway -> replicas with requests on them
        self._lent_us: dict[str, int] = {}

    # --- what happens ---------------------------------------------------------------------------------------------

    def event(self, event: plan.Event, now_ms: int) -> None:
        self._now_ms = now_ms = max(self._now_ms, now_ms)
        match event:
            case plan.EndpointApplied(deployment):
                self._settle_all(self._places_of(deployment.endpoint), now_ms)
                self._deployments[deployment.endpoint] = deployment
            case plan.EndpointRemoved(endpoint):
                self._leave_home(endpoint, now_ms)
                self._busy.pop(endpoint, None)
                if not self._replicas.get(endpoint):
                    self._replicas.pop(endpoint, None)
                    self._deployments.pop(endpoint, None)
            case plan.NodeJoined():
                self._joined(event, now_ms)
            case plan.NodeLost(node):
                self._lost(node, now_ms)
            case plan.ReplicaChanged(status):
                self._replica(status, now_ms)
            case plan.DemandReported(gateway, endpoint, busy=busy):
                self._demand(endpoint, gateway, frozenset(busy), now_ms)
            case plan.GatewayLost(gateway):
                for endpoint in [e for e, gateways in self._busy.items() if gateway in gateways]:
                    self._demand(endpoint, gateway, frozenset(), now_ms)
            case (
                plan.GatewayJoined() | plan.FenceConfirmed() | plan.WeightsChanged() | plan.ManualAction() | plan.Tick()
            ):
                pass  # moves no accelerator

    def command(self, command: plan.Command) -> None:
        if isinstance(command, Start | Wake):
            self._reserved[command.replica] = command.accelerator_bytes

    # --- what is asked --------------------------------------------------------------------------------------------

    def report(self, now_ms: int, *, checkpoint_ms: int = CHECKPOINT_MS) -> TimeReport:
        """Pages of nodes that have `checkpoint_ms` or more not yet paged. A page is offered until it is confirmed."""
        self._now_ms = now_ms = max(self._now_ms, now_ms)
        pages = []
        for node, machine in self._machines.items():
            if machine.page is None and machine.present and now_ms - machine.paged_ms >= checkpoint_ms:
                self._settle_all(((node, name) for name in machine.spots), now_ms)
                machine.accounted_ms = max(machine.accounted_ms, now_ms)
            if machine.page is None and machine.accounted_ms > machine.paged_ms:
                machine.page = _page(node, machine)
                machine.cells = {}
            if machine.page is not None:
                pages.append(machine.page)
        awaited = (m for m in self._machines.values() if m.present or not self._late(m.accounted_ms, now_ms))
        return TimeReport(tuple(pages), min((m.accounted_ms for m in awaited), default=now_ms))

    def confirm(self, page: TimePage) -> None:
        """The ledger has it."""
        machine = self._machines[page.node]
        if machine.page == page:
            machine.paged_ms, machine.page = page.until_ms, None

    def lent_seconds(self, now_ms: int) -> dict[str, float]:
        """Accelerator-seconds each owner has lent since this process began."""
        for node, machine in self._machines.items():
            if machine.present:
                self._settle_all(((node, name) for name in machine.spots), max(self._now_ms, now_ms))
        return {owner: lent_us / 1e6 for owner, lent_us in self._lent_us.items()}

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _joined(self, event: plan.NodeJoined, now_ms: int) -> None:
        node = event.node.id
        self._lost(node, now_ms)
        machine = self._machines.get(node)
        if machine is None or now_ms - machine.accounted_ms > GAP_MS_MAX:
            machine = self._machines[node] = _Machine(now_ms, now_ms)
        began_ms = machine.accounted_ms
        bridged = not self._late(began_ms, now_ms)
        owners = {name: spot.owners for name, spot in machine.spots.items()}
        machine.spots = {
            a.id: _Spot(a, began_ms, owners=owners.get(a.id, {}), blind=True) for a in event.node.accelerators
        }
        machine.present = True

        def since_ms(status: ReplicaStatus) -> int:
            return min(max(status.since_ms, began_ms), now_ms) if bridged and status.since_ms else now_ms

        for status in sorted(event.replicas, key=since_ms):
            self._replica(status, since_ms(status))
        for name, spot in machine.spots.items():
            self._settle((node, name), now_ms)
            spot.blind = False

    def _lost(self, node: str, now_ms: int) -> None:
        machine = self._machines.get(node)
        if machine is None or not machine.present:
            return
        for name, spot in machine.spots.items():
            self._settle((node, name), now_ms)
            for replica in [*spot.residents, *spot.sleepers]:
                self._leave(replica, now_ms)
        machine.accounted_ms, machine.present = max(machine.accounted_ms, now_ms), False

    def _late(self, since_ms: int, now_ms: int) -> bool:
        return now_ms - max(since_ms, self._started_ms) > BRIDGE_MS_MAX

    # --- replicas -------------------------------------------------------------------------------------------------

    def _replica(self, status: ReplicaStatus, now_ms: int) -> None:
        places = tuple((status.node, name) for name in status.accelerators) or self._held.get(status.replica, ())
        self._leave(status.replica, now_ms)
        if status.state is ReplicaState.STOPPED:
            self._reserved.pop(status.replica, None)
            return
        wanted = self._deployments.get(status.endpoint)
        reserved = self._reserved.get(status.replica, wanted.accelerator_bytes if wanted else 0)
        state = _STATES[status.state]
        if state is TimeState.IDLE and self._is_busy(status.endpoint, status.replica):
            state = TimeState.BUSY
        resident = _Resident(status.endpoint, max(reserved, status.accelerator_bytes), state)
        known = tuple(place for place in places if self._spot(place) is not None)
        for place in known:
            spot = self._settle(place, now_ms)
            (spot.sleepers if state is TimeState.ASLEEP else spot.residents)[status.replica] = resident
        self._held[status.replica] = known
        self._replicas.setdefault(status.endpoint, {})[status.replica] = None
        if status.state is ReplicaState.READY:
            self._leave_home(status.endpoint, now_ms)
            for place in known:
                self._settle(place, now_ms).owners[status.endpoint] = resident.nbytes
            self._homes[status.endpoint] = known

    def _leave(self, replica: str, now_ms: int) -> None:
        for place in self._held.pop(replica, ()):
            if self._spot(place) is not None:
                spot = self._settle(place, now_ms)
                gone = spot.residents.pop(replica, None) or spot.sleepers.pop(replica, None)
                if gone is not None:
                    self._replicas.get(gone.endpoint, {}).pop(replica, None)

    def _leave_home(self, endpoint: str, now_ms: int) -> None:
        for place in self._homes.pop(endpoint, ()):
            if self._spot(place) is not None:
                self._settle(place, now_ms).owners.pop(endpoint, None)

    def _demand(self, endpoint: str, gateway: str, busy: frozenset[str], now_ms: int) -> None:
        gateways = self._busy.setdefault(endpoint, {})
        changed = busy ^ gateways.get(gateway, frozenset())
        if busy:
            gateways[gateway] = busy
        else:
            gateways.pop(gateway, None)
        for replica in sorted(changed):
            state = TimeState.BUSY if self._is_busy(endpoint, replica) else TimeState.IDLE
            for place in self._held.get(replica, ()):
                if self._spot(place) is not None:
                    residents = self._settle(place, now_ms).residents
                    resident = residents.get(replica)
                    if resident is not None and resident.state in (TimeState.IDLE, TimeState.BUSY):
                        residents[replica] = _Resident(resident.endpoint, resident.nbytes, state)

    def _is_busy(self, endpoint: str, replica: str) -> bool:
        return any(replica in busy for busy in self._busy.get(endpoint, {}).values())

    def _places_of(self, endpoint: str) -> list[Place]:
        held = (self._held.get(replica, ()) for replica in self._replicas.get(endpoint, ()))
        return [place for places in held for place in places if self._spot(place) is not None]

    # --- time -----------------------------------------------------------------------------------------------------

    def _spot(self, place: Place) -> _Spot | None:
        machine = self._machines.get(place[0])
        return machine.spots.get(place[1]) if machine is not None and machine.present else None

    def _settle_all(self, places: Iterable[Place], now_ms: int) -> None:
        for place in places:
            self._settle(place, now_ms)

    def _settle(self, place: Place, now_ms: int) -> _Spot:
        """Accounts for what was, an hour at a time, before anything changes on `place`."""
        machine = self._machines[place[0]]
        spot = machine.spots[place[1]]
        while spot.settled_ms < now_ms:
            hour_ms = spot.settled_ms - spot.settled_ms % MS_PER_HOUR
            until_ms = min(now_ms, hour_ms + MS_PER_HOUR)
            for endpoint, state, lender, held_us, share_us in _slice(spot, (until_ms - spot.settled_ms) * 1_000):
                wanted = self._deployments.get(endpoint)
                mode = wanted.mode.value if wanted is not None else ""
                accelerator = spot.accelerator
                key = (hour_ms, accelerator.id, accelerator.kind, endpoint, mode, state, lender)
                cell = machine.cells.setdefault(key, [0, 0])
                cell[0] += held_us
                cell[1] += share_us
                if lender:
                    self._lent_us[lender] = self._lent_us.get(lender, 0) + share_us
            spot.settled_ms = until_ms
        return spot


def _slice(spot: _Spot, wall_us: int) -> list[tuple[str, TimeState, str, int, int]]:
    """(endpoint, state, lender, held, share) of a stretch in which nothing changed; shares sum to `wall_us`."""
    used = sum(resident.nbytes for resident in spot.residents.values())
    free = max(spot.accelerator.memory_bytes - used, 0)
    *shares, rest = _apportion(wall_us, [*(r.nbytes for r in spot.residents.values()), free or (not used)])
    there = {resident.endpoint for resident in spot.residents.values()}
    away = {owner: nbytes for owner, nbytes in spot.owners.items() if owner not in there}
    owed = sum(away.values())
    lent = max(min(owed - free, used), 0)
    found = []
    for resident, share in zip(spot.residents.values(), shares, strict=True):
        borrowed = share * lent // used if lent else 0
        found.append((resident.endpoint, resident.state, "", wall_us, share - borrowed))
        for owner, part in zip(away, _apportion(borrowed, list(away.values())), strict=True):
            if part:
                found.append((resident.endpoint, resident.state, owner, 0, part))
    found += [(sleeper.endpoint, TimeState.ASLEEP, "", wall_us, 0) for sleeper in spot.sleepers.values()]
    if rest:
        found.append(("", TimeState.UNREPORTED if spot.blind else TimeState.FREE, "", 0, rest))
    return found


def _apportion(total: int, weights: list[int]) -> list[int]:
    """`total` in whole parts proportional to `weights`, summing to it exactly (all of it to nobody when all are 0)."""
    whole, cut, parts = sum(weights), 0, []
    reached = 0
    for weight in weights:
        reached += weight
        following = total * reached // whole if whole else 0
        parts.append(following - cut)
        cut = following
    return parts


def _page(node: str, machine: _Machine) -> TimePage:
    cells = tuple(TimeCell(key[0], node, *key[1:], *durations) for key, durations in sorted(machine.cells.items()))
    return TimePage(node, machine.paged_ms, machine.accounted_ms, cells)
