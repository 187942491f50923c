"""The driver of llama.cpp's `llama-server`: GGUF models, one process a replica, on a Unix socket.

It sleeps by itself when nothing was asked of it for a second (``--sleep-idle-seconds 1``), unloading the model and
keeping the process; it has no call for that. So a replica that is to stay awake is asked something small four times a
second, and one that is to sleep no longer is. Whatever it is asked next wakes it: after a fence nothing is.
"""

import asyncio
import contextlib
from collections import deque

from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import StartOrder
from tidegate.engines.gguf import parts_of
from tidegate.engines.inspect import model_path
from tidegate.engines.process import Process
from tidegate.engines.programs import ServedDriver, arguments_of
from tidegate.engines.served import ServedEngine, answer_of, counted

KEEP_AWAKE_MS = 250
BUSY = ("llamacpp:requests_processing", "llamacpp:requests_deferred")


class LlamaEngine(ServedEngine):
    _keeping_awake: asyncio.Task[None] | None = None

    async def answers(self) -> bool:
        status, _ = await self.client.fetch("GET", "/health", ms_max=self.limits.state_ms_max)  # 503 while it loads
        if status != 200:
            return False
        self._keep_awake()
        return True

    async def in_flight(self) -> int:
        # Unlike every other question this one neither wakes it nor keeps it awake.
        return await counted(self.client, "/metrics", BUSY, self.limits.state_ms_max)

    async def fall_asleep(self) -> None:
        await self._let_sleep()
        while not await self._is_sleeping():  # noqa: ASYNC110 - it has no event for it; the caller bounds the time
            await asyncio.sleep(self.limits.poll_ms / 1000)

    async def rise(self) -> None:
        await self._nudge()
        self._keep_awake()
        if await self._is_sleeping():
            raise EngineFault("it was asked to wake and still sleeps")

    async def stop(self) -> None:
        await self._let_sleep()
        await super().stop()

    def canary_fields(self) -> dict[str, bool]:
        return {"cache_prompt": False}  # the tokens of a cached prefix may differ in the last bits

    async def _is_sleeping(self) -> bool:
        _, content = await self.client.fetch("GET", "/props", ms_max=self.limits.state_ms_max)
        return answer_of(content).get("is_sleeping") is True

    async def _nudge(self) -> None:
        """The cheapest question that counts as activity, and that wakes it: which adapters it has."""
        await self.client.fetch("GET", "/lora-adapters", ms_max=self.limits.wake_ms_max)

    def _keep_awake(self) -> None:
        if self._keeping_awake is None:
            self._keeping_awake = asyncio.create_task(self._nudge_on(), name=f"awake {self.order.replica}")

    async def _nudge_on(self) -> None:
        with contextlib.suppress(EngineFault):  # it died: its supervisor sees that in `exited`
            while True:
                await asyncio.sleep(KEEP_AWAKE_MS / 1000)
                await self._nudge()

    async def _let_sleep(self) -> None:
        task, self._keeping_awake = self._keeping_awake, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})


class LlamaDriver(ServedDriver):
    name = "llama-server"

    def command(self, order: StartOrder, address: str) -> list[str]:
        wanted = order.deployment
        gpu = any(accelerator.kind != "cpu" for accelerator in order.accelerators)
        return [
            "--model", str(model_path(wanted.model.source)),
            "--alias", wanted.endpoint,
            "--host", address.removeprefix("unix:"),
            "--ctx-size", str(wanted.model.context_tokens_max * wanted.slots),
            "--parallel", str(wanted.slots),
            "--threads", str(self.threads),
            "--gpu-layers", "all" if gpu else "0",
            "--sleep-idle-seconds", "1",
            "--metrics", "--jinja", "--no-webui",
            *(["--embeddings"] if wanted.model.kind is ModelKind.EMBEDDING else []),
            *arguments_of(order),
        ]  # fmt: skip

    def engine(self, order: StartOrder, process: Process, address: str, tail: deque[str]) -> LlamaEngine:
        files = [part for part in parts_of(model_path(order.deployment.model.source)) if part.is_file()]
        return LlamaEngine(order, process, address, files, self.worth, self.limits, tail)
