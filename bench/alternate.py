"""Two endpoints take turns on one accelerator that holds one of them: A B A B … through the live platform.

    python -m bench.alternate [--seconds 300] [--small]

Two phases of equal length. *Turns*: each request is sent when the one before it has answered, so every one needs a swap
(drain, fence, sleep, measure, wake, canary) and the figures are those of the swap itself. *Both*: two clients at once,
each sending its next request when it has its answer, so that each endpoint always wants what the other one has.

Counted by the client: requests sent, answered in full, lost; time to first token; what the platform says of each wait
(``x-tidegate-activation-ms``). Swaps are the platform's own count and time of them (`tidegate_swap_seconds`: from the
drain of the one to the readiness of the other). The bound is `capacity.wait_ms_max`: how long a busy endpoint may keep
another waiting; a request waits for capacity no longer than that, the longest swap seen in turns, and the longest time
a request was on its replica: that of the one before it, which is let finish.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.swap import make_model
from tests.e2e.platform import Platform, running

RESULTS = Path(__file__).parent / "results" / "alternate.md"
WAIT_MS_MAX = 2_000
RESIDENCY_MS_MIN = 50
TOKENS = 8
NAMES = ("acme/a", "acme/b")
KEY = "acme-key-of-sixteen"
CONFIG = """
demo = false
host_memory = "8GiB"
[[tenants]]
id = "acme"
api_key = "{key}"
[accelerators]
kind = "cpu"
count = 1
memory = "{memory}"
[engine]
slots = 4
[capacity]
wait_ms_max = {wait}
residency_ms_min = {residency}
"""


@dataclass(frozen=True)
class Asked:
    """One request. `ttft_ms` None: it was lost. `activation_ms` is the platform's word, 0 when nothing was woken."""

    endpoint: str
    ttft_ms: float | None
    took_ms: float
    activation_ms: int
    problem: str = ""


def run(seconds: float = 300.0, small: bool = False) -> dict[str, Any]:
    """The figures of both phases, and whether what is promised held."""
    model, room = _model(small)
    config = CONFIG.format(key=KEY, memory=room * 3 // 2, wait=WAIT_MS_MAX, residency=RESIDENCY_MS_MIN)
    with (
        tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder,
        running(Path(folder), config=config) as platform,
    ):
        return asyncio.run(_phases(platform, model, room, seconds / 2))


def _model(small: bool) -> tuple[Path, int]:
    """A model, and the accelerator bytes one replica of it is given."""
    if small:
        from tests import models

        return models.llama(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=512, context=512), 256 << 20
    model = make_model()
    return model, weight_bytes(model) + (512 << 20)


def weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


async def _phases(platform: Platform, model: Path, room: int, seconds: float) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=platform.base_url, timeout=180) as client:
        await _apply(client, platform.ready["admin_key"], model, room)
        for name in (*NAMES, *NAMES):  # first loads, first swaps
            await _ask(client, name)
        turns = await _phase(client, _turns(client, seconds))
        both = await _phase(client, _both(client, seconds))
    figures = {
        "weight_bytes": weight_bytes(model),
        "wait_ms_max": WAIT_MS_MAX,
        "residency_ms_min": RESIDENCY_MS_MIN,
        "load_average": round(os.getloadavg()[0], 1),
        "turns": turns,
        "both": both,
    }
    figures["kept"] = {
        "no_request_lost": turns["lost"] == both["lost"] == 0,
        "no_wait_beyond_the_bound": max(turns["activation_ms"]["max"], both["activation_ms"]["max"])
        <= WAIT_MS_MAX + turns["activation_ms"]["max"] + max(turns["served_ms_max"], both["served_ms_max"]),
    }
    return figures


async def _apply(client: httpx.AsyncClient, admin: str, model: Path, room: int) -> None:
    for name in NAMES:
        body = {"model": str(model), "accelerator_memory": room}
        headers = {"authorization": f"Bearer {admin}"}
        answer = await client.put(f"/api/v1/endpoints/{name}", json=body, headers=headers)
        if answer.is_error:
            raise RuntimeError(f"apply of {name}: {answer.text}")


async def _turns(client: httpx.AsyncClient, seconds: float) -> AsyncIterator[Asked]:
    until, turn = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        yield await _ask(client, NAMES[turn % 2])
        turn += 1


async def _both(client: httpx.AsyncClient, seconds: float) -> AsyncIterator[Asked]:
    until = time.monotonic() + seconds
    asked: asyncio.Queue[Asked | None] = asyncio.Queue()

    async def keep_asking(name: str) -> None:
        while time.monotonic() < until:
            asked.put_nowait(await _ask(client, name))
        asked.put_nowait(None)

    async with asyncio.TaskGroup() as group:
        for name in NAMES:
            group.create_task(keep_asking(name))
        for _ in NAMES:
            while (one := await asked.get()) is not None:
                yield one


