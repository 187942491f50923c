"""The driver of vLLM (https://docs.vllm.ai): ``vllm serve`` on a Unix socket, asleep where that frees memory.

Its development routes (sleep, wake, collective calls) share that socket, which only this user can open; gateways pass
on nothing but ``/v1``. Asleep it answers 200 on ``/health`` while requests hang, so health is never asked about that.
Sleep mode exists on GPUs; elsewhere the calls succeed and free nothing, which the trial of the first engine finds out.
"""

import json
from collections import deque
from pathlib import Path
from typing import Any

from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import StartOrder
from tidegate.domain.units import GIB
from tidegate.engines.discover import GPU_RESERVED_BYTES
from tidegate.engines.inspect import model_path
from tidegate.engines.process import Process
from tidegate.engines.programs import ServedDriver, arguments_of
from tidegate.engines.served import ServedEngine, answer_of, counted

BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
# Loaders vLLM takes weights by, fastest first, and the package each needs beside it.
LOADERS = (("runai_streamer", "runai_model_streamer"), ("fastsafetensors", "fastsafetensors"))
_SERVER_MODULE = "vllm.entrypoints.openai.api_server"


class VllmEngine(ServedEngine):
    """Level 1 keeps the weights in host memory; level 2 drops them too, and waking reads them from disk again."""

    @property
    def _level(self) -> int:
        return int(dict(self.order.deployment.engine_args).get("sleep_level", "1"))

    async def answers(self) -> bool:
        status, _ = await self.client.fetch("GET", "/health", ms_max=self.limits.state_ms_max)
        return status == 200

    async def in_flight(self) -> int:
        return await counted(self.client, "/metrics", BUSY, self.limits.state_ms_max)

    async def fall_asleep(self) -> None:
        await self._post(f"/sleep?level={self._level}", self.limits.sleep_ms_max)
        if not await self._is_sleeping():
            raise EngineFault("it was asked to sleep and says it does not")

    async def rise(self) -> None:
        if self._level == 2:
            await self._post("/wake_up?tags=weights", self.limits.wake_ms_max)
            await self._post("/collective_rpc", self.limits.wake_ms_max, {"method": "reload_weights"})
            await self._post("/wake_up?tags=kv_cache", self.limits.wake_ms_max)
        else:
            await self._post("/wake_up", self.limits.wake_ms_max)
        if await self._is_sleeping():
            raise EngineFault("it was asked to wake and says it sleeps")

    async def _is_sleeping(self) -> bool:
        _, content = await self.client.fetch("GET", "/is_sleeping", ms_max=self.limits.state_ms_max)
        answer = answer_of(content).get("is_sleeping")
        if not isinstance(answer, bool):
            raise EngineFault("it does not say whether it sleeps: it was built without sleep")
        return answer

    async def _post(self, path: str, ms_max: int, body: dict[str, Any] | None = None) -> None:
        status, _ = await self.client.fetch("POST", path, ms_max=ms_max, body=body)
        if status != 200:
            raise EngineFault(f"it answered {status} to {path.partition('?')[0][1:]}")


def _speculation(order: StartOrder) -> list[str]:
    """By n-grams of the request itself: the one method that needs no second model."""
    ahead = dict(order.deployment.engine_args).get("speculative_tokens")
    wanted = {"method": "ngram", "num_speculative_tokens": int(ahead), "prompt_lookup_max": 4} if ahead else None
    return ["--speculative-config", json.dumps(wanted)] if wanted else []


class VllmDriver(ServedDriver):
    name = "vLLM"

    def command(self, order: StartOrder, address: str) -> list[str]:
        wanted, model = order.deployment, str(model_path(order.deployment.model.source))
        served = ["--model", model] if _SERVER_MODULE in self.program.argv else ["serve", model]
        given = [*arguments_of(order, leave_out={"sleep_level", "speculative_tokens"}), *_speculation(order)]
        slots = [] if "--max-num-seqs" in given else ["--max-num-seqs", str(wanted.slots)]
        return [
            *served,
            "--served-model-name", wanted.endpoint,
            "--uds", address.removeprefix("unix:"),
            "--max-model-len", str(wanted.model.context_tokens_max),
            "--tensor-parallel-size", str(len(order.accelerators)),
            *slots,
            *([] if wanted.model.kind is ModelKind.GENERATIVE else ["--runner", "pooling"]),
            *(self._on_gpu(order) if order.accelerators[0].kind != "cpu" else []),
            *given,
        ]  # fmt: skip

    def environment(self, order: StartOrder) -> dict[str, str]:
        wanted = order.deployment
        kv_bytes = wanted.model.kv_bytes_per_token * wanted.model.context_tokens_max * wanted.slots
        return {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if ("enable_lora", "true") in wanted.engine_args else "0",
            "VLLM_CPU_KVCACHE_SPACE": str(-(-kv_bytes // GIB) or 1),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
        }

    def engine(self, order: StartOrder, process: Process, address: str, tail: deque[str]) -> VllmEngine:
        files = sorted(model_path(order.deployment.model.source).glob("*.safetensors"))
        return VllmEngine(order, process, address, files, self.worth, self.limits, tail)

    def _on_gpu(self, order: StartOrder) -> list[str]:
        """The share of the smallest of its GPUs that was reserved: vLLM fills it with KV cache and takes no more."""
        whole = min(accelerator.memory_bytes for accelerator in order.accelerators) + GPU_RESERVED_BYTES
        share = f"{order.accelerator_bytes / whole:.4f}"
        return ["--enable-sleep-mode", "--gpu-memory-utilization", share, "--load-format", self._loader()]

    def _loader(self) -> str:
        """By what lies beside vLLM in its environment; the program itself is not started to find out."""
        home = Path(self.program.argv[0]).parent.parent
        for loader, package in LOADERS:
            if any(home.glob(f"lib/python3*/site-packages/{package}")):
                return loader
        return "auto"
