"""Everything the core believes, in one place, with the indexes that keep an event's cost independent of the fleet's
size.
"""

from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tidegate.domain.endpoint import Deployment, EndpointState, Mode, ModelProfile, ScheduleEntry
from tidegate.domain.fleet import Node, Tier
from tidegate.domain.plan import Command, DemandReported, ReplicaStatus, Target
from tidegate.domain.replica import COMING, ReplicaState
from tidegate.policy import scaling
from tidegate.policy.book import Book, Place
from tidegate.policy.costs import Costs
from tidegate.policy.eviction import KeepAlive
from tidegate.policy.forecast import ArrivalHistory, ServiceTime
from tidegate.policy.reconcile.settings import CoreSettings

S = ReplicaState

# Order of claims when several endpoints wait, and the weight of their waiting.
ABORTABLE = (S.READY, S.STARTING)  # batch in one of these makes room at once
CLASS_RANK = {Mode.DEDICATED: 0, Mode.DEDICATED_SERVERLESS: 1, Mode.SERVERLESS: 2, Mode.BATCH: 3}


@dataclass(slots=True, eq=False)
class Replica:
    """Belief about one replica. `deployment` is what it was started as; None if it was met alive and is out of date.

    While DRAINING, `fences` are the gateways that have not confirmed, `keep` says whether it will sleep (or stop),
    `sticky` that the drain must not be called off.
    """

    id: str
    endpoint: str
    node: str
    places: tuple[Place, ...]
    deployment: Deployment | None
    generation: int
    state: ReplicaState
    since_ms: int
    ready_ms: int = 0
    address: str = ""
    fence: int = 0
    fences: dict[str, None] = field(default_factory=dict)
    keep: bool = True
    sticky: bool = False
    rule: str = ""
    counted: bool = False
    cold: Tier = Tier.DISK  # where its weights were when it was started
    note: str = ""  # how far its node says a long start is
    paused_ms: int | None = None  # since when it stands still for others

    @property
    def holder(self) -> str:
        """Who has its weights in host memory: the model, where all replicas on a node keep one copy; else itself."""
        return self.deployment.model.digest if self.deployment is not None and self.deployment.one_copy else self.id


@dataclass(slots=True, eq=False)
class Activation:
    """A decision to bring a replica up that waits until its room is free. `wake` is the sleeping replica, if one."""

    id: str
    endpoint: str
    node: str
    places: tuple[Place, ...]
    bytes_each: int
    wake: Replica | None
    rule: str
    inputs: tuple[tuple[str, str | int | float], ...]


