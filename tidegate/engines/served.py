"""A foreign engine while it runs: a program that serves OpenAI's API, watched, measured, put to sleep, ended.

Nothing it says of itself is believed where the kernel or the driver library can be asked: memory is measured, readiness
is an answered request, and whether sleep is worth anything is tried out on the first engine of a driver.
"""

import asyncio
import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import Memory, StartOrder
from tidegate.engines.control_client import ControlClient, NotListening
from tidegate.engines.gpu_memory import gpu_held_by
from tidegate.engines.process import Held, Process, held_by_session, session_of

REASON_CHARS_MAX = 200
# An engine asleep must have given back this share of its weights' bytes at least, or it has not slept.
FREED_PERCENT_MIN = 90
_PATH = re.compile(r"(?:/[\w.@+-]+)+/")
_COMPLAINT = re.compile(r"error|fail|invalid|unable|cannot|not supported", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServedLimits:
    """Bounds in ms of what is asked of a foreign engine. `settle_ms_max`: how long memory may take to come free."""

    ready_ms_max: int = 600_000
    drain_ms_max: int = 60_000
    sleep_ms_max: int = 60_000
    wake_ms_max: int = 60_000
    canary_ms_max: int = 60_000
    state_ms_max: int = 5_000
    settle_ms_max: int = 5_000
    stop_grace_ms_max: int = 5_000
    poll_ms: int = 20


@dataclass(slots=True)
class SleepWorth:
    """What a driver knows of sleep here. None: not tried yet. Shared by a driver and its engines."""

    proven: bool | None = None
    why: str = ""


class ServedEngine(ABC):
    """Implements `Engine` for one process. What differs between engines is in the abstract methods."""

    def __init__(
        self, order: StartOrder, process: Process, address: str, files: Sequence[Path], worth: SleepWorth,
        limits: ServedLimits, tail: "deque[str]",
    ) -> None:  # fmt: skip
        self.order, self.limits = order, limits
        self.client = ControlClient(address)
        self._process, self._address, self._files, self._worth, self._tail = process, address, files, worth, tail
        self._socket = Path(address.removeprefix("unix:")) if address.startswith("unix:") else None
        self._weight_bytes = sum(file.stat().st_size for file in files)
        self._on_cpu = all(accelerator.kind == "cpu" for accelerator in order.accelerators)
        self._asleep = False
        self._awake = Held(0, 0)

    # --- what each engine says in its own way -------------------------------------------------------------------------

    @abstractmethod
    async def answers(self) -> bool:
        """Whether it takes requests now. An EngineFault means not yet, while its process lives."""

    @abstractmethod
    async def in_flight(self) -> int:
        """Requests running or queued inside the engine."""

    @abstractmethod
    async def fall_asleep(self) -> None:
        """Asks it to give accelerator memory back, and returns when it says it has."""

    @abstractmethod
    async def rise(self) -> None:
        """Asks it to take memory again, and returns when it answers requests."""

    # --- the port -----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._address

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(self.limits.ready_ms_max / 1000):
                while not await self._is_up():  # noqa: ASYNC110 - another process's readiness has no event here
                    await asyncio.sleep(self.limits.poll_ms / 1000)
        except TimeoutError as error:
            raise EngineFault(f"it did not become ready within {self.limits.ready_ms_max} ms") from error
        if self._worth.proven is None:
            await self._try_sleep()

    async def drain(self) -> None:
        """No gateway sends to it any more (the fence); what it still has inside must end."""
        try:
            async with asyncio.timeout(self.limits.drain_ms_max / 1000):
                while await self.in_flight():
                    self._check_running()
                    await asyncio.sleep(self.limits.poll_ms / 1000)
        except TimeoutError as error:
            raise EngineFault(f"requests were still running after {self.limits.drain_ms_max} ms") from error

    async def sleep(self) -> Memory:
        """Refused while work runs: sleeping over it crashes engines, or loses the requests."""
        self._check_running()
        if busy := await self.in_flight():
            raise EngineFault(f"refused: {busy} requests are in flight")
        self._awake = await self._held()
        await self._bounded(self.fall_asleep(), self.limits.sleep_ms_max, "sleep")
        self._asleep = True
        return await self._settled()

    async def wake(self) -> Memory:
        self._check_running()
        await self._bounded(self.rise(), self.limits.wake_ms_max, "wake")
        self._asleep = False
        return await self.memory()

    async def canary(self) -> str:
        """Greedy, with the end token ignored, so that there is always something to compare."""
        self._check_running()
        if self._asleep:
            raise EngineFault("refused: asleep")
        path, body = self._canary_request()
        answer = await self._explained(self.client.post(path, ms_max=self.limits.canary_ms_max, body=body))
        return hashlib.sha256(repr(_said(answer)).encode()).hexdigest()

    async def memory(self) -> Memory:
        """On a CPU the accelerator is this machine's memory: awake, all the engine holds is counted as the
        accelerator's. Asleep, what is left is the program in host memory, if the kernel saw the weights go.
        """
        self._check_running()
        held = await self._held()
        if not self._on_cpu:
            host = await asyncio.to_thread(held_by_session, self.pid)
            return Memory(held.total, host.total)
        if self._asleep and self._weights_are_out(held):
            return Memory(0, held.total)
        return Memory(held.total, 0)

    def pause(self, on: bool) -> None:
        self._process.pause(on)

    async def stop(self) -> None:
        try:
            await self._process.stop(grace_ms_max=self.limits.stop_grace_ms_max)
        finally:
            await self.client.close()
            if self._socket is not None:
                self._socket.unlink(missing_ok=True)

    async def exited(self) -> str:
        return f"the engine process {await self._process.exited()}"

    # --- means --------------------------------------------------------------------------------------------------------

    async def _is_up(self) -> bool:
        if not self._process.running:
            raise EngineFault(f"{await self.exited()} before it was ready{self._complaint()}")
        try:
            return await self.answers()
        except EngineFault:
            return False

    async def _try_sleep(self) -> None:
        """The first engine of a driver sleeps once before it serves. It is warmed up first: vLLM that never ran a
        request before its first sleep has come back broken.
        """
        before = await self.canary()
        try:
            memory = await self.sleep()
            await self.wake()
        except EngineFault as fault:
            if not self._process.running:
                self._worth.proven, self._worth.why = False, f"it died when it was put to sleep: {fault.reason}"
                raise
            self._worth.proven, self._worth.why = False, f"it refuses to sleep: {fault.reason}"
            return
        if await self.canary() != before:
            self._worth.proven, self._worth.why = False, "after a sleep it answered otherwise than before"
            raise EngineFault("after its first sleep it answered otherwise than before; it is started without sleep")
        held, awake = memory.accelerator_bytes, self._awake.total
        self._worth.proven = held <= awake // 10
        if not self._worth.proven:
            self._worth.why = f"asleep it still holds {held} of {awake} bytes"

    async def _settled(self) -> Memory:
        """Some engines give memory back a little after they said so."""
        memory = await self.memory()
        with contextlib.suppress(TimeoutError):  # what is still held then is what is reported
            async with asyncio.timeout(self.limits.settle_ms_max / 1000):
                while memory.accelerator_bytes > self._awake.total // 10:
                    await asyncio.sleep(self.limits.poll_ms / 1000)
                    memory = await self.memory()
        return memory

    def _weights_are_out(self, held: Held) -> bool:
        """The kernel no longer finds them: pages of their files where they were mapped, else memory given back."""
        mapped = self._awake.of_files * 2 >= self._weight_bytes
        if mapped:
            return held.of_files * 100 <= self._awake.of_files * (100 - FREED_PERCENT_MIN)
        return (self._awake.total - held.total) * 100 >= self._weight_bytes * FREED_PERCENT_MIN

    async def _held(self) -> Held:
        self._check_running()
        if self._on_cpu:
            return await asyncio.to_thread(held_by_session, self.pid, self._files)  # walks page tables
        held = await asyncio.to_thread(gpu_held_by, (self.pid, *session_of(self.pid)))
        if not held and not self._asleep:
            # In a container the GPU driver counts by the host's process numbers: then nothing of ours is ever found.
            raise EngineFault("its GPU memory is not found by process: in a container, share the host's process ids")
        return Held(held, 0)

    def _canary_request(self) -> tuple[str, dict[str, Any]]:
        name = self.order.deployment.endpoint
        if self.order.deployment.model.kind is ModelKind.EMBEDDING:
            return "/v1/embeddings", {"model": name, "input": "the tide comes in"}
        asked = {"prompt": "the tide comes in", "max_tokens": 8, "temperature": 0, "seed": 0, "ignore_eos": True}
        return "/v1/completions", {"model": name, **asked, **self.canary_fields()}

    def canary_fields(self) -> dict[str, Any]:
        """What this engine must be told so that the same prompt is always computed the same way."""
        return {}

    async def _bounded(self, call: Any, ms_max: int, what: str) -> None:
        try:
            async with asyncio.timeout(ms_max / 1000):
                await self._explained(call)
        except TimeoutError as error:
            raise EngineFault(f"it did not {what} within {ms_max} ms") from error

    async def _explained(self, call: Any) -> Any:
        """A broken connection usually means a dead process; its end, which follows within moments, says more."""
        try:
            return await call
        except NotListening as fault:
            with contextlib.suppress(TimeoutError):  # it lives: then the connection is all we know
                async with asyncio.timeout(1):
                    raise EngineFault(await self.exited()) from fault
            raise EngineFault(fault.reason) from fault

    def _check_running(self) -> None:
        if not self._process.running:
            raise EngineFault("the engine process is gone")

    def _complaint(self) -> str:
        """The last line of its start that complains, without paths. No request has come yet: it holds no prompt."""
        line = next((line for line in reversed(self._tail) if _COMPLAINT.search(line)), "")
        return f": {_PATH.sub('', line).strip()[-REASON_CHARS_MAX:]}" if line else ""


def _said(answer: dict[str, Any]) -> object:
    """What a canary is compared by: the text, or an embedding to two decimals (kernels may differ in the last bits)."""
    try:
        if "choices" in answer:
            return answer["choices"][0]["text"]
        return [round(float(value), 2) for value in answer["data"][0]["embedding"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineFault("canary: the engine answered nonsense") from error


async def counted(client: ControlClient, path: str, names: Sequence[str], ms_max: int) -> int:
    """The sum of some Prometheus gauges of an engine's metrics page. EngineFault when one of them is missing."""
    status, text = await client.fetch("GET", path, ms_max=ms_max)
    total = 0.0
    for name in names:
        found = re.findall(rb"^" + re.escape(name.encode()) + rb"(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.M)
        if status != 200 or not found:
            raise EngineFault(f"its metrics do not say {name}")
        total += sum(float(value) for value in found)
    return int(total)


def answer_of(content: bytes) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
