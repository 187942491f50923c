"""Where the time of a request goes that has to swap one model for another, step by step.

Run: ``python -m bench.activation [--rounds N]``. Two private endpoints, one accelerator with room for one of them, a
real platform. They are asked in turn, so every request drains the other's replica, puts it to sleep, wakes its own, and
is then served. Instants are the client's, those of the audit log, and the gateway's headers, all of one clock, in whole
milliseconds; `awake` is the same request again with nothing to wake. Medians, and p95 of the whole.
"""

import asyncio
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import live, main
from tests.e2e.platform import Platform, running
from tidegate import demo_models

ROUNDS = 30
ENDPOINTS = ("acme/left", "acme/right")
REST_S = 0.6  # longer than the minimum residency, so that a swap never waits for it
CONFIG = 'demo = false\n[accelerators]\ncount = 1\nmemory = "256MiB"\n'

# (what it is called, (actor, kind of the audit line, whose line)): in the order in which they happen
STEPS = (
    ("the request reaches the gateway, its demand the core, and a drain is decided", ("core", "drain", "victim")),
    ("every gateway fences it off; the core orders sleep", ("core", "sleep", "victim")),
    ("the node takes the order; the engine has drained", ("node", "sleeping", "victim")),
    ("the engine sleeps and its memory is measured twice", ("node", "asleep", "victim")),
    ("the core books the room and orders the wake", ("core", "wake", "taker")),
    ("the node takes the order", ("node", "waking", "taker")),
    ("wake, canary, memory measured", ("node", "ready", "taker")),
)


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """Medians of each step in ms, of the whole, and of the same request awake."""
    with tempfile.TemporaryDirectory(prefix="tg-") as folder, running(Path(folder), config=CONFIG) as platform:
        return asyncio.run(_measure(platform, rounds))


async def _measure(platform: Platform, rounds: int) -> dict[str, Any]:
    swaps, awake = [], []
    async with live.clients(platform, ["acme"]) as clients:
        for endpoint, name in zip(ENDPOINTS, demo_models.NAMES, strict=False):
            model = demo_models.path(name)
            await asyncio.to_thread(partial(live.apply, platform, endpoint, model, accelerator_memory="154MiB"))
        for endpoint in ENDPOINTS:  # loaded once each
            await clients.ask("acme", endpoint, 1)
        headers = {"authorization": f"Bearer {platform.ready['admin_key']}"}
        async with httpx.AsyncClient(base_url=platform.base_url, headers=headers) as admin:
            for number in range(2 * rounds):
                taker, victim = ENDPOINTS[number % 2], ENDPOINTS[1 - number % 2]
                await asyncio.sleep(REST_S)
                began_ms = time.time_ns() / 1e6
                first = await clients.ask("acme", taker, 1)
                lines = (await admin.get("/api/v1/activity", params={"limit": 40})).json()["data"]
                awake.append((await clients.ask("acme", taker, 1)).ttft_ms)
                if swap := _steps(lines, began_ms, first.ttft_ms, {"taker": taker, "victim": victim}):
                    swaps.append(swap)
    assert swaps, "no request met a swap"
    whole = [sum(swap) for swap in swaps]
    return {
        "load_average": live.load_average(),
        "rounds": len(swaps),
        "steps_ms": {
            what: round(statistics.median(swap[index] for swap in swaps), 1)
            for index, what in enumerate([*(what for what, _ in STEPS), "route, grant, prefill, first token"])
        },
        "whole_ms": live.percentiles(whole),
        "awake_ms": live.percentiles(awake),
        "beyond_awake_ms_p50": round(statistics.median(whole) - statistics.median(awake), 1),
    }


def _steps(lines: list[dict[str, Any]], began_ms: float, ttft_ms: float, who: dict[str, str]) -> list[float]:
    """How long each step took; empty when this request met no whole swap."""
    instants, begun = [began_ms], int(began_ms)
    for _, (actor, kind, role) in STEPS:
        found = [
            line["at_ms"] for line in lines
            if (line["actor"], line["kind"], line["subject"]) == (actor, kind, who[role]) and line["at_ms"] >= begun
        ]  # fmt: skip
        if not found:
            return []
        instants.append(min(found))
    instants.append(began_ms + ttft_ms)
    return [after - before for before, after in itertools.pairwise(instants)]


if __name__ == "__main__":
    main(run)