@dataclass(slots=True, eq=False)
class Endpoint:
    """Belief about one endpoint: its desired state, its demand, its replicas and its bad luck.

    `calm_ready` > 0 says that so many replicas serve and nothing is under way: demand they can take needs no steering.
    """

    name: str
    deployment: Deployment
    window: scaling.PeakWindow
    removed: bool = False
    replicas: dict[str, Replica] = field(default_factory=dict)
    activations: dict[str, Activation] = field(default_factory=dict)
    demand: dict[str, DemandReported] = field(default_factory=dict)
    history: ArrivalHistory = field(default_factory=ArrivalHistory)
    keep: KeepAlive = field(default_factory=KeepAlive)
    service: ServiceTime = field(default_factory=ServiceTime)
    queued: int = 0
    in_flight: int = 0
    required: int = 0
    wait_key: tuple[int, int, str] | None = None
    waiting_since_ms: int | None = None
    attempts: int = 0
    searched_ms: int = -1
    p_needed: tuple[int, float] = (-1, 0.0)
    loaded_once: bool = False
    quiet_since_ms: int = 0
    slept_by_hand: bool = False
    woken_until_ms: int = 0
    failures: int = 0
    failed_reason: str = ""
    failed_on: str = ""  # the node of its last failure
    retry_ms: int = 0
    timer_ms: int | None = None
    ahead_ms: int = 0  # when it is looked at next to be brought up ahead of demand
    ahead_until_ms: int = 0  # until when it was expected to be asked, when it was brought up so
    over_since_ms: int | None = None  # since when more replicas are wanted than there are
    calm_ready: int = 0
    stranded: bool = False
    scheduled: ScheduleEntry | None = None
    scheduled_until_ms: int = 0
    route: tuple[EndpointState, tuple[Target, ...], str, str] | None = None
    eta_ms: int = 0
    activation_ms: int = 0

    def at_home(self, fleet: "Fleet", replica: Replica) -> bool:
        return fleet.nodes[replica.node].region == self.deployment.regions[0]

    def live(self, replica: Replica) -> bool:
        """Of the current generation and serving or about to."""
        return self.current(replica) and (replica.state is S.READY or replica.state in COMING)

    def current(self, replica: Replica) -> bool:
        return replica.deployment is self.deployment

    def redeploy(self, deployment: Deployment) -> None:
        """Take over a new desired state; replicas whose engine was built from the same go on as its own."""
        key = runtime_key(deployment)
        for replica in self.replicas.values():
            if replica.deployment is not None and runtime_key(replica.deployment) == key:
                replica.deployment = deployment
        self.deployment = deployment
        self.scheduled, self.scheduled_until_ms = None, 0

    @property
    def floor(self) -> int:
        """Replicas that are never given to others: what is reserved, or what the schedule says instead."""
        reserved = self.deployment.reserved
        if self.scheduled is None:
            return reserved
        dedicated = self.deployment.mode is Mode.DEDICATED
        return max(self.scheduled.min_replicas, reserved if dedicated else 0)

    @property
    def busy(self) -> bool:
        return self.queued > 0 or self.in_flight > 0

    @property
    def load(self) -> int:
        """Requests that ask for replicas: all but those held that present ones get to in time, as fast as measured."""
        ready, rate = self.ready_count() if self.queued else 0, self.service.served_per_s
        return scaling.pressing(self.queued, self.in_flight, ready, rate, self.deployment.slo.ttft_ms)

    @property
    def withdrawn(self) -> bool:
        """It must have no replica, whoever asks."""
        return self.removed or self.deployment.paused or self.slept_by_hand

    def coming(self) -> bool:
        return bool(self.activations) or any(r.state in COMING for r in self.replicas.values())

    def ready_count(self) -> int:
        ready = 0
        for replica in self.replicas.values():  # asked at every event: a loop is twice as fast as a sum
            ready += replica.state is S.READY
        return ready

    def supply(self) -> int:
        """Replicas to count on against demand. One that is starting does not count beside a sleeper while nothing
        serves: waking is faster than what is left of a start.
        """
        ready = starting = waking = asleep = 0
        for replica in self.replicas.values():
            if self.current(replica):
                ready += replica.state is S.READY
                waking += replica.state is S.WAKING
                starting += replica.state is S.STARTING
                asleep += replica.state is S.ASLEEP
        if asleep and not ready and self.queued:
            return waking
        return ready + waking + starting

    def waits_for_wake(self) -> bool:
        """Whether a start would help nobody: a current replica is on its way to the host tier, from where it can be
        woken, or as many as are required are starting, and `supply` leaves them out for a sleeper's sake alone.
        """
        falling_asleep = any(r.state is S.SLEEPING and self.current(r) for r in self.replicas.values())
        return falling_asleep or self.supply() < self.live_count() >= self.required - len(self.activations)

    def live_count(self) -> int:
        own = [r.state for r in self.replicas.values() if r.deployment is self.deployment]
        return len([state for state in own if state is S.READY or state in COMING])


def runtime_key(deployment: Deployment) -> tuple[object, ...]:
    """What a running engine was built from: a change elsewhere (limits, SLO, price plan) needs no new replica."""
    d = deployment
    return d.model, d.engine, d.engine_args, d.slots, d.accelerators_per_replica, d.accelerator_bytes, d.tenant


