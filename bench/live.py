"""What benchmarks on the live platform share: a whole platform, tenants, and clients that stream and keep time.

Clients run in the process that measures, on the machine that serves: their share of the CPU is in every figure.
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.platform import Platform

ASK_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed request as its client saw it. `error` names what went wrong, empty when it ended with [DONE]."""

    tenant: str
    endpoint: str
    at_s: float
    ttft_ms: float
    total_ms: float
    tokens: int
    queue_ms: int
    activation_ms: int
    replica: str
    mode: str
    overflow: str
    error: str = ""


class Clients:
    """Asks as tenants do. `answers` is everything asked so far."""

    def __init__(self, base_url: str, keys: dict[str, str]) -> None:
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=128)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=ASK_S_MAX, limits=limits)
        self._keys = keys
        self._began = time.perf_counter()
        self.answers: list[Answer] = []

    async def ask(self, tenant: str, endpoint: str, max_tokens: int, prompt: str = "Tell me of the tide.") -> Answer:
        body = {
            "model": endpoint, "messages": [{"role": "user", "content": prompt}], "stream": True,
            "max_tokens": max_tokens, "temperature": 0,
        }  # fmt: skip
        headers = {"authorization": f"Bearer {self._keys[tenant]}"}
        began, first, tokens, ended, error = time.perf_counter(), 0.0, 0, False, ""
        seen: httpx.Headers = httpx.Headers()
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
                seen = reply.headers
                if reply.status_code != 200:
                    error = f"{reply.status_code} {(await reply.aread())[:200].decode(errors='replace')}"
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter()
                        tokens += '"content"' in line
                        error = line[:200] if line.startswith('data: {"error"') else error
                    ended = ended or line == "data: [DONE]"
        except httpx.HTTPError as fault:
            error = type(fault).__name__
        now = time.perf_counter()
        answer = Answer(
            tenant, endpoint, began - self._began, ((first or now) - began) * 1000, (now - began) * 1000, tokens,
            int(seen.get("x-tidegate-queue-ms", "0")), int(seen.get("x-tidegate-activation-ms", "0")),
            seen.get("x-tidegate-replica", ""),
            seen.get("x-tidegate-mode", ""), seen.get("x-tidegate-overflow", ""),
            error or ("" if ended else "ended early"),
        )  # fmt: skip
        self.answers.append(answer)
        return answer

    async def close(self) -> None:
        await self._http.aclose()


@contextlib.asynccontextmanager
async def clients(platform: Platform, tenants: Iterable[str]) -> AsyncIterator[Clients]:
    """Clients with a new key for each tenant."""
    with platform.admin() as admin:
        keys = {}
        for tenant in tenants:
            admin.post("/api/v1/tenants", json={"id": tenant}).raise_for_status()
            keys[tenant] = admin.post("/api/v1/keys", json={"tenant": tenant}).json()["secret"]
    made = Clients(platform.base_url, keys)
    try:
        yield made
    finally:
        await made.close()


def apply(platform: Platform, endpoint: str, model: Path, **body: Any) -> dict[str, Any]:
    with platform.admin() as admin:
        reply = admin.put(f"/api/v1/endpoints/{endpoint}", json={"model": str(model), **body})
        assert reply.status_code == 200, reply.text
        return dict(reply.json())


async def until_state(platform: Platform, endpoint: str, *states: str, seconds: float = 60.0) -> None:
    """Polls until the endpoint is in one of `states`."""
    deadline = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=platform.base_url) as http:
        http.headers["authorization"] = f"Bearer {platform.ready['admin_key']}"
        while (shown := (await http.get(f"/api/v1/endpoints/{endpoint}")).json())["state"] not in states:
            assert time.monotonic() < deadline, f"{endpoint} is {shown['state']} ({shown['reason']}), not {states}"
            await asyncio.sleep(0.1)


async def arrive(instants_s: Iterable[float], ask: Callable[[], Awaitable[object]]) -> None:
    """Open loop: one `ask` at each instant, however long the others take; returns when all are answered."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for at_s in instants_s:
            await asyncio.sleep(max(0.0, at_s - (time.perf_counter() - began)))
            group.create_task(_awaited(ask()))


async def _awaited(asked: Awaitable[object]) -> None:
    await asked


def poisson(rate_s: float, seconds: float, dice: random.Random) -> list[float]:
    instants, at = [], dice.expovariate(rate_s)
    while at < seconds:
        instants.append(at)
        at += dice.expovariate(rate_s)
    return instants


def percentiles(values: Iterable[float]) -> dict[str, float | int]:
    """Nearest rank; `n` says of how many."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    at = {f"p{p}": round(ordered[-(-len(ordered) * p // 100) - 1], 1) for p in (50, 95, 99)}
    return {"n": len(ordered), **at}


def load_average() -> float:
    return round(os.getloadavg()[0], 1)
