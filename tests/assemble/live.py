"""A whole platform for one test: real gateway process, sockets and stores; only the engine is the named stand-in."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests import models
from tidegate.assemble.start import run_platform
from tidegate.config import load, socket_directory
from tidegate.engines.fake import FakeDriver, FakeScript

NAMES = ("tides", "stars", "bread")
WAIT_S_MAX = 30.0


class StandIn(FakeDriver):
    """Takes the built-in driver's place; its engines stream numbered words over real sockets."""

    def __init__(self, *, directory: Path, **_: Any) -> None:
        super().__init__(FakeScript(start_ms=50, token_ms=5, accelerator_bytes=1 << 20), directory=directory)

    def open(self) -> None:
        """Nothing to import ahead of time."""


@dataclass
class Live:
    ready: dict[str, Any]
    data: Path
    sockets: Path
    stop: asyncio.Event

    def client(self, key: str = "api_key", **options: Any) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.ready[key]}"}
        return httpx.AsyncClient(base_url=self.ready["base_url"], headers=headers, timeout=WAIT_S_MAX, **options)

    @property
    def gateways(self) -> list[psutil.Process]:
        """The platform's own gateway process; it is a child of this test."""
        found = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "tidegate.assemble.gateway" in " ".join(child.cmdline()):
                    found.append(child)
        return found


@asynccontextmanager
async def platform(folder: Path) -> AsyncIterator[Live]:
    toml = ["[[tenants]]", "id = 'acme'"]
    for seed, name in enumerate(NAMES):
        toml += ["[[endpoints]]", f"name = 'acme/{name}'", f"model = '{models.llama(seed=300 + seed)}'"]
    (folder / "test.toml").write_text("\n".join(toml))
    shape = {"kind": "cpu", "count": 1, "memory": "4MiB"}
    overrides = {"port": 0, "data_dir": folder / "data", "accelerators": shape}
    config, stop = load(folder / "test.toml", overrides), asyncio.Event()
    ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_platform(config, folder / "ready.json", ready.set_result, stop))
    await asyncio.wait({ready, running}, return_when=asyncio.FIRST_COMPLETED, timeout=WAIT_S_MAX)
    try:
        if running.done():
            running.result()
        yield Live(await ready, folder / "data", socket_directory(config), stop)
    finally:
        stop.set()
        await asyncio.wait_for(running, WAIT_S_MAX)


Story = Callable[[Live], Coroutine[Any, Any, None]]


def chat(endpoint: str, words: int = 3, **extra: Any) -> dict[str, Any]:
    return {"model": endpoint, "messages": [{"role": "user", "content": "hi"}], "max_tokens": words, **extra}


async def until(check: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Polls with a deadline: what is awaited happens in another process."""
    deadline = asyncio.get_running_loop().time() + WAIT_S_MAX
    while not await check():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def is_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def billed(admin: httpx.AsyncClient, requests: int) -> bool:
    return bool((await admin.get("/api/v1/usage")).json()["total"]["billed_requests"] == requests)