class Fleet:
    """The beliefs and their indexes. Plain data with bookkeeping; decisions are elsewhere."""

    def __init__(self, settings: CoreSettings) -> None:
        self.settings = settings
        self.book = Book()
        self.costs = Costs(settings.priors)
        self.endpoints: dict[str, Endpoint] = {}
        self.batch: dict[str, None] = {}  # those in batch mode
        self.replicas: dict[str, Replica] = {}
        self.nodes: dict[str, Node] = {}
        self.began_ms = 0
        self.empty_since_ms: dict[str, int] = {}  # region -> since when it has no node any more
        self.region_nodes: dict[str, list[str]] = {}
        self.node_replicas: dict[str, dict[str, Replica]] = {}
        self.gateways: dict[str, str] = {}
        self.gateway_demand: dict[str, dict[str, None]] = {}
        self.residents: dict[Place, dict[str, Replica]] = {}
        self.pending: dict[Place, dict[str, Activation]] = {}
        self.activations: dict[str, Activation] = {}
        # Upper bound on what idle replicas could free, by accelerator: tells at a glance where not to look for victims.
        self.idle_bytes: dict[Place, int] = {}
        self.waiting: list[tuple[int, int, str]] = []
        self.first_loads: dict[str, None] = {}
        self.room_nodes: dict[str, None] = {}
        self.ahead: list[str] = []  # endpoints that come up ahead of demand
        self.dirty: dict[str, None] = {}
        self.unrouted: dict[str, None] = {}
        # Remote models: on whose disk they are whole, by node; and which node was told to fetch one, by digest.
        self.on_disk: dict[str, frozenset[str]] = {}
        self.fetching: dict[str, str] = {}
        self.out: list[Command] = []
        self._timers: list[tuple[int, int, str, str, int]] = []
        self._timer_seq = 0
        self.route_version = 0
        self._last_id = 0

    # --- names and clocks -----------------------------------------------------------------------------------------

    def new_id(self, endpoint: str, now_ms: int) -> str:
        """Unique also over restarts of the core, as its number never falls behind the clock."""
        self._last_id = max(self._last_id + 1, now_ms)
        return f"{endpoint.replace('/', '.')}-{self._last_id:x}"

    def set_timer(self, at_ms: int, kind: str, key: str, stamp: int = 0) -> None:
        self._timer_seq += 1
        heappush(self._timers, (at_ms, self._timer_seq, kind, key, stamp))

    def due(self, now_ms: int) -> list[tuple[str, str, int]]:
        fired, timers = [], self._timers
        while timers and timers[0][0] <= now_ms:
            fired.append(heappop(timers)[2:])
        return fired

    def next_timer_ms(self) -> int | None:
        return self._timers[0][0] if self._timers else None

    def look_again(self, endpoint: Endpoint, at_ms: int) -> None:
        """Steer this endpoint at `at_ms` at the latest. At most a handful of timers an endpoint are ever alive."""
        if endpoint.timer_ms is None or at_ms < endpoint.timer_ms:
            endpoint.timer_ms = at_ms
            self.set_timer(at_ms, "endpoint", endpoint.name, at_ms)

    def cold_tier(self, model: ModelProfile, *nodes: str) -> Tier:
        """Where a start on any of `nodes` finds the weights. A fetch under way is shared, so its node counts as one."""
        near = (model.digest in self.on_disk.get(n, ()) or self.fetching.get(model.digest) == n for n in nodes)
        return Tier.DISK if not model.remote or any(near) else Tier.REMOTE

    def ends_fetching(self, node: str) -> None:
        self.fetching = {digest: fetcher for digest, fetcher in self.fetching.items() if fetcher != node}

    # --- replicas -------------------------------------------------------------------------------------------------

    def add(self, replica: Replica) -> None:
        self.replicas[replica.id] = replica
        self.node_replicas[replica.node][replica.id] = replica
        endpoint = self.endpoints.get(replica.endpoint)
        if endpoint is not None:
            endpoint.replicas[replica.id] = replica

    def found_in_host(self, replica: Replica, status: ReplicaStatus) -> None:
        """Host memory as its node measured it."""
        found = Counter({replica.id: status.host_bytes})
        found[replica.holder] += status.copy_bytes
        for holder, nbytes in found.items():
            self.book.reserve_host(holder, replica.node, nbytes, found=True)

    def forget(self, replica: Replica) -> None:
        """The process is gone: nothing of it stays on the book."""
        self.leave(replica)
        self.book.reserve_host(replica.id, replica.node, 0)
        del self.replicas[replica.id]
        del self.node_replicas[replica.node][replica.id]
        if all(other.holder != replica.holder for other in self.node_replicas[replica.node].values()):
            self.book.reserve_host(replica.holder, replica.node, 0)  # the last one takes the copy along
        endpoint = self.endpoints.get(replica.endpoint)
        if endpoint is not None:
            endpoint.replicas.pop(replica.id, None)
            self.touch(endpoint.name)

    def settle_on(self, replica: Replica, places: tuple[Place, ...], bytes_each: int, *, found: bool = False) -> None:
        """Reserve accelerator memory for `replica` and list it as a resident."""
        self.book.reserve(replica.id, places, bytes_each, found=found)
        replica.places = places
        for place in places:
            self.residents[place][replica.id] = replica

    def count_idle(self, endpoint: Endpoint) -> None:
        """Keep `idle_bytes` true after a change of the endpoint's demand or replicas."""
        mode = endpoint.deployment.mode
        count = endpoint.ready_count()
        spare = mode is Mode.BATCH or (count > endpoint.floor and (not endpoint.busy or count > endpoint.required))
        for replica in endpoint.replicas.values():
            outdated = replica.deployment is not endpoint.deployment
            ready = replica.state in ABORTABLE if mode is Mode.BATCH else replica.state is S.READY
            idle = ready and (spare or outdated)
            if replica.counted is not idle:
                self._count(replica, idle)

    def _count(self, replica: Replica, idle: bool) -> None:
        if replica.counted is not idle:
            replica.counted = idle
            nbytes = self.book.bytes_each(replica.id)
            for place in replica.places:
                self.idle_bytes[place] += nbytes if idle else -nbytes

    def leave(self, replica: Replica) -> tuple[Place, ...]:
        """A report shows the accelerator bytes freed."""
        self.stir(replica)
        self._count(replica, False)
        places = self.book.release(replica.id)
        for place in places:
            del self.residents[place][replica.id]
        return places

    def enter(self, replica: Replica, state: ReplicaState, now_ms: int) -> None:
        if state is not S.READY:
            self._count(replica, False)
            replica.paused_ms = None
        replica.state = state
        replica.since_ms = now_ms
        self.touch(replica.endpoint)
        self.stir(replica)

    def neighbours(self, replica: Replica) -> list[Replica]:
        """Who else is on its accelerators."""
        return [r for place in replica.places for r in self.residents[place].values() if r is not replica]

    def works(self, replica: Replica) -> bool:
        """Whether a real-time request runs on it."""
        owner = None if replica.endpoint in self.batch else self.endpoints.get(replica.endpoint)
        return owner is not None and any(replica.id in demand.busy for demand in owner.demand.values())

    def stir(self, replica: Replica) -> None:
        """It began or ended to work, came or went: batch beside it stands still, or goes on."""
        for neighbour in self.neighbours(replica) if self.batch else ():
            if neighbour.endpoint in self.batch:
                self.touch(neighbour.endpoint)

    def touch(self, name: str) -> None:
        """Something of this endpoint changed: steer it before the event is over."""
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            endpoint.calm_ready = 0
            self.dirty[name] = None
