"""A stand-in for foreign engines that cannot be installed without a GPU: a real process with their documented HTTP.

Run as ``python standin.py KIND ARGUMENTS…`` with the very command line a driver makes for vllm, sglang or trtllm. It
holds as much memory as its weights, and gives it back when told to sleep. A file ``fault`` in the model's directory
makes it misbehave. Only the standard library, so that it starts at once.
"""

import asyncio
import contextlib
import json
import mmap
import os
import sys
import zlib
from pathlib import Path
from typing import Any

TOKEN_S = 0.004


class Engine:
    def __init__(self, kind: str, argv: list[str]) -> None:
        self.kind = kind
        names = {"vllm": ("serve", "--uds"), "sglang": ("--model-path", "--port"), "trtllm": ("serve", "--port")}
        self.model = Path(argv[argv.index(names[kind][0]) + 1])
        self.place = argv[argv.index(names[kind][1]) + 1]
        flag = "--served_model_name" if kind == "trtllm" else "--served-model-name"
        self.name = argv[argv.index(flag) + 1]
        fault = self.model / "fault"
        self.fault = fault.read_text().strip() if fault.exists() else ""
        self.running = 0
        self.awake = asyncio.Event()
        self.awake.set()
        self.woken = False
        self.weights = self.loaded()
        self.adapters: dict[str, str] = {}
        self.takes_adapters = "--enable-lora" in argv and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1"

    def loaded(self) -> mmap.mmap:
        data = b"".join(file.read_bytes() for file in sorted(self.model.glob("*.safetensors")))
        if not data:
            sys.exit(f"error: no weights in {self.model}")
        head = int.from_bytes(data[:8], "little")
        ends = [t["data_offsets"][1] for n, t in json.loads(data[8 : 8 + head]).items() if n != "__metadata__"]
        if len(data) != 8 + head + max(ends):
            sys.exit(f"error: {self.model}/model.safetensors is truncated")
        held = mmap.mmap(-1, len(data))
        held.write(data)
        return held

    # --- what it is asked ---------------------------------------------------------------------------------------------

    async def answer(self, method: str, path: str, query: str, body: dict[str, Any], writer: Any) -> None:
        if path == "/health":
            return send(writer, 503 if self.fault == "never ready" else 200, b"")
        if path.startswith("/v1/") and "completions" in path:
            return await self.complete(path, body, writer)
        handler = getattr(self, f"{self.kind}_route")
        status, answered = await handler(method, path, query, body)
        send(writer, status, b"" if answered is None else answered.encode())

    async def vllm_route(self, method: str, path: str, query: str, body: dict[str, Any]) -> tuple[int, str | None]:
        match path:
            case "/metrics":
                gauges = (("running", self.running), ("waiting", 0))
                return 200, "".join(f'vllm:num_requests_{n}{{engine="0"}} {float(v)}\n' for n, v in gauges)
            case "/sleep":
                return await self.release(), None
            case "/wake_up":
                return await self.resume(), None
            case "/collective_rpc":
                return (200 if body == {"method": "reload_weights"} else 400), "{}"
            case "/is_sleeping":
                return 200, json.dumps({"is_sleeping": not self.awake.is_set()})
            case "/v1/load_lora_adapter" if self.takes_adapters:
                return self.load_adapter(body["lora_name"], Path(body["lora_path"]))
            case "/v1/unload_lora_adapter" if self.takes_adapters:
                return (200 if self.adapters.pop(body["lora_name"], None) else 404), "{}"
        return 404, None

    def load_adapter(self, name: str, path: Path) -> tuple[int, str]:
        """vLLM's answers, word for word (0.32, entrypoints/openai/models/serving.py)."""
        if name in self.adapters:
            said = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set"
            return 400, json.dumps({"error": {"message": said, "type": "InvalidUserInput", "code": 400}})
        if not (path / "adapter_config.json").is_file():
            said = f"Loading lora {name} failed: No adapter found for {path}"
            return 404, json.dumps({"error": {"message": said, "type": "NotFoundError", "code": 404}})
        rank = json.loads((path / "adapter_config.json").read_bytes())["r"]
        if rank > 16:
            said = f"LoRA rank {rank} is greater than max_lora_rank 16."
            return 500, json.dumps({"error": {"message": said, "type": "InternalServerError", "code": 500}})
        self.adapters[name] = (path / "adapter_model.safetensors").read_bytes().hex()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    async def sglang_route(self, method: str, path: str, query: str, body: dict[str, Any]) -> tuple[int, str | None]:
        match path:
            case "/get_load":  # an older version: /v1/loads is not there
                return 200, json.dumps([{"dp_rank": 0, "num_reqs": self.running, "num_waiting_reqs": 0}])
            case "/flush_cache":
                return (400 if self.running else 200), "Cache flushed.\n"
            case "/release_memory_occupation":
                assert "weights" in body["tags"]
                return await self.release(), "null"
            case "/resume_memory_occupation":
                return await self.resume(), "null"
        return 404, None

    async def trtllm_route(self, method: str, path: str, query: str, body: dict[str, Any]) -> tuple[int, str | None]:
        match path:
            case "/metrics":
                stats = [{"iter": 1, "numActiveRequests": self.running, "numQueuedRequests": 0}]
                return 200, json.dumps(stats)
            case "/release_memory":
                return await self.release(), "{}"
            case "/resume_memory":
                return await self.resume(), "{}"
        return 404, None

    async def release(self) -> int:
        if self.fault == "hangs in sleep":
            await asyncio.Event().wait()
        if self.fault == "refuses sleep":
            return 500
        if self.running:
            os._exit(139)  # what sleeping over running work does to the real ones
        self.awake.clear()
        if self.fault != "keeps its memory":
            if self.kind == "sglang":  # it says so before the memory is back
                asyncio.get_running_loop().call_later(0.1, self.weights.close)
            else:
                self.weights.close()
        return 200

    async def resume(self) -> int:
        if self.fault == "dies in wake":
            os._exit(1)
        if self.weights.closed:
            self.weights = self.loaded()
        self.woken = True
        self.awake.set()
        return 200

    # --- what it generates --------------------------------------------------------------------------------------------

    async def complete(self, path: str, body: dict[str, Any], writer: Any) -> None:
        await self.awake.wait()  # asleep no answer, however long: health says 200 all the while
        model = body.get("model")
        if model != self.name and model not in self.adapters:
            said = {"message": f"The model `{model}` does not exist.", "type": "NotFoundError", "code": 404}
            return send(writer, 404, json.dumps({"error": said}).encode())
        count = int(body.get("max_tokens") or 16)
        shift = zlib.crc32(self.adapters.get(str(model), "").encode()) % 1_000  # each adapter says something else
        words = [f"w{number * 7 % 11 + shift} " for number in range(count)]
        if self.woken and self.fault == "gibberish":
            words = ["!!"] * count
        self.running += 1
        try:
            await (self.stream if body.get("stream") else self.whole)(path, body, words, writer)
        finally:
            self.running -= 1

    async def whole(self, path: str, body: dict[str, Any], words: list[str], writer: Any) -> None:
        await asyncio.sleep(TOKEN_S)
        text = "".join(words)
        choice = {
            "index": 0,
            "text": text,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length",
        }
        answer = {"id": "c", "model": body["model"], "choices": [choice], "usage": usage(len(words))}
        send(writer, 200, json.dumps(answer, separators=(",", ":")).encode())

    async def stream(self, path: str, body: dict[str, Any], words: list[str], writer: Any) -> None:
        options = body.get("stream_options") or {}
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for number, word in enumerate(words, 1):
            event: dict[str, Any] = {
                "id": "c",
                "model": body["model"],
                "choices": [{"index": 0, "delta": {"content": word}}],
            }
            if options.get("continuous_usage_stats"):
                event["usage"] = usage(number)
            writer.write(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
            await writer.drain()
            await asyncio.sleep(TOKEN_S)
        if options.get("include_usage"):
            last = {"id": "c", "choices": [], "usage": usage(len(words))}
            writer.write(b"data: " + json.dumps(last, separators=(",", ":")).encode() + b"\n\n")
        writer.write(b"data: [DONE]\n\n")


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 5, "total_tokens": 5 + tokens, "completion_tokens": tokens}


def send(writer: Any, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + body)


async def main() -> None:
    engine = Engine(sys.argv[1], sys.argv[2:])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # the client left
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            method, target, _ = lines[0].split()
            path, _, query = target.partition("?")
            await engine.answer(method, path, query, json.loads(body) if body else {}, writer)
            await writer.drain()
        writer.close()

    if engine.kind == "vllm":
        server = await asyncio.start_unix_server(serve, engine.place)
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", int(engine.place))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
