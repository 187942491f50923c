"""The driver of TensorRT-LLM: ``trtllm-serve`` on a loopback port (https://nvidia.github.io/TensorRT-LLM).

Its memory checkpointing is a prototype that only some versions have, under two names; what the installed one knows is
read off its files. Without it there is no sleep, and its replicas are stopped and started.
"""

import hashlib
import json
from collections import deque
from pathlib import Path

from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import StartOrder
from tidegate.engines.discover import GPU_RESERVED_BYTES
from tidegate.engines.inspect import model_path
from tidegate.engines.process import Process
from tidegate.engines.programs import ServedDriver, free_port
from tidegate.engines.served import ServedEngine

# How the option that enables sleep is called, by what the installed package's `llm_args.py` defines.
SLEEP_OPTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("class SleepConfig", {"sleep_config": {}}),
    ("enable_sleep", {"enable_sleep": True}),
)


class TrtllmEngine(ServedEngine):
    _active = 0

    async def answers(self) -> bool:
        status, _ = await self.client.fetch("GET", "/health", ms_max=self.limits.state_ms_max)
        return status == 200

    async def in_flight(self) -> int:
        """Statistics of the iterations since they were last asked for: none means nothing has changed since."""
        status, content = await self.client.fetch("GET", "/metrics", ms_max=self.limits.state_ms_max)
        try:
            iterations = json.loads(content) if status == 200 else None
            if iterations:
                last = iterations[-1]
                self._active = int(last["numActiveRequests"]) + int(last.get("numQueuedRequests") or 0)
            elif iterations is None:
                raise EngineFault(f"it answered {status} to metrics")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise EngineFault("it does not say how many requests it has") from error
        return self._active

    async def fall_asleep(self) -> None:
        await self._post("/release_memory")

    async def rise(self) -> None:
        await self._post("/resume_memory")

    async def _post(self, path: str) -> None:
        status, _ = await self.client.fetch("POST", path, ms_max=self.limits.sleep_ms_max, body={"tags": []})
        if status != 200:
            raise EngineFault(f"it answered {status} to {path[1:]}")


class TrtllmDriver(ServedDriver):
    name = "TensorRT-LLM"

    @property
    def sleeps(self) -> bool:
        if self.worth.proven is None and not self._sleep_option():
            self.worth.proven, self.worth.why = False, "this version of TensorRT-LLM has no sleep"
        return super().sleeps

    def address(self, order: StartOrder) -> str:
        return f"tcp:127.0.0.1:{free_port()}"

    def command(self, order: StartOrder, address: str) -> list[str]:
        wanted, (host, port) = order.deployment, address.removeprefix("tcp:").split(":")
        given = dict(wanted.engine_args)
        whole = min(accelerator.memory_bytes for accelerator in order.accelerators) + GPU_RESERVED_BYTES
        return [
            "serve", str(model_path(wanted.model.source)),
            "--host", host, "--port", port,
            "--served_model_name", wanted.endpoint,
            "--backend", "pytorch",
            "--tp_size", str(len(order.accelerators)),
            "--max_batch_size", given.pop("max_batch_size", str(wanted.slots)),
            "--max_seq_len", str(wanted.model.context_tokens_max),
            "--kv_cache_free_gpu_memory_fraction", f"{min(order.accelerator_bytes / whole, 0.9):.4f}",
            "--extra_llm_api_options", str(self._options(order)),
            *(word for name, value in given.items() for word in (f"--{name}", value)),
        ]  # fmt: skip

    def engine(self, order: StartOrder, process: Process, address: str, tail: deque[str]) -> TrtllmEngine:
        files = sorted(model_path(order.deployment.model.source).glob("*.safetensors"))
        if not self.sleeps:
            self.worth.proven = False
        return TrtllmEngine(order, process, address, files, self.worth, self.limits, tail)

    def _options(self, order: StartOrder) -> Path:
        """What the command line has no words for, as a file (JSON is YAML)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"trtllm-{hashlib.sha256(order.replica.encode()).hexdigest()[:16]}.yaml"
        path.write_text(json.dumps({"enable_iter_perf_stats": True, **self._sleep_option()}))
        return path

    def _sleep_option(self) -> dict[str, object]:
        home = Path(self.program.argv[0]).resolve().parent.parent
        for arguments in home.glob("lib/python3*/site-packages/tensorrt_llm/llmapi/llm_args.py"):
            text = arguments.read_text(errors="replace")
            for word, option in SLEEP_OPTIONS:
                if word in text:
                    return dict(option)
        return {}
