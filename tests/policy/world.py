"""A scripted world for the core: nodes that really count bytes, gateways that really count requests, in virtual time.

It knows what is true (which bytes are in use, which request runs where) and checks the core's commands against it.
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.plan import Command, Event, ReplicaChanged, ReplicaStatus
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.reconcile import CoreSettings, FleetCore

GB = 1 << 30


def deployment(name: str, gb: int = 4, **changes: object) -> Deployment:
    model = ModelProfile(f"file:///{name}", f"digest-{name}", ModelKind.GENERATIVE, gb * GB, 1024, 4096)
    values = {"mode": Mode.DEDICATED_SERVERLESS, "accelerator_bytes": gb * GB, "host_bytes": gb * GB, "slots": 4}
    values |= {"concurrency_target": 4, **changes}
    return Deployment(endpoint=name, tenant="t", model=model, **values)  # type: ignore[arg-type]


def node(name: str, accelerators: int = 1, gb: int = 8, host_gb: int = 64, region: str = "local") -> Node:
    units = tuple(Accelerator(f"acc-{i}", "test", gb * GB) for i in range(accelerators))
    return Node(name, region, units, host_gb * GB, 1000 * GB)


@dataclass
class Truth:
    """What one engine process really is and holds."""

    id: str
    endpoint: str
    node: str
    accelerators: tuple[str, ...]
    nbytes: int
    host_bytes: int
    generation: int
    state: S
    busy_until: int = 0
    order: int = 0
    paused: bool = False
    copy: str = ""  # what it shares with all others that name it

    @property
    def holder(self) -> str:
        return self.copy or self.id


@dataclass
class Gateway:
    routes: dict[str, plan.Route] = field(default_factory=dict)
    draining: dict[str, int] = field(default_factory=dict)
    held: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    running: dict[str, list[str]] = field(default_factory=dict)
    arrivals: dict[str, int] = field(default_factory=dict)


class World:
    """`faults` maps a command kind to the chance that it fails; `lie` the chance that a sleep frees nothing."""

    def __init__(self, settings: CoreSettings | None = None, seed: int = 0, **faults: float) -> None:
        self.core = FleetCore(settings)
        self.dice = Random(seed)
        self.faults = faults
        self.now = 1_000_000
        self.heap: list[tuple[int, int, object]] = []
        self.seq = 0
        self.nodes: dict[str, Node] = {}
        self.truth: dict[str, Truth] = {}
        self.gateways: dict[str, Gateway] = {}
        self.log: list[Command] = []
        self.served: dict[str, int] = {}
        self.waits: dict[str, list[int]] = {}
        self.deployments: dict[str, Deployment] = {}

    # --- driving --------------------------------------------------------------------------------------------------

    def tell(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, self.now)
        for command in commands:
            self.log.append(command)
            self.obey(command)
        return commands

    def later(self, delay: int, thing: object) -> None:
        self.seq += 1
        heappush(self.heap, (self.now + delay, self.seq, thing))

    def run(self, duration: int) -> None:
        end = self.now + duration
        steps = 0
        while True:
            tick = self.core.next_tick_ms()
            at = min(self.heap[0][0] if self.heap else end + 1, tick if tick is not None else end + 1)
            if at > end:
                break
            self.now = max(self.now, at)
            if self.heap and self.heap[0][0] <= self.now:
                _, _, thing = heappop(self.heap)
                self.happen(thing)
            else:
                self.tell(plan.Tick())
            steps += 1
            assert steps < 200_000, "the core does not come to rest"
        self.now = end

    def happen(self, thing: object) -> None:
        match thing:
            case ("node", str(replica), S() as state, int(order)):
                self.node_step(replica, state, order)
            case ("told", str(replica)):
                if replica in self.truth and self.truth[replica].state is S.READY:
                    self.tell(ReplicaChanged(self.status(self.truth[replica])))
            case ("done", str(gateway), str(replica), str(endpoint)):
                self.request_done(gateway, replica, endpoint)
            case _:
                self.tell(thing)  # type: ignore[arg-type]

    # --- users and operators --------------------------------------------------------------------------------------

    def apply(self, wanted: Deployment) -> None:
        self.deployments[wanted.endpoint] = wanted
        self.tell(plan.EndpointApplied(wanted))

    def join(self, *nodes: Node) -> None:
        for one in nodes:
            self.nodes[one.id] = one
            alive = tuple(self.status(t) for t in self.truth.values() if t.node == one.id and t.state is not S.STOPPED)
            self.tell(plan.NodeJoined(one, alive))

    def lose_node(self, name: str) -> None:
        """Power cut: its engines are gone, too."""
        for replica in [t.id for t in self.truth.values() if t.node == name]:
            self.drop_running(replica)
            del self.truth[replica]
        del self.nodes[name]
        self.tell(plan.NodeLost(name))

    def add_gateway(self, name: str) -> None:
        fresh = Gateway()
        for other in self.gateways.values():
            fresh.routes = dict(other.routes)
            fresh.draining = dict(other.draining)
            break
        self.gateways[name] = fresh
        self.tell(plan.GatewayJoined(name, "local"))

    def lose_gateway(self, name: str) -> None:
        del self.gateways[name]
        self.tell(plan.GatewayLost(name))

    def ask(self, endpoint: str, service_ms: int = 50, gateway: str = "gw") -> None:
        entry = self.gateways[gateway]
        entry.arrivals[endpoint] = entry.arrivals.get(endpoint, 0) + 1
        entry.held.setdefault(endpoint, []).append((self.now, service_ms))
        self.grant(gateway, endpoint)
        self.report(gateway, endpoint)

    # --- gateways -------------------------------------------------------------------------------------------------

    def grant(self, gateway: str, endpoint: str) -> None:
        entry = self.gateways[gateway]
        route = entry.routes.get(endpoint)
        held = entry.held.get(endpoint, [])
        while held and route is not None:
            open_targets = [
                t for t in route.targets
                if t.replica not in entry.draining and len(entry.running.get(t.replica, ())) < t.slots
            ]  # fmt: skip
            if not open_targets:
                return
            target = open_targets[0]
            asked, service_ms = held.pop(0)
            engine = self.truth.get(target.replica)
            if engine is None or engine.state is not S.READY:
                held.insert(0, (asked, service_ms))
                return
            entry.running.setdefault(target.replica, []).append(endpoint)
            self.waits.setdefault(endpoint, []).append(self.now - asked)
            self.later(service_ms, ("done", gateway, target.replica, endpoint))

    def request_done(self, gateway: str, replica: str, endpoint: str) -> None:
        entry = self.gateways.get(gateway)
        if entry is None or endpoint not in entry.running.get(replica, ()):
            return
        if self.truth[replica].paused:
            self.later(10, ("done", gateway, replica, endpoint))
            return
        entry.running[replica].remove(endpoint)
        self.served[endpoint] = self.served.get(endpoint, 0) + 1
        self.grant(gateway, endpoint)
        self.report(gateway, endpoint)
        self.confirm(gateway, replica)

    def drop_running(self, replica: str) -> None:
        for entry in self.gateways.values():
            for endpoint in entry.running.pop(replica, []):
                entry.held.setdefault(endpoint, []).insert(0, (self.now, 50))

    def confirm(self, gateway: str, replica: str) -> None:
        entry = self.gateways[gateway]
        if replica in entry.draining and not entry.running.get(replica):
            self.later(2, plan.FenceConfirmed(gateway, replica, entry.draining[replica]))

    def report(self, gateway: str, endpoint: str) -> None:
        entry = self.gateways[gateway]
        held = entry.held.get(endpoint, [])
        in_flight = sum(running.count(endpoint) for running in entry.running.values())
        oldest = self.now - held[0][0] if held else 0
        busy = tuple(replica for replica, running in entry.running.items() if endpoint in running)
        arrivals = entry.arrivals.get(endpoint, 0)
        self.later(1, plan.DemandReported(gateway, endpoint, len(held), in_flight, arrivals, oldest, busy))

    # --- commands -------------------------------------------------------------------------------------------------

    def obey(self, command: Command) -> None:
        match command:
            case plan.Start():
                assert command.replica not in self.truth, "one engine for one replica"
                wanted = command.deployment
                self.truth[command.replica] = Truth(
                    command.replica,
                    wanted.endpoint,
                    command.node,
                    (),
                    0,
                    wanted.host_bytes,
                    wanted.generation,
                    S.STOPPED,
                    copy=wanted.model.digest if wanted.one_copy else "",
                )
                self.occupy(command.replica, command.accelerators, command.accelerator_bytes)
                self.step_later(command.replica, S.STARTING, S.READY, 400, "start")
            case plan.Wake():
                assert self.truth[command.replica].state is S.ASLEEP, "only what sleeps is woken"
                self.occupy(command.replica, command.accelerators, command.accelerator_bytes)
                self.step_later(command.replica, S.WAKING, S.READY, 60, "wake")
            case plan.Sleep():
                for entry in self.gateways.values():
                    assert not entry.running.get(command.replica), "asleep under a running request"
                self.step_later(command.replica, S.SLEEPING, S.ASLEEP, 10, "sleep")
            case plan.Stop():
                if command.replica in self.truth:
                    self.step_later(command.replica, S.STOPPING, S.STOPPED, 20, "stop")
                elif command.node in self.nodes:
                    gone = ReplicaStatus(command.replica, "", command.node, 0, S.STOPPED)
                    self.later(5, ReplicaChanged(gone))
            case plan.Pause():
                engine = self.truth.get(command.replica)
                if engine is not None and engine.state is S.READY:
                    engine.paused = command.on
                    self.later(3, ("told", command.replica))
            case plan.Drain():
                self.check_drain(command)
                for name, entry in self.gateways.items():
                    entry.draining[command.replica] = command.fence
                    if command.abort:
                        for endpoint in entry.running.pop(command.replica, []):
                            entry.held.setdefault(endpoint, []).insert(0, (self.now, 50))
                    self.confirm(name, command.replica)
            case plan.Resume():
                for name, entry in self.gateways.items():
                    entry.draining.pop(command.replica, None)
                    self.grant(name, command.endpoint)
            case plan.Route():
                for name, entry in self.gateways.items():
                    old = entry.routes.get(command.endpoint)
                    assert old is None or command.version > old.version, "route versions grow"
                    entry.routes[command.endpoint] = command
                    for target in command.targets:
                        assert target.address, "a target has an address"
                        entry.draining.pop(target.replica, None)
                    self.grant(name, command.endpoint)
                    self.report(name, command.endpoint)

    def check_drain(self, command: plan.Drain) -> None:
        wanted = self.deployments.get(command.endpoint)
        ready = [t for t in self.truth.values() if t.endpoint == command.endpoint and t.state is S.READY]
        if wanted is not None and wanted.mode is Mode.DEDICATED and len(ready) <= wanted.reserved:
            own = ("removed", "paused", "manual_sleep", "outdated", "scale_down")
            assert command.reason.rule in own, f"dedicated evicted by {command.reason}"
        assert command.reason.rule

    def occupy(self, replica: str, accelerators: tuple[str, ...], nbytes: int) -> None:
        engine = self.truth[replica]
        for accelerator in self.nodes[engine.node].accelerators:
            if accelerator.id in accelerators:
                used = sum(
                    t.nbytes for t in self.truth.values() if t.node == engine.node and accelerator.id in t.accelerators
                )
                assert used + nbytes <= accelerator.memory_bytes, f"{accelerator.id} overcommitted: {used} + {nbytes}"
        engine.accelerators, engine.nbytes = accelerators, nbytes

    def step_later(self, replica: str, now: S, then: S, typical: int, kind: str) -> None:
        engine = self.truth[replica]
        engine.state = now
        engine.paused = False
        engine.order += 1
        roll = self.dice.random()
        if roll < self.faults.get(kind, 0.0):
            then = S.FAILED if kind in ("start", "wake") else then
        self.later(typical + self.dice.randrange(typical), ("node", replica, then, engine.order))

    def node_step(self, replica: str, state: S, order: int) -> None:
        engine = self.truth.get(replica)
        if engine is None or engine.order != order:
            return
        engine.state = state
        if state is S.ASLEEP and self.dice.random() >= self.faults.get("lie", 0.0):
            engine.nbytes, engine.accelerators = 0, ()
            asleep = [t for t in self.truth.values() if t.node == engine.node and t.state is S.ASLEEP]
            host = sum({t.holder: t.host_bytes for t in asleep}.values())
            assert host <= self.nodes[engine.node].host_memory_bytes, "host memory overcommitted"
        status = self.status(engine)
        if state in (S.STOPPED, S.FAILED):
            self.drop_running(replica)
        if state is S.STOPPED:
            del self.truth[replica]
        self.tell(ReplicaChanged(status))
        if self.dice.random() < self.faults.get("double", 0.0):
            self.later(self.dice.randrange(1, 300), ReplicaChanged(status))

    def crash(self, replica: str) -> None:
        engine = self.truth.get(replica)
        if engine is not None:
            self.later(0, ("node", replica, S.STOPPED, engine.order))

    def status(self, engine: Truth) -> ReplicaStatus:
        ready = engine.state is S.READY
        return ReplicaStatus(
            replica=engine.id,
            endpoint=engine.endpoint,
            node=engine.node,
            generation=engine.generation,
            state=engine.state,
            accelerators=engine.accelerators,
            accelerator_bytes=engine.nbytes,
            host_bytes=engine.host_bytes if engine.state is S.ASLEEP and not engine.copy else 0,
            copy_bytes=engine.host_bytes if engine.copy and engine.state in (S.READY, S.ASLEEP) else 0,
            took_ms=60,
            address=f"unix:{engine.id}" if ready else "",
            reason="scripted fault" if engine.state in (S.FAILED, S.STOPPED) else "",
            paused=engine.paused,
        )