async def _ask(client: httpx.AsyncClient, name: str) -> Asked:
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "Tide?"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    first: float | None = None
    activation, ended, problem = 0, False, ""
    with contextlib.suppress(httpx.TransportError):  # then it did not end, and is counted as lost
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}
        ) as response:
            activation = int(float(response.headers.get("x-tidegate-activation-ms", 0)))
            async for line in response.aiter_lines():
                if first is None and line.startswith("data: {"):
                    first = _ms_since(began)
                ended = ended or line == "data: [DONE]"
            problem = "" if response.status_code == 200 and ended else f"status {response.status_code}"
    whole = ended and not problem
    return Asked(
        name, first if whole else None, _ms_since(began), activation, problem or ("" if whole else "broke off")
    )


async def _swaps(client: httpx.AsyncClient) -> tuple[int, float]:
    """How many there were so far, and the seconds they took."""
    text = (await client.get("/metrics")).text
    found = re.findall(r"^tidegate_swap_seconds_(count|sum)\{[^}]*\} ([0-9.e+-]+)$", text, re.M)
    count, seconds = (sum(float(value) for name, value in found if name == wanted) for wanted in ("count", "sum"))
    return int(count), seconds


async def _phase(client: httpx.AsyncClient, requests: AsyncIterator[Asked]) -> dict[str, Any]:
    before, began = await _swaps(client), time.perf_counter()
    asked = [one async for one in requests]
    elapsed_s, after = time.perf_counter() - began, await _swaps(client)
    swaps, swap_s = after[0] - before[0], after[1] - before[1]
    served = [one for one in asked if one.ttft_ms is not None]
    swapped = [one for one in served if one.activation_ms > 0]
    ttft = [one.ttft_ms for one in served if one.ttft_ms is not None]
    return {
        "elapsed_s": round(elapsed_s, 1),
        "requests": len(asked),
        "lost": len(asked) - len(served),
        "problems": sorted({one.problem for one in asked if one.problem}),
        "swaps": swaps,
        "swaps_per_s": round(swaps / elapsed_s, 2),
        "swap_ms": round(1000 * swap_s / swaps, 1) if swaps else 0.0,
        "share_of_time_in_swap": round(swap_s / elapsed_s, 3),
        "activation_ms": _spread([float(one.activation_ms) for one in swapped]),
        "ttft_ms": _spread(ttft),
        "served_ms_max": round(max((one.took_ms - one.activation_ms for one in served), default=0.0), 1),
        "by_endpoint": {name: sum(one.endpoint == name for one in served) for name in NAMES},
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p99 = statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]
    return {"p50": round(statistics.median(values), 1), "p99": round(p99, 1), "max": round(max(values), 1)}


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown page."""
    rows = [
        ("requests", "requests"), ("lost", "lost"), ("swaps", "swaps"), ("swaps/s", "swaps_per_s"),
        ("one swap, ms (mean)", "swap_ms"), ("share of the time in a swap", "share_of_time_in_swap"),
    ]  # fmt: skip
    lines = ["| | A B A B in turns | both at once |", "|---|---|---|"]
    lines += [f"| {shown} | {figures['turns'][key]} | {figures['both'][key]} |" for shown, key in rows]
    for shown, key in (("activation, ms", "activation_ms"), ("time to first token, ms", "ttft_ms")):
        cells = [" / ".join(str(figures[phase][key][p]) for p in ("p50", "p99", "max")) for phase in ("turns", "both")]
        lines.append(f"| {shown} (p50 / p99 / max) | {cells[0]} | {cells[1]} |")
    kept = figures["kept"]
    return (
        f"# bench alternate\n\nTwo endpoints of {figures['weight_bytes'] / 2**20:.0f} MiB of weights each on one CPU "
        f"accelerator that holds one, {figures['turns']['elapsed_s']:.0f} s and {figures['both']['elapsed_s']:.0f} s, "
        f"wait_ms_max {figures['wait_ms_max']}, residency_ms_min {figures['residency_ms_min']}, load average "
        f"{figures['load_average']}. `python -m bench.alternate` writes this page; what is counted is at the top of "
        f"bench/alternate.py.\n\n"
        + "\n".join(lines)
        + f"\n\nNo request lost: {kept['no_request_lost']}. No wait beyond the "
        f"bound: {kept['no_wait_beyond_the_bound']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--small", action="store_true", help="a model of a few MB: to try the script")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    figures = run(options.seconds, options.small)
    print(json.dumps(figures, indent=2))
    page = table(figures)
    if not options.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
