"""Simulated nodes: they carry out the core's commands with durations from the hardware profile and really count bytes.

Weights in host memory are of two kinds. *Hard*: a sleeping replica's only copy, reserved in the core's book. *Soft*:
the copy a replica left behind when it woke, kept while there is room. A replica with a soft copy sleeps without copying
anything; one without copies its weights back over its link first.
"""

from collections import OrderedDict
from dataclasses import dataclass

from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.plan import ReplicaStatus, Sleep, Start, Stop, Wake
from tidegate.domain.replica import ReplicaState
from tidegate.sim.compute import Compute, Engine, Request
from tidegate.sim.profile import FleetProfile, ModelSpec

S = ReplicaState
STOP_MS = 100.0


class LawBroken(AssertionError):
    """The core did, or would have done, what must never happen."""


@dataclass(slots=True, eq=False)
class Process:
    """One engine process: the truth about it, whatever the core believes."""

    replica: str
    deployment: Deployment
    model: ModelSpec
    state: ReplicaState
    accelerators: tuple[str, ...] = ()
    nbytes: int = 0
    step: int = 0
    began_ms: float = 0.0
    paused: bool = False


@dataclass(slots=True, eq=False)
class Device:
    """One accelerator: its memory in use, its compute (one for all where replicas span several), and until when its
    host link is taken.
    """

    capacity: int
    compute: Compute
    used: int = 0
    link_free_ms: float = 0.0


