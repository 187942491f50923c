"""The driver of the built-in torch engine: forked from the template, spoken to over its Unix socket, watched by pidfd.

What an engine says of its memory is checked against the kernel's count, because "asleep" is only worth something when
the bytes are really free.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.domain.errors import EngineFault
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import Memory, StartOrder
from tidegate.engines.control_client import ControlClient, NotListening
from tidegate.engines.inspect import model_path
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Lifeline, Process, file_resident_of, memory_of, resident_of_files
from tidegate.engines.template import Connection, Template


@dataclass(frozen=True, slots=True)
class BuiltinLimits:
    """Bounds in ms of what the driver asks of an engine; `poll_ms` is how often one that does not listen
    yet is tried, `host_count_ms` after how much sleep its host memory is counted anew.
    """

    ready_ms_max: int = 120_000
    drain_ms_max: int = 60_000
    sleep_ms_max: int = 10_000
    wake_ms_max: int = 10_000
    canary_ms_max: int = 30_000
    state_ms_max: int = 5_000
    stop_grace_ms_max: int = 2_000
    poll_ms: int = 10
    host_count_ms: int = 2_000


# How the kernel shows the mapping of the host copy that all engines of one model have from the template.
HOST_COPY = Path("/memfd:tidegate-weights (deleted)")


@dataclass(frozen=True, slots=True)
class _Slept:
    """Measured while asleep: what was still held, and resident of all mapped files. Waking is measured against it."""

    held_bytes: int
    file_bytes: int


class BuiltinEngine:
    """Implements `Engine` for one forked process. `on_cpu`: its accelerators are this machine's memory, so many of it
    (`share`); GPUs each have their own, and `share` is 1. `mapped`: awake, it holds the pages of its weight files.
    """

    def __init__(
        self,
        process: Process,
        socket: Path,
        model: Path,
        limits: BuiltinLimits,
        *,
        on_cpu: bool,
        mapped: bool,
        share: int,
    ) -> None:
        self._process, self._socket, self._limits = process, socket, limits
        self._on_cpu, self._mapped, self._share = on_cpu, mapped, share
        self._weights = sorted(model.glob("*.safetensors"))
        self._client = ControlClient(f"unix:{socket}")
        self._failure = ""
        self._was_ready = False
        self._asleep = False
        self._slept: _Slept | None = None
        self._host_bytes = self._copy_bytes = 0
        self._counting: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return f"unix:{self._socket}"

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(self._limits.ready_ms_max / 1000):
                while not await self._is_ready():  # noqa: ASYNC110 - a socket nobody listens on yet has no event
                    await asyncio.sleep(self._limits.poll_ms / 1000)
                self._was_ready = True
        except TimeoutError as error:
            raise EngineFault(f"the model did not load within {self._limits.ready_ms_max} ms") from error

    async def drain(self) -> None:
        await self._post("drain", self._limits.drain_ms_max)

    async def sleep(self) -> Memory:
        """The engine's own measurement after the fact; `memory` then checks it against the kernel's."""
        answer = await self._post("sleep", self._limits.sleep_ms_max)
        self._asleep = True
        self._slept = _Slept(_count(answer, "accelerator_bytes"), file_resident_of(self.pid))
        self._count_no_more()
        self._counting = asyncio.create_task(self._count_later())
        return self._memory(self._slept.held_bytes)

    async def wake(self) -> Memory:
        self._count_no_more()
        await self._post("wake", self._limits.wake_ms_max)
        self._asleep = False
        return await self.memory()

    async def canary(self) -> str:
        answer = await self._post("canary", self._limits.canary_ms_max)
        return hashlib.sha256(repr(answer.get("tokens")).encode()).hexdigest()

    async def memory(self) -> Memory:
        """Accelerator: the engine's figure, asleep never less than what the kernel still finds resident of its weights.

        Host: what would come free if the process ended. What it shares with the template (torch itself) would not, and
        the host copy of its weights only with the last replica of the model here: that one is told apart.
        Counted at the start and in every longer sleep: who waits for the accelerator need not wait for that, too.
        """
        if self._slept is None:
            held = await self._claimed_bytes()
            await self._count_host(held)
        elif self._asleep:
            seen = await asyncio.to_thread(resident_of_files, self.pid, self._weights)
            held = max(self._slept.held_bytes, seen)
        else:
            held = self._woken_bytes(self._slept) if self._mapped else await self._claimed_bytes()
        return self._memory(held)

    def _memory(self, held: int) -> Memory:
        return Memory(-(-held // self._share), self._host_bytes, self._copy_bytes)

    async def _count_host(self, held: int) -> None:
        # A walk of its page tables, some 30 ms: not on the loop.
        seen = await asyncio.to_thread(memory_of, self.pid, [HOST_COPY])
        self._host_bytes = max(0, seen.private - (held if self._on_cpu else 0))
        self._copy_bytes = seen.of_files

    async def _count_later(self) -> None:
        await asyncio.sleep(self._limits.host_count_ms / 1000)
        with contextlib.suppress(EngineFault):  # its process has ended: `exited` says so
            await self._count_host(held=0)

    def _count_no_more(self) -> None:
        if self._counting is not None:
            self._counting.cancel()

    def _woken_bytes(self, slept: _Slept) -> int:
        """What waking mapped, by the kernel's counter: the exact walk would take as long as the wake itself.

        The KV cache is left out: it is empty at this moment.
        """
        mapped = max(0, file_resident_of(self.pid) - slept.file_bytes)
        return slept.held_bytes + min(mapped, sum(file.stat().st_size for file in self._weights))

    def pause(self, on: bool) -> None:
        self._process.pause(on)

    async def stop(self) -> None:
        # One that never got ready has nothing to end in order, and may not have its signal handlers yet.
        self._count_no_more()
        grace_ms_max = self._limits.stop_grace_ms_max if self._was_ready else 0
        try:
            await self._process.stop(grace_ms_max=grace_ms_max)
        finally:
            await self._client.close()
            self._socket.unlink(missing_ok=True)

    async def exited(self) -> str:
        ended = await self._process.exited()
        return self._failure or f"the engine process {ended}"

    async def _is_ready(self) -> bool:
        if not self._process.running:
            raise EngineFault(await self.exited())
        try:
            state = await self._client.get("/control/ready", ms_max=self._limits.ready_ms_max)
        except NotListening:
            return False
        if state.get("state") == "failed":
            self._failure = str(state.get("reason") or "the model could not be loaded")[:300]
            raise EngineFault(self._failure)
        return True

    async def _claimed_bytes(self) -> int:
        self._check_running()
        try:
            state = await self._client.get("/control/state", ms_max=self._limits.state_ms_max)
        except NotListening as fault:
            raise await self._explained(fault) from fault
        return _count(state, "accelerator_bytes")

    async def _post(self, verb: str, ms_max: int) -> dict[str, Any]:
        self._check_running()
        try:
            return await self._client.post(f"/control/{verb}", ms_max=ms_max)
        except NotListening as fault:
            raise await self._explained(fault) from fault

    def _check_running(self) -> None:
        if not self._process.running:
            raise EngineFault("the engine process is gone")

    async def _explained(self, fault: EngineFault) -> EngineFault:
        """A broken connection usually means a dead process; its end, which follows within moments, says more."""
        with contextlib.suppress(TimeoutError):  # it lives: then the connection is all we know
            async with asyncio.timeout(1):
                return EngineFault(await self.exited())
        return EngineFault(fault.reason)


class BuiltinDriver:
    """Implements `EngineDriver`. `directory` is for sockets; `threads` is each engine's share of the CPU. `cpu_device`:
    ``cpu``, or ``apart`` to try out on a CPU what engines do on a GPU.
    """

    def __init__(
        self,
        *,
        directory: Path,
        lifeline: Lifeline,
        threads: int,
        logs: LogRing | None = None,
        limits: BuiltinLimits = BuiltinLimits(),
        cpu_device: str = "cpu",
    ) -> None:
        self._cpu_device = cpu_device
        self.directory, self._threads, self._limits = directory, threads, limits
        self._template = Template(directory, lifeline=lifeline, logs=logs)

    @property
    def sleeps(self) -> bool:
        return True

    @property
    def why_not(self) -> str:
        return ""

    @property
    def template(self) -> Template:
        return self._template

    def open(self) -> None:
        """Starts the template ahead of the first order, so that the first cold start finds it warm."""
        self._template.open()

    async def start(self, order: StartOrder) -> BuiltinEngine:
        """Forks an engine. A caller that gives up half-way leaves no process behind."""
        model = model_path(order.deployment.model.source)
        connection = await self._template.connect()
        forking = asyncio.create_task(self._fork(order, model, connection))
        try:
            return await asyncio.shield(forking)
        except asyncio.CancelledError:
            with contextlib.suppress(EngineFault):  # nothing was forked: nothing to end
                await (await forking).stop()
            raise

    async def close(self) -> None:
        await self._template.close()

    async def _fork(self, order: StartOrder, model: Path, connection: Connection) -> BuiltinEngine:
        # Short and unique: a socket's path may have 107 bytes, and a replica's name is as long as it likes.
        socket = self.directory / f"engine-{hashlib.sha256(order.replica.encode()).hexdigest()[:16]}.sock"
        socket.unlink(missing_ok=True)
        # Accelerators of a CPU are budgets, which add up; of GPUs each has its own.
        on_cpu = all(accelerator.kind == "cpu" for accelerator in order.accelerators)
        share = len(order.accelerators) if on_cpu else 1
        process = await self._template.fork(
            connection,
            {
                "model": str(model),
                "socket": str(socket),
                "device": self._cpu_device if on_cpu else devices_of(order.accelerators),
                "memory_bytes": order.accelerator_bytes * share,
                "context_tokens_max": order.deployment.model.context_tokens_max,
                "slots": order.deployment.slots,
                "threads": self._threads,
                "adapter_bytes_max": int(dict(order.deployment.engine_args).get("adapter_bytes_max", "0")),
            },
        )
        mapped = on_cpu and self._cpu_device == "cpu"
        return BuiltinEngine(process, socket, model, self._limits, on_cpu=on_cpu, mapped=mapped, share=share)


def devices_of(accelerators: Sequence[Accelerator]) -> str:
    """As the engine calls GPUs: gpu-N is the one that NVML and, in the order of the bus, CUDA have as number N."""
    return ",".join(f"cuda:{accelerator.id.removeprefix('gpu-')}" for accelerator in accelerators)


def _count(state: dict[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or value < 0:
        raise EngineFault(f"state: the engine says {name} is not a number of bytes")
    return value
