"""The simulated platform: one gateway running `dispatch`, the capacity core, simulated nodes, one virtual clock.

Whatever happens goes through one heap ordered by (instant, order of planning); nothing reads a real clock or unseeded
dice. The laws of the design are checked at each step, by what is true on the nodes and not by what the core believes.
"""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import assert_never

from tidegate import dispatch
from tidegate.dispatch import Arrived, ConfirmFence, Deadline, Ended, Grant, Refuse, ReportDemand, Returned
from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment
from tidegate.domain.plan import Command, DemandReported, FenceConfirmed, ReplicaChanged, Tick
from tidegate.domain.replica import ReplicaState
from tidegate.policy.reconcile import FleetCore
from tidegate.sim.compute import NEVER, Compute, Request
from tidegate.sim.harvest import Job
from tidegate.sim.meter import Meter
from tidegate.sim.nodes import LawBroken, Process, SimNode
from tidegate.sim.profile import FleetProfile
from tidegate.sim.timeline import Timeline
from tidegate.sim.trace import Row

S = ReplicaState
GATEWAY = "gw"
MESSAGE_MS = 1.0
REPORT_MS = 100.0
HOLD_MS_MAX = 120_000
QUEUED_MAX = 100_000
THRASH_MS = 60_000.0
BATCH_WINDOW_MS = 86_400_000
REFUSED_AGAIN_MS = 1_000.0

Happening = Callable[..., None]


