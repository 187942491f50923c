"""Changes of a live endpoint under load: how many requests each kind of change fails, loses or doubles.

Run: ``python -m bench.livechange [--rate-s N] [--seconds S]``. One tenant streams from one endpoint of the
built-in engine at a steady rate (open loop) while its configuration is changed again and again: price plan, replicas,
slots, mode, engine arguments, model, a canary and its rollback. The target is zero failed requests for each kind. In
the end the ledger must hold every request exactly once.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench import live, main
from tests.e2e.platform import Platform, running
from tidegate import demo_models

RATE_S = 50.0
SECONDS = 8.0
TOKENS = 4
ENDPOINT = "acme/chat"
CONFIG = """
demo = false
[accelerators]
count = 2
memory = "1GiB"
[prices.default]
[prices.gold]
input_usd_per_million_tokens = "2"
"""
BASE: dict[str, Any] = {"min_replicas": 1, "max_replicas": 1, "slots": 8, "accelerator_memory": "256MiB"}
CHANGES: dict[str, dict[str, Any] | None] = {
    "nothing": {},
    "price_plan": {"price_plan": "gold"},
    "replicas": {"min_replicas": 2, "max_replicas": 2},
    "replicas_back": {},
    "slots": {"slots": 6},
    "mode_dedicated": {"mode": "dedicated"},
    "mode_serverless": {"mode": "serverless"},
    "engine_args": {"engine_args": {"adapter_bytes_max": "1048576"}},
    "model": {"model": "stars"},
    "rollback_of_the_model": None,
    "canary": {"canary": "stars"},
    "rollback_of_the_canary": None,
}


def run(rate_s: float = RATE_S, seconds: float = SECONDS, kinds: Callable[[str], bool] = bool) -> dict[str, Any]:
    """Per change: requests, failures, who served, TTFT in ms; and how the ledger agrees with the clients."""
    with tempfile.TemporaryDirectory(prefix="tg-") as folder, running(Path(folder), config=CONFIG) as platform:
        return asyncio.run(_measure(platform, rate_s, seconds, [kind for kind in CHANGES if kinds(kind)]))


async def _measure(platform: Platform, rate_s: float, seconds: float, kinds: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"load_average": live.load_average(), "requests_per_second": rate_s, "changes": {}}
    async with live.clients(platform, ["acme"]) as clients:
        await asyncio.to_thread(_change, platform, {})
        await live.until_state(platform, ENDPOINT, "ready", "idle")
        for kind in kinds:
            before = len(clients.answers)
            instants = [number / rate_s for number in range(int(rate_s * seconds))]
            load = asyncio.create_task(live.arrive(instants, lambda: clients.ask("acme", ENDPOINT, TOKENS)))
            await asyncio.sleep(seconds / 4)
            began = time.perf_counter()
            await asyncio.to_thread(_change, platform, CHANGES[kind])
            applied_ms = (time.perf_counter() - began) * 1000
            at_rest_ms = await _at_rest(platform, began)
            await load
            answers = clients.answers[before:]
            figures["changes"][kind] = {
                "requests": len(answers),
                "failed": sum(bool(a.error) for a in answers),
                "errors": sorted({a.error for a in answers if a.error})[:3],
                "replicas": len({a.replica for a in answers}),
                "apply_ms": round(applied_ms, 1),
                "at_rest_ms": at_rest_ms,
                "ttft_ms": live.percentiles(a.ttft_ms for a in answers if not a.error),
            }
        asked = [a for a in clients.answers if not a.error]
        figures["ledger"] = await _ledger(platform, len(asked))
    figures["failed"] = sum(change["failed"] for change in figures["changes"].values())
    return figures


def _change(platform: Platform, change: dict[str, Any] | None) -> None:
    """Applies it, or rolls back for None."""
    if change is None:
        with platform.admin() as admin:
            admin.post(f"/api/v1/endpoints/{ENDPOINT}/rollback").raise_for_status()
        return
    body = BASE | change
    if "canary" in body:
        body["canary"] = {"model": str(demo_models.path(body["canary"])), "weight": 0.3}
    live.apply(platform, ENDPOINT, demo_models.path(body.pop("model", "tides")), **body)


async def _at_rest(platform: Platform, began: float) -> float | None:
    """How long until as many replicas serve as should and nothing is on its way any more; None when not in 60 s."""
    async with httpx.AsyncClient(base_url=platform.base_url) as http:
        http.headers["authorization"] = f"Bearer {platform.ready['admin_key']}"
        while time.perf_counter() - began < 60:
            shown = (await http.get(f"/api/v1/endpoints/{ENDPOINT}")).json()
            ready = [r for r in shown["replicas"] if r["state"] == "ready"]
            canary = shown["canary"] is None or shown["canary"]["state"] in ("ready", "idle")
            resting = [r for r in shown["replicas"] if r["state"] in ("ready", "asleep")]
            if canary and len(ready) == shown["min_replicas"] and len(resting) == len(shown["replicas"]):
                return round((time.perf_counter() - began) * 1000, 1)
            await asyncio.sleep(0.1)
    return None


async def _ledger(platform: Platform, answered: int) -> dict[str, int]:
    """What the clients saw answered, and what the ledger holds once it has caught up: the same, or something was lost
    or doubled.
    """
    async with httpx.AsyncClient(base_url=platform.base_url) as http:
        http.headers["authorization"] = f"Bearer {platform.ready['admin_key']}"
        billed, deadline = -1, time.monotonic() + 20
        while time.monotonic() < deadline and billed < answered:
            total = (await http.get("/api/v1/usage", params={"by": "endpoint"})).json()["total"]
            billed = total["requests"] - total["refused_requests"]
            await asyncio.sleep(0.2)
    return {"answered": answered, "in_ledger": billed}


if __name__ == "__main__":
    main(run)
