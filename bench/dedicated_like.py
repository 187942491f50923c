"""Eight private endpoints on two accelerators beside the same eight with an accelerator each.

Run: ``python -m bench.dedicated_like [--seconds S] [--trace F]``. Both platforms serve the same spiky trace, one after
the other: without TRACE one from a seed (`spiky`), with TRACE (CSV or CSV.gz: t_s, endpoint, input_tokens,
output_tokens) the eight busiest endpoints of its busiest stretch of SECONDS. The endpoints of the first are
`dedicated`, of the others `dedicated_serverless`: in `alone` each reserves 60 % of an accelerator, so that two of the
eight are resident at once; in `pairs` 45 %, so that four are. Compared are TTFT as clients see it, how many requests
met an activation, and accelerator-seconds held. Aims: p95 ≤ 1.10 ×, accelerator-seconds ≤ 0.3 ×.

`spiky` has a burst begin on each endpoint every 76 s on average, with 18 requests: with two of eight resident at least
4 in 100 requests begin a burst on an endpoint that sleeps. So p95 shows how long a swap takes, and how many requests of
a burst come while it lasts.

On CPU accelerators all replicas of both platforms share the same cores: eight dedicated engines have no more compute
than two, only more memory. What is compared is waiting for capacity, which is what sharing accelerators adds.
"""

import asyncio
import csv
import gzip
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import live, main
from tests.e2e.platform import Platform, running
from tidegate import demo_models

SECONDS = 300.0
ENDPOINTS = [f"acme/e{number}" for number in range(8)]
TOKENS_MAX = 16
BURST_GAP_S, BURST_S, BURST_RATE_S = 70.0, 6.0, 3.0
# mode, accelerators, what each endpoint reserves of the 256 MiB of one
SHAPES = {
    "dedicated": ("dedicated", 8, "154MiB"),
    "alone": ("dedicated_serverless", 2, "154MiB"),
    "pairs": ("dedicated_serverless", 2, "115MiB"),
}

Row = tuple[float, str, int]
"""(seconds from the start, endpoint, output tokens)"""


def run(seconds: float = SECONDS, trace: Path | None = None) -> dict[str, Any]:
    """Figures of both platforms, in ms and accelerator-seconds, and their ratios."""
    rows = spiky(seconds) if trace is None else busiest(trace, seconds)
    figures: dict[str, Any] = {
        "load_average": live.load_average(), "seconds": seconds, "trace": trace.name if trace else "spiky, seed 7",
        "requests": len(rows),
    }  # fmt: skip
    for name, (mode, accelerators, memory) in SHAPES.items():
        config = f'demo = false\n[accelerators]\ncount = {accelerators}\nmemory = "256MiB"\n'
        with tempfile.TemporaryDirectory(prefix="tg-") as folder, running(Path(folder), config=config) as platform:
            figures[name] = asyncio.run(_measure(platform, mode, accelerators, memory, rows, seconds))
    own = figures["dedicated"]
    figures["ratios"] = {
        name: {
            **{f"ttft_{p}": round(figures[name]["ttft_ms"][p] / own["ttft_ms"][p], 3) for p in ("p50", "p95", "p99")},
            "accelerator_seconds": round(figures[name]["accelerator_seconds"] / own["accelerator_seconds"], 3),
        }
        for name in ("alone", "pairs")
    }
    figures["aims"] = {"ttft_p95": 1.10, "accelerator_seconds": 0.3}
    return figures


def spiky(seconds: float, seed: int = 7) -> list[Row]:
    """Each endpoint is quiet, then busy for some seconds, again and again: bursts of a Poisson process."""
    dice, rows = random.Random(seed), []
    for endpoint in ENDPOINTS:
        for begins in live.poisson(1 / BURST_GAP_S, seconds, dice):
            for at in live.poisson(BURST_RATE_S, min(dice.expovariate(1 / BURST_S), seconds - begins), dice):
                rows.append((begins + at, endpoint, dice.randint(2, TOKENS_MAX)))
    return sorted(rows)


def busiest(trace: Path, seconds: float) -> list[Row]:
    """The stretch with the most requests, of its eight busiest endpoints; answers cut to `TOKENS_MAX` tokens."""
    with gzip.open(trace, "rt", newline="") if trace.suffix == ".gz" else trace.open(newline="") as file:
        every = [(float(r["t_s"]), r["endpoint"], int(r["output_tokens"])) for r in csv.DictReader(file)]
    per = Counter(int(at // seconds) for at, _, _ in every)
    start = per.most_common(1)[0][0] * seconds
    within = [row for row in every if start <= row[0] < start + seconds]
    names = {old: new for (old, _), new in zip(Counter(r[1] for r in within).most_common(8), ENDPOINTS, strict=False)}
    return sorted((at - start, names[old], max(2, min(n, TOKENS_MAX))) for at, old, n in within if old in names)


async def _measure(
    platform: Platform, mode: str, accelerators: int, memory: str, rows: Sequence[Row], seconds: float
) -> dict[str, Any]:
    async with live.clients(platform, ["acme"]) as clients:
        for number, endpoint in enumerate(ENDPOINTS):
            model = demo_models.path(demo_models.NAMES[number % len(demo_models.NAMES)])
            await asyncio.to_thread(
                partial(live.apply, platform, endpoint, model, mode=mode, accelerator_memory=memory, slots=8)
            )
        for endpoint in ENDPOINTS:
            await live.until_state(platform, endpoint, "ready", "idle", "asleep", seconds=120)
        async with asyncio.TaskGroup() as group:
            for endpoint in ENDPOINTS:
                mine = [row for row in rows if row[1] == endpoint]
                group.create_task(_replay(clients, mine))
        answers = [a for a in clients.answers if not a.error]
        async with httpx.AsyncClient(base_url=platform.base_url) as http:
            metrics = (await http.get("/metrics")).text
    activated = sum(a.activation_ms > 0 for a in answers)
    return {
        "mode": mode,
        "accelerators": accelerators,
        "answered": len(answers),
        "failed": len(clients.answers) - len(answers),
        "ttft_ms": live.percentiles(a.ttft_ms for a in answers),
        "ttft_ms_of_activated": live.percentiles(a.ttft_ms for a in answers if a.activation_ms > 0),
        "activated_share": round(activated / len(answers), 4),
        "accelerator_seconds": round(accelerators * seconds, 1),
        "thrash_ratio": _value(metrics, "tidegate_thrash_ratio"),
    }


async def _replay(clients: live.Clients, rows: Sequence[Row]) -> None:
    """Open loop: each request at its instant, with its own length."""
    lengths = iter([(row[1], row[2]) for row in rows])
    await live.arrive([row[0] for row in rows], lambda: clients.ask("acme", *next(lengths)))


def _value(metrics: str, name: str) -> float | None:
    return next((float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name)), None)


if __name__ == "__main__":
    main(run)
