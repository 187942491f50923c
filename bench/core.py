"""`tidegate bench core`: what one event costs the capacity core as the fleet grows.

A fleet of E endpoints on E/10 accelerators (8 a node) is driven with Zipf-distributed traffic: requests come, are
served in about a second, endpoints swap; all are asleep at first. Nodes and gateways answer at once. Each
`FleetCore.handle` is timed in CPU time of its thread (so a busy machine does not show); the first third of the events
is warm-up. Run: `python bench/core.py` (prints JSON).
"""

from bisect import bisect_left
from heapq import heappop, heappush
from itertools import accumulate
from random import Random
from time import thread_time_ns

from bench import main
from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.plan import DemandReported, FenceConfirmed, ReplicaChanged, ReplicaStatus, Tick
from tidegate.domain.replica import ReplicaState
from tidegate.policy.reconcile import CoreSettings, FleetCore

GB = 1_000_000_000
SIZES = (10, 100, 1_000, 10_000)
EVENTS = 30_000


def run(sizes: tuple[int, ...] = SIZES, events: int = EVENTS) -> dict[str, object]:
    """Per fleet size: event cost in µs (mean, p50, p99, max) and commands given; the growth of p99 over the sizes."""
    rows = [measure(size, events) for size in sizes]
    return {
        "bench": "core",
        "target_us_p99_at_10000": 1_000,
        "rows": rows,
        "p99_growth": round(rows[-1]["p99_us"] / max(rows[0]["p99_us"], 1e-9), 2),
        "fleet_growth": sizes[-1] // sizes[0],
    }


