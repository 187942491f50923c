"""Nine quiet tenants on a shared endpoint, without and with a tenant that floods it.

Run: ``python -m bench.fairness [--seconds S]``. One serverless endpoint on one accelerator of the built-in engine. Nine
tenants send one request a second each (Poisson, seeded); then the same again while a tenth keeps `FLOOD` requests
waiting. What is compared is the nine's TTFT: the waiting room gives each freed slot to whoever was served least, so
a flood costs them the wait for one freed slot (`held_ms`: at most what one request of the flood takes) and an engine
that is full (the rest of the difference), however many requests it sends.
"""

import asyncio
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench import live, main
from tests.e2e.platform import running
from tidegate import demo_models

SECONDS = 60.0
FLOOD = 64
SLOTS = 4
TOKENS, FLOOD_TOKENS = 8, 16
ENDPOINT = "house/common"
CALM = [f"calm{number}" for number in range(9)]


def run(seconds: float = SECONDS) -> dict[str, Any]:
    """TTFT of the nine in ms, both ways, and the ratio of their p99."""
    config = 'demo = false\n[accelerators]\ncount = 1\nmemory = "512MiB"\n'
    with tempfile.TemporaryDirectory(prefix="tg-") as folder, running(Path(folder), config=config) as platform:
        return asyncio.run(_measure(platform, seconds))


async def _measure(platform: Any, seconds: float) -> dict[str, Any]:
    async with live.clients(platform, ["house", "flood", *CALM]) as clients:
        live.apply(platform, ENDPOINT, demo_models.path("tides"), mode="serverless", slots=SLOTS)
        await live.until_state(platform, ENDPOINT, "ready", "idle")
        await asyncio.gather(*(clients.ask(tenant, ENDPOINT, 1) for tenant in CALM))
        alone = await _calm(clients, seconds)
        stop = asyncio.Event()
        flooding = [asyncio.create_task(_flood(clients, stop)) for _ in range(FLOOD)]
        await asyncio.sleep(2)
        flooded = await _calm(clients, seconds)
        stop.set()
        await asyncio.gather(*flooding)
        flood = [a for a in clients.answers if a.tenant == "flood"]
    without, within = live.percentiles(a.ttft_ms for a in alone), live.percentiles(a.ttft_ms for a in flooded)
    return {
        "load_average": live.load_average(),
        "slots": SLOTS,
        "flood_waiting": FLOOD,
        "ttft_ms_without_flood": without,
        "ttft_ms_with_flood": within,
        "held_ms_without_flood": live.percentiles(a.queue_ms for a in alone),
        "held_ms_with_flood": live.percentiles(a.queue_ms for a in flooded),
        "ttft_ms_of_the_flood": live.percentiles(a.ttft_ms for a in flood),
        "failed": sum(bool(a.error) for a in [*alone, *flooded]),
        "ratios": {
            "p99_with_to_without": round(within["p99"] / without["p99"], 2),
            "flood_p50_to_nine_p50": round(live.percentiles(a.ttft_ms for a in flood)["p50"] / within["p50"], 2),
        },
    }


async def _calm(clients: live.Clients, seconds: float) -> list[live.Answer]:
    """The nine for `seconds`; the same instants each time."""
    before = len(clients.answers)
    async with asyncio.TaskGroup() as group:
        for number, tenant in enumerate(CALM):
            instants = live.poisson(1.0, seconds, random.Random(number))
            group.create_task(live.arrive(instants, partial(clients.ask, tenant, ENDPOINT, TOKENS)))
    return [a for a in clients.answers[before:] if a.tenant != "flood"]


async def _flood(clients: live.Clients, stop: asyncio.Event) -> None:
    while not stop.is_set():
        await clients.ask("flood", ENDPOINT, FLOOD_TOKENS)


if __name__ == "__main__":
    main(run)
