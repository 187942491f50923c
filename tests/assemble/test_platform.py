"""The assembled platform: real gateway process, sockets and stores; only the engine is the named stand-in."""

import asyncio
import contextlib
import json
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("torch")
from tests import models
from tidegate.assemble import services
from tidegate.assemble.platform import READY_FILE, run_platform
from tidegate.config import load, socket_directory
from tidegate.engines.fake import FakeDriver, FakeScript

pytestmark = pytest.mark.e2e
NAMES = ("tides", "stars", "bread")
WAIT_S_MAX = 30.0


class _StandIn(FakeDriver):
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


async def _is_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def _billed(admin: httpx.AsyncClient, requests: int) -> bool:
    return bool((await admin.get("/api/v1/usage")).json()["total"]["billed_requests"] == requests)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[Live], Coroutine[Any, Any, None]]], None]:
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(services, "BuiltinDriver", _StandIn)

    def runner(story: Story) -> None:
        async def main() -> None:
            async with platform(tmp_path) as live:
                await story(live)

        asyncio.run(main())

    return runner


def test_ready_says_how_to_reach_it_and_end_takes_it_away(run: Any, tmp_path: Path) -> None:
    async def story(live: Live) -> None:
        for file in (tmp_path / "ready.json", live.data / READY_FILE):
            assert json.loads(file.read_text()) == live.ready
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert set(live.ready) == {"base_url", "admin_key", "api_key", "endpoints"}
        assert live.ready["endpoints"] == sorted(f"acme/{name}" for name in NAMES)
        async with live.client() as client:
            listed = (await client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == live.ready["endpoints"]
            assert (await client.get("/api/v1/tenants")).status_code == 403
        sockets.extend(live.sockets.iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in sockets} == {0o600}

    sockets: list[Path] = []
    run(story)
    assert {"admin.sock", "control.sock"} <= {file.name for file in sockets}
    assert not (tmp_path / "ready.json").exists()
    assert not (tmp_path / "data" / READY_FILE).exists()
    assert not any(file.exists() for file in sockets)
    assert psutil.Process().children(recursive=True) == []


def test_more_endpoints_than_memory_are_all_answered_and_billed(run: Any) -> None:
    async def story(live: Live) -> None:
        async with live.client() as client, live.client("admin_key") as admin:
            for _ in range(2):
                for name in NAMES:
                    answer = await client.post("/v1/chat/completions", json=chat(f"acme/{name}"))
                    assert answer.status_code == 200, answer.text
            await until(lambda: _billed(admin, 6))
            report = (await admin.get("/api/v1/usage")).json()
            assert {row["group"]: row["output_tokens"] for row in report["rows"]} == {f"acme/{n}": 6 for n in NAMES}
            (invoice,) = (await admin.get("/api/v1/invoices")).json()["data"]
            assert invoice["total_nano_usd"] == sum(line["nano_usd"] for line in invoice["lines"]) > 0
            assert invoice["dedicated_total_nano_usd"] > 0

    run(story)


def test_a_killed_gateway_comes_back_and_nobody_is_refused_a_connection(run: Any) -> None:
    async def story(live: Live) -> None:
        (before,) = live.gateways
        async with live.client() as client:
            assert (await client.post("/v1/chat/completions", json=chat("acme/tides"))).status_code == 200
        before.send_signal(signal.SIGKILL)
        before.wait(10)
        # The public socket is the platform's: what arrives now waits in its backlog for the next gateway.
        async with live.client() as client:
            answer = await client.get("/healthz")
            assert answer.status_code == 200
            await until(lambda: _is_ready(client))
            again = await client.post("/v1/chat/completions", json=chat("acme/tides"))
            assert again.status_code == 200, again.text
        (after,) = live.gateways
        assert after.pid != before.pid

    run(story)


def test_the_gateway_process_stays_light(run: Any) -> None:
    async def story(live: Live) -> None:
        (gateway,) = live.gateways
        mapped = {Path(mapping.path).name.split(".")[0] for mapping in gateway.memory_maps()}
        assert not mapped & {"_pydantic_core", "libtorch_cpu", "_sqlite3", "_greenlet"}
        assert gateway.memory_info().rss <= 60 << 20

    run(story)