class World:
    """One run. `core` decides; `rows` are replayed; the verdict is in `meter`."""

    def __init__(self, profile: FleetProfile, core: FleetCore, meter: Meter, hold_ms_max: int = HOLD_MS_MAX) -> None:
        self.profile = profile
        self.core = core
        self.meter = meter
        self.room = dispatch.Dispatch("local")
        self.nodes: dict[str, SimNode] = {}
        self.now_ms = 0.0
        self.requests: dict[str, Request] = {}
        self.fences: dict[str, int] = {}
        self.job: Job | None = None
        self.watch: list[Callable[[Command, float], None]] = []
        self.timeline: Timeline | None = None
        self._hold_ms_max = hold_ms_max
        self._where: dict[str, SimNode] = {}
        self._evicted: dict[str, float] = {}
        self._heap: list[tuple[float, int, Happening, tuple[object, ...]]] = []
        self._stirred: dict[Compute, None] = {}
        self._order = 0
        self._next_id = 0
        self._tick_ms = NEVER
        self._deadline_ms = NEVER
        self.tell(plan.GatewayJoined(GATEWAY, "local"))

    # --- set-up -------------------------------------------------------------------------------------------------------

    def add_node(self, node: SimNode) -> None:
        self.nodes[node.node.id] = node
        self.tell(plan.NodeJoined(node.node))

    def apply(self, deployment: Deployment) -> None:
        self.tell(plan.EndpointApplied(deployment))

    # --- the clock ----------------------------------------------------------------------------------------------------

    def run(
        self,
        rows: Iterator[Row],
        progress: Callable[[int], None] | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        """Replay `rows` from now on, then let what is under way end; ends at once when `give_up` says so."""
        heap, began_ms = self._heap, self.now_ms
        for trace_ms, endpoint, input_tokens, output_tokens in rows:
            at_ms = began_ms + trace_ms
            while heap and heap[0][0] <= at_ms:
                self._step()
            self.now_ms = at_ms
            self._arrive(endpoint, input_tokens, output_tokens)
            self._plan_computes()
            if progress is not None and self._next_id % 10_000 == 0:
                progress(self._next_id)
            if give_up is not None and give_up():
                return
        end_ms = self.now_ms + self._hold_ms_max + 3_600_000.0
        open_lines = self.job.open if self.job is not None else {}
        while len(self.requests) > len(open_lines) and heap and heap[0][0] <= end_ms:
            self._step()
        if len(self.requests) > len(open_lines):
            raise LawBroken(f"{len(self.requests) - len(open_lines)} requests never ended")
        if self.job is not None and self.job.ended_ms < 0:
            self.job.end(self.now_ms, self.live_ms())

    def run_until(self, until_ms: float) -> None:
        while self._heap and self._heap[0][0] <= until_ms:
            self._step()
        self.now_ms = until_ms

    def at(self, at_ms: float, happening: Happening, *about: object) -> None:
        self._order += 1
        heappush(self._heap, (at_ms if at_ms > self.now_ms else self.now_ms, self._order, happening, about))

    def _step(self) -> None:
        """The next happening."""
        self.now_ms, _, happening, about = heappop(self._heap)
        happening(*about)
        if self._stirred:
            self._plan_computes()

    # --- the core and its commands ------------------------------------------------------------------------------------

    def tell(self, event: plan.Event) -> None:
        for command in self.core.handle(event, int(self.now_ms)):
            for see in self.watch:
                see(command, self.now_ms)
            self._obey(command)
        tick = self.core.next_tick_ms()
        if tick is not None and tick < self._tick_ms:
            self._tick_ms = float(tick)
            self.at(self._tick_ms, self._tick)

    def _tick(self) -> None:
        if self.now_ms >= self._tick_ms:
            self._tick_ms = NEVER
            self.tell(Tick())

    def _obey(self, command: Command) -> None:
        match command:
            case plan.Route() | plan.Resume():
                self.at(self.now_ms + MESSAGE_MS, self._gateway, command)
            case plan.Drain():
                self._count_eviction(command)
                self.fences[command.replica] = command.fence
                self.at(self.now_ms + MESSAGE_MS, self._drain, command)
            case plan.Prefetch():
                pass  # simulated models are on every node's disk: nothing is remote here
            case plan.Start():
                self.meter.starts += 1
                self._count_activation(command.deployment.endpoint, command.reason.rule)
                node = self.nodes[command.node]
                self._where[command.replica] = node
                until = node.start(command, self.profile.model_of(command.deployment.endpoint), self.now_ms)
                self._finish_at(node, node.processes[command.replica], until)
            case plan.Wake():
                node = self.nodes[command.node]
                process = node.processes[command.replica]
                self._count_activation(process.deployment.endpoint, command.reason.rule)
                self._finish_at(node, process, node.wake(command, self.now_ms))
            case plan.Sleep():
                node = self.nodes[command.node]
                sleeper = node.processes.get(command.replica)
                if sleeper is not None:  # else it died, and the news of that is on its way
                    self._finish_at(node, sleeper, node.sleep(command, self.now_ms))
            case plan.Pause():
                self._pause(command)
            case plan.Stop():
                stopping = self.nodes.get(command.node)
                stopped = stopping.stop(command, self.now_ms) if stopping is not None else None
                if stopping is not None and stopped is not None:
                    self._stopping(stopping, stopping.processes[command.replica], *stopped)
            case _:
                assert_never(command)

    def _drain(self, command: plan.Drain) -> None:
        """Gateways hear of it; on an abort they hang up, and the engine forgets what it was asked."""
        self._gateway(command)
        node = self.nodes.get(command.node)
        process = node.processes.get(command.replica) if command.abort and node is not None else None
        if node is not None and process is not None and process.state is S.READY:
            lost = node.abort(process, self.now_ms)
            self._stirred[node.compute_of(process)] = None
            self._give_back(lost)

    def _pause(self, command: plan.Pause) -> None:
        node = self.nodes.get(command.node)
        process = node.processes.get(command.replica) if node is not None else None
        if node is not None and process is not None:
            node.pause(process, command.on, self.now_ms)
            if process.accelerators:
                self._stirred[node.compute_of(process)] = None
            self.at(self.now_ms + MESSAGE_MS, self.report, node, process)

    def _stopping(self, node: SimNode, process: Process, until_ms: float, lost: list[Request]) -> None:
        if process.accelerators:
            self._stirred[node.compute_of(process)] = None
        if lost:  # gateways see its streams break off, after what they were told before
            self.at(self.now_ms + MESSAGE_MS, self._give_back, lost)
        self._finish_at(node, process, until_ms)

    def _finish_at(self, node: SimNode, process: Process, until_ms: float) -> None:
        step = process.step
        self.at(until_ms, self._finished, node, process, step)

    def _finished(self, node: SimNode, process: Process, step: int) -> None:
        if process.step != step or node.node.id not in self.nodes:
            return
        compute = node.compute_of(process) if process.accelerators else None
        lost = node.finish(process, self.now_ms)
        if compute is not None:  # who shared its accelerator goes on at another pace
            self._stirred[compute] = None
        self.report(node, process)
        self._give_back(lost)

    def report(self, node: SimNode, process: Process, reason: str = "") -> None:
        status = node.status(process, self.now_ms, reason)
        if self.timeline is not None:
            self.timeline.replica(status, self.now_ms)
        self.tell(ReplicaChanged(status))
        if self.job is not None and process.deployment.endpoint == self.job.endpoint and process.state is S.READY:
            self._ask_lines()

    def crash(self, node: SimNode, process: Process) -> None:
        """The engine dies on its own."""
        compute = node.compute_of(process) if process.accelerators else None
        lost = node.kill(process, self.now_ms)
        if compute is not None:
            self._stirred[compute] = None
        self.report(node, process, "engine died")
        self._give_back(lost)

    def lose_node(self, node_id: str) -> SimNode:
        """Power cut. Returns the dead node, so that its like can join later."""
        node = self.nodes.pop(node_id)
        lost = [r for process in list(node.processes.values()) for r in node.kill(process, self.now_ms)]
        self.tell(plan.NodeLost(node_id))
        self._give_back(lost)
        return node

    # --- the gateway --------------------------------------------------------------------------------------------------

    def _arrive(self, endpoint: str, input_tokens: int, output_tokens: int) -> None:
        self._next_id += 1
        request = Request(str(self._next_id), endpoint, self.now_ms, input_tokens, output_tokens)
        self.requests[request.id] = request
        deadline = int(self.now_ms) + self._hold_ms_max
        late_ms = int(self.now_ms + self.meter.slo_ttft_ms)
        self._gateway(Arrived(request.id, endpoint, deadline, QUEUED_MAX, late_ms=late_ms))

    def _gateway(self, event: dispatch.Event) -> None:
        effects = self.room.handle(event, int(self.now_ms))
        for effect in effects:
            match effect:
                case Grant():
                    self._granted(effect)
                case ReportDemand(endpoint, urgent):
                    delay = MESSAGE_MS if urgent else REPORT_MS
                    self.at(self.now_ms + delay, self._demand, endpoint)
                case ConfirmFence(replica):
                    confirmed = FenceConfirmed(GATEWAY, replica, self.fences.get(replica, 0))
                    self.at(self.now_ms + MESSAGE_MS, self.tell, confirmed)
                case Refuse():
                    self._refused(self.requests.pop(effect.request))
                case _:
                    assert_never(effect)
        deadline = self.room.next_deadline_ms()
        if deadline is not None and deadline < self._deadline_ms:
            self._deadline_ms = float(deadline)
            self.at(self._deadline_ms, self._expire)

    def _expire(self) -> None:
        self._deadline_ms = NEVER
        self._gateway(Deadline())

    def _demand(self, endpoint: str) -> None:
        d = self.room.demand(endpoint, int(self.now_ms))
        self.tell(DemandReported(GATEWAY, endpoint, d.queued, d.in_flight, d.arrivals_total, d.oldest_wait_ms, d.busy))

    def _granted(self, grant: Grant) -> None:
        request = self.requests[grant.request]
        request.activation_ms, request.granted_ms = grant.activation_ms, self.now_ms
        replica = grant.target.replica
        node = self._where[replica]
        process = node.processes.get(replica)
        if process is None or process.state is not S.READY:
            self.at(self.now_ms + MESSAGE_MS, self._gateway, Returned(request.id, process is None))
            return
        compute = node.compute_of(process)
        compute.submit(replica, request, self.now_ms)
        self._stirred[compute] = None

    def _give_back(self, lost: list[Request]) -> None:
        """Requests whose engine died: tried once more unless their client has seen a token, lines of a batch always."""
        for request in lost:
            line = self.job is not None and self.job.lost(request)
            if line or request.first_ms < 0:
                self._gateway(Returned(request.id, lost=True))
            else:
                del self.requests[request.id]
                self._gateway(Ended(request.id))
                self._not_served(request)

    # --- batch --------------------------------------------------------------------------------------------------------

    def begin_job(self, job: Job, deployment: Deployment) -> None:
        """From now on its lines are asked, while its endpoint has the lowest class."""
        self.job = job
        self.room.prompt = True
        job.began_ms, job.live_ms = self.now_ms, self.live_ms()
        self.apply(deployment)
        self._ask_lines()

    def live_ms(self) -> float:
        """Accelerator time spent on real-time requests so far."""
        return sum(sum(c.busy_ms.values()) for node in self.nodes.values() for c in node.computes)

    def _ask_lines(self) -> None:
        """As many as the job's ready replicas take, and one more would."""
        job = self.job
        if job is None or job.ended_ms >= 0 or self.now_ms < job.paused_until_ms:
            return
        nodes = self.nodes.values()
        ready = sum(
            p.deployment.endpoint == job.endpoint and p.state is S.READY for n in nodes for p in n.processes.values()
        )
        for _ in range(job.slots * (ready + 1) - len(job.open)):
            if self.now_ms < job.paused_until_ms or (line := job.next()) is None:
                break
            self._next_id += 1
            request = Request(str(self._next_id), job.endpoint, self.now_ms, *line)
            self.requests[request.id] = request
            job.open[request.id] = line
            self._gateway(Arrived(request.id, job.endpoint, int(self.now_ms) + BATCH_WINDOW_MS, QUEUED_MAX))
        if not job.left:
            job.end(self.now_ms, self.live_ms())
            self.room.prompt = False
            self._gateway(plan.EndpointRemoved(job.endpoint))
            self.at(self.now_ms, self.tell, plan.EndpointRemoved(job.endpoint))

    def _refused(self, request: Request) -> None:
        if self.job is not None and request.endpoint == self.job.endpoint:
            self.job.refused(request.id)
            if self.now_ms >= self.job.paused_until_ms:
                self.job.paused_until_ms = self.now_ms + REFUSED_AGAIN_MS
                self.at(self.job.paused_until_ms, self._ask_lines)
        else:
            self._not_served(request)

    # --- compute ------------------------------------------------------------------------------------------------------

    def _plan_computes(self) -> None:
        """Once a happening is over, however much it changed: when does something end next where it changed anything?"""
        for compute in self._stirred:
            due_ms = compute.due_ms()
            if due_ms < NEVER:
                self.at(due_ms, self._computed, compute, compute.stamp)
        self._stirred.clear()

    def _computed(self, compute: Compute, stamp: int) -> None:
        if compute.stamp != stamp:
            return
        for request in compute.collect(self.now_ms):
            self._served(request)
        self._stirred[compute] = None

    def _served(self, request: Request) -> None:
        del self.requests[request.id]
        if self.job is not None and request.endpoint == self.job.endpoint:
            self.job.finished(request)
            self._gateway(Ended(request.id))
            self._ask_lines()
            return
        attained = self.meter.served(request, self.now_ms)
        if self.timeline is not None:
            beyond_ms, cold = request.beyond_ms, request.activation_ms > 0
            self.timeline.request(request.endpoint, request.arrived_ms, beyond_ms, attained, cold)
        self._gateway(Ended(request.id))

    def _not_served(self, request: Request) -> None:
        self.meter.not_served(request)
        if self.timeline is not None:
            self.timeline.request(request.endpoint, request.arrived_ms, None, False, request.activation_ms > 0)

    # --- counting -----------------------------------------------------------------------------------------------------

    def _count_activation(self, endpoint: str, rule: str) -> None:
        if rule == "first_load":
            return
        self.meter.activations += 1
        evicted_ms = self._evicted.pop(endpoint, None)
        if evicted_ms is not None and self.now_ms - evicted_ms <= THRASH_MS:
            self.meter.undone += 1

    def _count_eviction(self, command: plan.Drain) -> None:
        if command.reason.rule.startswith("evict"):
            self.meter.evictions += 1
            self._evicted[command.endpoint] = self.now_ms
