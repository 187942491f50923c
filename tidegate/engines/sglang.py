"""The driver of SGLang (https://docs.sglang.io): ``sglang serve`` on a loopback port, asleep through its memory saver.

Released memory is unmapped while the addresses stay, so that captured graphs remain valid; the weights' contents are
kept in host memory. Released, the server still answers on ``/health``, and a request would crash it: only the fence
keeps requests away. The cache is flushed first, since what it holds does not survive.
"""

import json
from collections import deque

from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import StartOrder
from tidegate.engines.discover import GPU_RESERVED_BYTES
from tidegate.engines.inspect import model_path
from tidegate.engines.process import Process
from tidegate.engines.programs import ServedDriver, arguments_of, free_port
from tidegate.engines.served import ServedEngine

# In this order: the weights are there before the cache is mapped over what is left.
TAGS = ("weights", "cuda_graph", "kv_cache")


class SglangEngine(ServedEngine):
    async def answers(self) -> bool:
        status, _ = await self.client.fetch("GET", "/health", ms_max=self.limits.state_ms_max)
        return status == 200

    async def in_flight(self) -> int:
        """By ``/v1/loads``, or ``/get_load`` of older versions: a list by data-parallel rank."""
        for path in ("/v1/loads", "/get_load"):
            status, content = await self.client.fetch("GET", path, ms_max=self.limits.state_ms_max)
            if status == 200:
                return _requests(content)
        raise EngineFault("it does not say how many requests it has")

    async def fall_asleep(self) -> None:
        await self._post("/flush_cache", None)
        await self._post("/release_memory_occupation", list(reversed(TAGS)))

    async def rise(self) -> None:
        await self._post("/resume_memory_occupation", list(TAGS))

    async def _post(self, path: str, tags: list[str] | None) -> None:
        body = None if tags is None else {"tags": tags}
        status, content = await self.client.fetch("POST", path, ms_max=self.limits.sleep_ms_max, body=body)
        if status != 200 or b'"success":false' in content.replace(b" ", b""):
            raise EngineFault(f"it answered {status} to {path[1:]}: is --enable-memory-saver supported here?")


class SglangDriver(ServedDriver):
    name = "SGLang"

    def address(self, order: StartOrder) -> str:
        return f"tcp:127.0.0.1:{free_port()}"

    def command(self, order: StartOrder, address: str) -> list[str]:
        wanted, (host, port) = order.deployment, address.removeprefix("tcp:").split(":")
        given = arguments_of(order)
        slots = [] if "--max-running-requests" in given else ["--max-running-requests", str(wanted.slots)]
        return [
            *([] if "sglang.launch_server" in self.program.argv else ["serve"]),
            "--model-path", str(model_path(wanted.model.source)),
            "--served-model-name", wanted.endpoint,
            "--host", host, "--port", port,
            "--context-length", str(wanted.model.context_tokens_max),
            "--tp-size", str(len(order.accelerators)),
            "--mem-fraction-static", _share(order),
            "--enable-memory-saver", "--enable-weights-cpu-backup",
            *slots,
            *(["--is-embedding"] if wanted.model.kind is not ModelKind.GENERATIVE else []),
            *(["--device", "cpu"] if order.accelerators[0].kind == "cpu" else []),
            *given,
        ]  # fmt: skip

    def engine(self, order: StartOrder, process: Process, address: str, tail: deque[str]) -> SglangEngine:
        files = sorted(model_path(order.deployment.model.source).glob("*.safetensors"))
        return SglangEngine(order, process, address, files, self.worth, self.limits, tail)


def _share(order: StartOrder) -> str:
    """Of the smallest of its accelerators, the part that was reserved: weights and cache together stay within it."""
    whole = min(accelerator.memory_bytes for accelerator in order.accelerators)
    whole += 0 if order.accelerators[0].kind == "cpu" else GPU_RESERVED_BYTES
    return f"{min(order.accelerator_bytes / whole, 0.95):.4f}"


def _requests(content: bytes) -> int:
    """Running and waiting requests; what is not told as a number is a fault, never taken for idle."""
    try:
        answer = json.loads(content)
        loads = answer["loads"] if isinstance(answer, dict) else answer
        return sum(int(load.get("num_reqs", load.get("num_total_reqs"))) for load in loads)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineFault("it does not say how many requests it has") from error