class SimNode:
    def __init__(self, node_id: str, accelerators: int, profile: FleetProfile, *, gangs: bool = False) -> None:
        """`gangs`: replicas may span several accelerators."""
        self.profile, self.gangs = profile, gangs
        hardware = profile.accelerator
        ids = [f"acc-{i}" for i in range(accelerators)]
        self.node = Node(
            id=node_id,
            region="local",
            accelerators=tuple(Accelerator(i, hardware.name, hardware.memory_bytes) for i in ids),
            host_memory_bytes=profile.node.host_memory_bytes,
            disk_bytes=profile.node.disk_bytes,
        )
        self.computes = [Compute()] if gangs else [Compute() for _ in ids]
        self.devices = {
            name: Device(hardware.memory_bytes, self.computes[0 if gangs else index]) for index, name in enumerate(ids)
        }
        self.processes: dict[str, Process] = {}
        self.disk_free_ms = 0.0
        self.hard: dict[str, int] = {}
        self.hard_bytes = 0
        self.soft: OrderedDict[str, int] = OrderedDict()
        self.soft_bytes = 0

    # --- commands: each answers when its step ends --------------------------------------------------------------------

    def start(self, command: Start, model: ModelSpec, now_ms: float) -> float:
        if command.replica in self.processes:
            raise LawBroken(f"{command.replica} started twice")
        process = Process(command.replica, command.deployment, model, S.STARTING, began_ms=now_ms)
        self.processes[command.replica] = process
        self._occupy(process, command.accelerators, command.accelerator_bytes)
        node, hardware = self.profile.node, self.profile.accelerator
        read_from = max(now_ms + node.start_ms, self.disk_free_ms)
        read_ms = model.weight_bytes / node.disk_bytes_per_ms
        self.disk_free_ms = read_from + read_ms
        copy_ms = model.weight_bytes / len(command.accelerators) / hardware.link_bytes_per_ms
        self._keep_soft(command.replica, process.deployment.host_bytes)
        return self._begin(process, S.STARTING, read_from + max(read_ms, copy_ms))

    def wake(self, command: Wake, now_ms: float) -> float:
        process = self.processes[command.replica]
        if process.state is not S.ASLEEP:
            raise LawBroken(f"{command.replica} woken while {process.state}")
        process.began_ms = now_ms
        self._occupy(process, command.accelerators, command.accelerator_bytes)
        each = process.model.weight_bytes / len(command.accelerators) / self.profile.accelerator.link_bytes_per_ms
        begin = now_ms + self.profile.node.wake_fixed_ms
        for accelerator in command.accelerators:
            begin = max(begin, self.devices[accelerator].link_free_ms)
        for accelerator in command.accelerators:
            self.devices[accelerator].link_free_ms = begin + each
        return self._begin(process, S.WAKING, begin + each)

    def sleep(self, command: Sleep, now_ms: float) -> float:
        process = self.processes[command.replica]
        if process.state is not S.READY:
            raise LawBroken(f"{command.replica} put to sleep while {process.state}")
        self.pause(process, False, now_ms)
        process.began_ms = now_ms
        for accelerator in process.accelerators:
            if command.replica in self.devices[accelerator].compute.active:
                raise LawBroken(f"{command.replica} put to sleep under running requests")
        node, took = self.profile.node, self.profile.node.sleep_fixed_ms
        if self.soft.pop(command.replica, None) is not None:
            self.soft_bytes -= process.deployment.host_bytes
        else:
            took += process.model.weight_bytes / len(process.accelerators) / self.profile.accelerator.link_bytes_per_ms
        self.hard[command.replica] = process.deployment.host_bytes
        self.hard_bytes += process.deployment.host_bytes
        if self.hard_bytes > node.host_memory_bytes:
            raise LawBroken(f"host memory of {self.node.id} over-committed by {command.replica}")
        self._trim_soft()
        return self._begin(process, S.SLEEPING, now_ms + took)

    def stop(self, command: Stop, now_ms: float) -> tuple[float, list[Request]] | None:
        """The engine computes nothing from now on: what it had comes back at once, its memory when the step ends."""
        process = self.processes.get(command.replica)
        if process is None:
            return None
        process.began_ms = now_ms
        lost = self._close_engine(process, now_ms)
        return self._begin(process, S.STOPPING, now_ms + STOP_MS), lost

    def pause(self, process: Process, on: bool, now_ms: float) -> None:
        """Its engine stands still with all it has, or goes on."""
        if process.state is S.READY and process.paused is not on:
            process.paused, process.began_ms = on, now_ms
            self.compute_of(process).pause(process.replica, on, now_ms)

    def abort(self, process: Process, now_ms: float) -> list[Request]:
        """Whoever asked hangs up: what its engine had, which has nothing to do now."""
        lost = self._close_engine(process, now_ms)
        process.paused = False
        self._open_engine(process)
        return lost

    def _begin(self, process: Process, state: ReplicaState, until_ms: float) -> float:
        process.paused = False
        process.state = state
        process.step += 1
        return until_ms

    # --- steps that end -----------------------------------------------------------------------------------------------

    def finish(self, process: Process, now_ms: float) -> list[Request]:
        """The step under way has ended. Returns requests that died with the engine."""
        match process.state:
            case S.STARTING | S.WAKING:
                if process.state is S.WAKING:
                    self._drop_hard(process.replica)
                    self._keep_soft(process.replica, process.deployment.host_bytes)
                process.state = S.READY
                self._open_engine(process)
            case S.SLEEPING:
                process.state = S.ASLEEP
                self._close_engine(process, now_ms)
                self._vacate(process)
            case _:
                return self.kill(process, now_ms)
        return []

    def kill(self, process: Process, now_ms: float) -> list[Request]:
        """The process is gone, and everything it held with it."""
        process.state = S.STOPPED
        process.step += 1
        lost = self._close_engine(process, now_ms)
        self._vacate(process)
        self._drop_hard(process.replica)
        if process.replica in self.soft:
            self.soft_bytes -= self.soft.pop(process.replica)
        self.processes.pop(process.replica, None)
        return lost

    def compute_of(self, process: Process) -> Compute:
        return self.devices[process.accelerators[0]].compute

    def status(self, process: Process, now_ms: float, reason: str = "") -> ReplicaStatus:
        ready = process.state is S.READY
        return ReplicaStatus(
            replica=process.replica,
            endpoint=process.deployment.endpoint,
            node=self.node.id,
            generation=process.deployment.generation,
            state=process.state,
            accelerators=process.accelerators,
            accelerator_bytes=process.nbytes,
            host_bytes=self.hard.get(process.replica, 0),
            took_ms=int(now_ms - process.began_ms),
            address=f"sim:{process.replica}" if ready else "",
            reason=reason,
            paused=process.paused,
        )

    # --- memory -------------------------------------------------------------------------------------------------------

    def _occupy(self, process: Process, accelerators: tuple[str, ...], nbytes: int) -> None:
        for accelerator in accelerators:
            device = self.devices[accelerator]
            device.used += nbytes
            if device.used > device.capacity:
                raise LawBroken(f"{self.node.id}/{accelerator} over-committed by {process.replica}")
        process.accelerators, process.nbytes = accelerators, nbytes

    def _vacate(self, process: Process) -> None:
        for accelerator in process.accelerators:
            self.devices[accelerator].used -= process.nbytes
        process.accelerators, process.nbytes = (), 0

    def _open_engine(self, process: Process) -> None:
        places = process.accelerators
        if len(places) > 1 and len(self.computes) > 1:
            raise LawBroken(f"{process.replica} spans accelerators of a node that was not made for it")
        kv_bytes = (process.nbytes - self.profile.accelerator.workspace_bytes) * len(
            places
        ) - process.model.weight_bytes
        batch = process.deployment.mode is Mode.BATCH
        engine = Engine(process.model, self.profile.accelerator, kv_bytes, places, batch=batch)
        self.compute_of(process).open(process.replica, engine)

    def _close_engine(self, process: Process, now_ms: float) -> list[Request]:
        return self.compute_of(process).remove(process.replica, now_ms) if process.accelerators else []

    def _drop_hard(self, replica: str) -> None:
        self.hard_bytes -= self.hard.pop(replica, 0)

    def _keep_soft(self, replica: str, nbytes: int) -> None:
        if self.hard_bytes + self.soft_bytes + nbytes <= self.profile.node.host_memory_bytes:
            self.soft[replica] = nbytes
            self.soft_bytes += nbytes

    def _trim_soft(self) -> None:
        while self.soft and self.hard_bytes + self.soft_bytes > self.profile.node.host_memory_bytes:
            _, nbytes = self.soft.popitem(last=False)
            self.soft_bytes -= nbytes
