"""The assembled platform: real gateway process, sockets and stores; only the engine is the named stand-in."""

import json
import signal
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.assemble.live import NAMES, Live, billed, chat, is_ready, until
from tidegate.assemble.platform import READY_FILE

pytestmark = pytest.mark.e2e


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
        async with live.client("admin_key") as admin:
            states = {endpoint["state"] for endpoint in (await admin.get("/api/v1/endpoints")).json()["data"]}
            assert not states & {"creating", "loading"}, "said to serve when no first question waits for a load"
        sockets.extend(live.sockets.iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in sockets} == {0o600}

    sockets: list[Path] = []
    before = psutil.Process().children(recursive=True)
    run(story)
    assert {"admin.sock", "control.sock"} <= {file.name for file in sockets}
    assert not (tmp_path / "ready.json").exists()
    assert not (tmp_path / "data" / READY_FILE).exists()
    assert not any(file.exists() for file in sockets)
    assert psutil.Process().children(recursive=True) == before


def test_more_endpoints_than_memory_are_all_answered_andbilled(run: Any) -> None:
    async def story(live: Live) -> None:
        async with live.client() as client, live.client("admin_key") as admin:
            for _ in range(2):
                for name in NAMES:
                    answer = await client.post("/v1/chat/completions", json=chat(f"acme/{name}"))
                    assert answer.status_code == 200, answer.text
            await until(lambda: billed(admin, 6))
            report = (await admin.get("/api/v1/usage")).json()
            assert {row["group"]: row["output_tokens"] for row in report["rows"]} == {f"acme/{n}": 6 for n in NAMES}
            (invoice,) = (await admin.get("/api/v1/invoices")).json()["data"]
            assert invoice["total_nano_usd"] == sum(line["nano_usd"] for line in invoice["lines"]) > 0
            assert invoice["dedicated_total_nano_usd"] > 0
            assert "tidegate_ledger_records_total 6.0" in (await client.get("/metrics")).text

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
            await until(lambda: is_ready(client))
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