def measure(endpoints: int, events: int) -> dict[str, float]:
    driver = Driver(endpoints)
    spent = driver.drive(events)
    steady = sorted(spent[len(spent) // 3 :])
    return {
        "endpoints": endpoints,
        "accelerators": max(1, endpoints // 10),
        "events": len(steady),
        "mean_us": round(sum(steady) / len(steady) / 1e3, 1),
        "p50_us": round(steady[len(steady) // 2] / 1e3, 1),
        "p99_us": round(steady[len(steady) * 99 // 100] / 1e3, 1),
        "max_us": round(steady[-1] / 1e3, 1),
        "activations": driver.activations,
    }


class Driver:
    def __init__(self, endpoints: int) -> None:
        self.core = FleetCore(CoreSettings(first_load=False))
        self.dice = Random(7)
        self.names = [f"t/e{i}" for i in range(endpoints)]
        self.weights = list(accumulate(1.0 / (i + 1) for i in range(endpoints)))
        self.held = dict.fromkeys(self.names, 0)
        self.running = dict.fromkeys(self.names, 0)
        self.total = dict.fromkeys(self.names, 0)
        self.routed = dict.fromkeys(self.names, False)
        self.endpoint_of: dict[str, str] = {}
        self.heap: list[tuple[int, int, object]] = []
        self.order = 0
        self.now = 1_000
        self.spent: list[int] = []
        self.activations = 0
        self.tell(plan.GatewayJoined("gw", "local"))
        for name in self.names:
            self.tell(plan.EndpointApplied(_deployment(name)))
        left = max(1, endpoints // 10)
        nodes = -(-left // 8)
        for number in range(nodes):
            units = tuple(Accelerator(f"acc-{i}", "h200", 130 * GB) for i in range(min(8, left - 8 * number)))
            node = Node(f"node-{number}", "local", units, 3_000 * GB, 15_000 * GB)
            self.tell(plan.NodeJoined(node, tuple(self.asleep(name, node.id) for name in self.names[number::nodes])))
        self.spent.clear()

    def asleep(self, name: str, node: str) -> ReplicaStatus:
        """Every endpoint has been loaded before: the fleet is met as it is in the middle of a day."""
        replica = f"{name}-0"
        self.endpoint_of[replica] = name
        return ReplicaStatus(replica, name, node, 1, ReplicaState.ASLEEP, host_bytes=30 * GB)

    def drive(self, events: int) -> list[int]:
        gap_ms = max(1, 1_000 * 10 // len(self.names))
        next_arrival = self.now
        while len(self.spent) < events:
            tick = self.core.next_tick_ms()
            at = min(next_arrival, self.heap[0][0] if self.heap else next_arrival)
            if tick is not None and tick <= at:
                self.now = max(self.now, tick)
                self.tell(Tick())
            elif self.heap and self.heap[0][0] <= next_arrival:
                self.now, _, event = heappop(self.heap)
                self.happen(event)
            else:
                self.now = next_arrival
                next_arrival += self.dice.randrange(1, 2 * gap_ms + 1)
                self.arrive(self.names[bisect_left(self.weights, self.dice.random() * self.weights[-1])])
        return self.spent

    def arrive(self, name: str) -> None:
        self.total[name] += 1
        self.held[name] += 1
        self.grant(name)
        self.report(name)

    def grant(self, name: str) -> None:
        if self.routed[name] and self.held[name]:
            for _ in range(self.held[name]):
                self.later(self.dice.randrange(200, 2_000), ("done", name))
            self.running[name] += self.held[name]
            self.held[name] = 0

    def happen(self, event: object) -> None:
        match event:
            case ("done", str(name)):
                self.running[name] -= 1
                self.report(name)
            case _:
                self.tell(event)

    def report(self, name: str) -> None:
        self.tell(DemandReported("gw", name, self.held[name], self.running[name], self.total[name]))

    def later(self, delay: int, event: object) -> None:
        self.order += 1
        heappush(self.heap, (self.now + delay, self.order, event))

    def tell(self, event: object) -> None:
        began = thread_time_ns()
        commands = self.core.handle(event, self.now)  # type: ignore[arg-type]
        self.spent.append(thread_time_ns() - began)
        for command in commands:
            self.obey(command)

    def obey(self, command: plan.Command) -> None:
        match command:
            case plan.Start():
                self.activations += 1
                self.endpoint_of[command.replica] = command.deployment.endpoint
                self.answer(command, ReplicaState.READY, 8_000, command.accelerators, command.accelerator_bytes)
            case plan.Wake():
                self.activations += 1
                self.answer(command, ReplicaState.READY, 700, command.accelerators, command.accelerator_bytes)
            case plan.Sleep():
                self.answer(command, ReplicaState.ASLEEP, 50)
            case plan.Stop():
                self.answer(command, ReplicaState.STOPPED, 50)
            case plan.Pause():
                raise AssertionError("there is no batch here")
            case plan.Drain():
                self.later(2, FenceConfirmed("gw", command.replica, command.fence))
            case plan.Route():
                self.routed[command.endpoint] = bool(command.targets)
                self.grant(command.endpoint)
            case plan.Resume():
                self.routed[command.endpoint] = True
                self.grant(command.endpoint)

    def answer(
        self,
        command: plan.Start | plan.Wake | plan.Sleep | plan.Stop,
        state: ReplicaState,
        took_ms: int,
        accelerators: tuple[str, ...] = (),
        nbytes: int = 0,
    ) -> None:
        status = ReplicaStatus(
            replica=command.replica,
            endpoint=self.endpoint_of[command.replica],
            node=command.node,
            generation=1,
            state=state,
            accelerators=accelerators,
            accelerator_bytes=nbytes,
            host_bytes=30 * GB if state is ReplicaState.ASLEEP else 0,
            took_ms=took_ms,
            address="x" if state is ReplicaState.READY else "",
        )
        self.later(took_ms, ReplicaChanged(status))


def _deployment(name: str) -> Deployment:
    model = ModelProfile("m", f"digest-{name}", ModelKind.GENERATIVE, 30 * GB, 196_608, 8_192)
    return Deployment(
        endpoint=name,
        tenant="t",
        model=model,
        mode=Mode.DEDICATED_SERVERLESS,
        accelerator_bytes=40 * GB,
        host_bytes=30 * GB,
        slots=64,
        concurrency_target=64,
        movable=True,
    )


if __name__ == "__main__":
    main(run)
