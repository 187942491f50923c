"""Fifty adapters on one replica, beside the bare base and beside one adapter: tokens a second, and memory.

Run: ``python -m bench.adapters [--adapters N] [--seconds S] [--write]``. One engine (30M random weights), 16 streams at
a time, each of 64 tokens, over its own socket. Rounds of the three loads alternate; a ratio is of one round and what is
shown is the median over rounds. Memory is what the adapters' tensors take, beside what as many models would.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from bench.engine import SHAPES
from tests import models
from tests.torch_engine.serving import Serving
from tidegate.torch_engine.adapter import TENSORS, digest_of

STREAMS, TOKENS, RANK, ROUNDS = 16, 64, 16, 5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RESULTS = Path(__file__).parent / "results" / "adapters.md"


def run(adapters: int = 50, seconds: float = 6.0) -> dict[str, Any]:
    """Tokens a second of each load, and ratios to the bare base."""
    base = models.llama_of_words(**SHAPES["30M"], context=1024, dtype="bfloat16")
    folders = [models.lora(base, seed, rank=RANK, targets=TARGETS) for seed in range(adapters)]
    headers = [{"x-tidegate-adapter": f"{digest_of(folder)} {quote(str(folder))}"} for folder in folders]
    loads = {"base": [{}], "one_adapter": headers[:1], f"{adapters}_adapters": headers}
    adapter_bytes = (folders[0] / TENSORS).stat().st_size
    rates: dict[str, list[float]] = {name: [] for name in loads}
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        options = {"adapter_bytes_max": adapters * adapter_bytes + (1 << 20), "slots": STREAMS}
        with Serving(base, Path(folder), **options) as serving:
            for name in loads:
                asyncio.run(_rate(serving.path, loads[name], 2.0))
            for _ in range(ROUNDS):
                for name in loads:
                    rates[name].append(asyncio.run(_rate(serving.path, loads[name], seconds)))
    plain = rates["base"]
    return {
        "adapters": adapters,
        "rank": RANK,
        "streams": STREAMS,
        "threads": 1,
        "load_average": round(load_average, 1),
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio_to_base": {
            name: round(statistics.median(v / b for v, b in zip(values, plain, strict=True)), 3)
            for name, values in rates.items()
        },
        "adapter_bytes": adapter_bytes,
        "base_bytes": (base / "model.safetensors").stat().st_size,
        "memory_to_as_many_models": round(
            1 / adapters + adapter_bytes / (base / "model.safetensors").stat().st_size, 4
        ),
    }


async def _rate(path: str, headers: list[dict[str, str]], seconds: float) -> float:
    """Completion tokens a second while `STREAMS` ask in a closed loop, taking turns through `headers`."""
    transport = httpx.AsyncHTTPTransport(uds=path)
    tokens, number = 0, 0
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=120) as client:
        began = time.perf_counter()

        async def ask() -> None:
            nonlocal tokens, number
            while time.perf_counter() - began < seconds:
                number += 1
                asked = headers[number % len(headers)]
                body = {"model": "m", "prompt": f"word{number % 500} word7", "max_tokens": TOKENS, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body, headers=asked)
                answer.raise_for_status()
                tokens += answer.json()["usage"]["completion_tokens"]

        await asyncio.gather(*(ask() for _ in range(STREAMS)))
        return tokens / (time.perf_counter() - began)


def page(figures: dict[str, Any]) -> str:
    many = f"{figures['adapters']}_adapters"
    rows = [
        f"| {name.replace('_', ' ')} | {figures['tokens_per_s'][name]} | {figures['ratio_to_base'][name]} |"
        for name in ("base", "one_adapter", many)
    ]
    size, base = figures["adapter_bytes"] / 1e6, figures["base_bytes"] / 1e6
    return (
        f"# bench adapters\n\nOne replica of a 30M model, {STREAMS} streams, rank {RANK} on all linear layers, one "
        f"thread, medians of {ROUNDS} rounds, load average {figures['load_average']}. `python -m bench.adapters "
        "--write` writes this page.\n\n| load | tokens/s | ÷ base |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Files of the base and {figures['adapters']} adapters of {size:.2f} MB, against as many models of {base:.1f} "
        f"MB: {figures['memory_to_as_many_models']:.1%}.\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--write", action="store_true", help="write bench/results/adapters.md")
    options = parser.parse_args()
    results = run(options.adapters, options.seconds)
    print(json.dumps(results, indent=2))
    if options.write:
        RESULTS.write_text(page(results))
