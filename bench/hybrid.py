"""Hybrid under trouble: who served what, why, and what it cost, while things break.

Run: ``python -m bench.hybrid [--requests N]``. A dedicated endpoint on a node of its own overflows to a second
endpoint there above two requests at once, and falls back to a provider elsewhere: a stand-in on a local port that
speaks OpenAI's API, so that it can be told to answer 429 or to be dead. Phases: the threshold is crossed; the node is
killed; the provider answers 429 while the node is dead, which comes back; the provider is dead, too. Nothing may
fail, and in the end the ledger must hold every request once.
"""

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from bench import live, main
from tests.e2e.platform import Platform, joined, running
from tidegate import demo_models

REQUESTS = 120
RATE_S = 60.0
TOKENS = 8
BACK_S = 2.0
BASE, POOL, AWAY = "acme/base", "acme/pool", "acme/away"
CONFIG = """
region = "hub"
demo = false
[accelerators]
count = 1
memory = "1MiB"
[capacity]
wait_ms_max = 2000
[remotes.standin]
url = "http://127.0.0.1:{port}/v1"
region = "elsewhere"
[[price_terms]]
endpoint = "acme/away"
input_usd_per_million_tokens = "5"
output_usd_per_million_tokens = "15"
"""


class Provider:
    """An OpenAI-compatible API that streams `TOKENS` tokens, or answers 429, or is dead."""

    def __init__(self) -> None:
        self.limited = False
        self.served = 0
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def die(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            status, body = (429, b'{"error":{"message":"slow down"}}') if self.limited else (200, _stream())
            self.served += status == 200
            kind = b"text/event-stream" if status == 200 else b"application/json"
            writer.write(
                b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                % (status, kind, len(body), body)
            )
            await writer.drain()
        writer.close()


def _stream() -> bytes:
    chunk: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    pieces = [
        chunk | {"choices": [{"index": 0, "delta": {"content": f"t{n} "}, "finish_reason": None}]}
        for n in range(TOKENS)
    ]
    usage = {"prompt_tokens": 9, "completion_tokens": TOKENS, "total_tokens": 9 + TOKENS}
    events = [json.dumps(piece).encode() for piece in [*pieces, chunk | {"choices": [], "usage": usage}]]
    return b"".join(b"data: " + event + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def run(requests: int = REQUESTS) -> dict[str, Any]:
    """Per phase: who served, why, failures; the invoice's overflow lines; clients against the ledger."""
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        return asyncio.run(_run(Path(folder), requests))


async def _run(folder: Path, requests: int) -> dict[str, Any]:
    provider = Provider()
    await provider.start()
    config = CONFIG.format(port=provider.port)
    with contextlib.ExitStack() as stack:
        platform = await asyncio.to_thread(stack.enter_context, running(folder, config=config))
        return await _measure(platform, provider, requests)


@contextlib.asynccontextmanager
async def _node(platform: Platform) -> AsyncIterator[Any]:
    shape = ("--accelerators", "2", "--accelerator-memory", "128MiB")
    with joined(platform, "node", "edge-1", "--region", "edge", *shape) as process:
        yield process
        await asyncio.to_thread(_kill, process)


def _kill(process: Any) -> None:
    process.kill()
    process.wait(10)


async def _measure(platform: Platform, provider: Provider, requests: int) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    async with live.clients(platform, ["acme"]) as clients:

        async def phase(name: str, trouble: Callable[[], Awaitable[object]] | None = None) -> None:
            before = len(clients.answers)
            instants = [number / RATE_S for number in range(requests)]
            load = asyncio.create_task(live.arrive(instants, lambda: clients.ask("acme", BASE, TOKENS)))
            if trouble is not None:
                await asyncio.sleep(BACK_S)
                await trouble()
            await load
            phases[name] = _summary(clients.answers[before:])

        async with _node(platform):
            await asyncio.to_thread(_apply, platform)
            await live.until_state(platform, BASE, "ready", "idle")
            await phase("threshold_crossed")
        await phase("node_killed")
        provider.limited = True
        async with contextlib.AsyncExitStack() as stack:
            await phase("provider_answers_429", lambda: stack.enter_async_context(_node(platform)))
        await provider.die()
        async with contextlib.AsyncExitStack() as stack:
            await phase("provider_dead", lambda: stack.enter_async_context(_node(platform)))
            bill = await _bill(platform, sum(not a.error for a in clients.answers))
    failed = sum(p["failed"] for p in phases.values())
    return {"load_average": live.load_average(), "phases": phases, "failed": failed, **bill}


def _apply(platform: Platform) -> None:
    deadline = time.monotonic() + 60
    with platform.admin() as admin:
        while "edge" not in {node["region"] for node in admin.get("/api/v1/nodes").json()["data"]}:
            assert time.monotonic() < deadline, "the node did not join"
            time.sleep(0.1)
        away = {"model": "remote://standin/theirs", "engine": "remote", "context_tokens": 512}
        admin.put(f"/api/v1/endpoints/{AWAY}", json=away).raise_for_status()
    shape = {"slots": 4, "accelerator_memory": "96MiB", "context_tokens": 256}
    tides = demo_models.path("tides")
    live.apply(platform, POOL, tides, regions=["edge"], min_replicas=1, **shape)
    live.apply(
        platform, BASE, tides, mode="dedicated", regions=["edge", "elsewhere"],
        overflow={"to": POOL, "above_concurrency": 2}, fallback={"to": AWAY}, **shape,
    )  # fmt: skip


def _summary(answers: list[live.Answer]) -> dict[str, Any]:
    good = [a for a in answers if not a.error]
    served = Counter(a.overflow.split(";")[0] or BASE for a in good)
    reasons = Counter(a.overflow.partition("reason=")[2] or "none" for a in good)
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": sorted({a.error for a in answers if a.error})[:3],
        "served_by": dict(served),
        "reasons": dict(reasons),
        "ttft_ms": live.percentiles(a.ttft_ms for a in good),
    }


async def _bill(platform: Platform, answered: int) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=platform.base_url) as http:
        http.headers["authorization"] = f"Bearer {platform.ready['admin_key']}"
        billed, deadline = -1, time.monotonic() + 20
        while time.monotonic() < deadline and billed < answered:
            total = (await http.get("/api/v1/usage", params={"by": "endpoint"})).json()["total"]
            billed = total["requests"] - total["refused_requests"]
            await asyncio.sleep(0.2)
        invoice = (await http.get("/api/v1/invoices/acme")).json()
    return {"ledger": {"answered": answered, "in_ledger": billed}, "overflow_on_the_invoice": invoice["overflow"]}


if __name__ == "__main__":
    main(run)
