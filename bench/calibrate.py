"""The live platform and the simulator on the same five minutes of traffic: how far is the one from the other?

Run: ``python -m bench.calibrate [--seconds N] [--seed N]``. Six private endpoints (30M random weights each) on two CPU
accelerators that hold two replicas each; on-off traffic, so endpoints fall quiet, are evicted and come back.

1. The live platform is started (real processes, built-in engine) and its hardware measured through its public port:
   prefill and decode rate of one stream, the fixed cost of a request, sleep → first token. These become the simulator's
   profile; nothing is fitted to the replay that follows.
2. The trace is replayed against it, open loop; what each client saw is written down.
3. The same requests, at the instants they were really sent and with the tokens really used, go through the simulator:
   same core, same settings, same deployments.

TTFT is as the client sees it. The fixed cost (HTTP, tokenizing, the first sampling) is not part of the simulator's
model, so it is added to its TTFT; it is one measured number.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.engine import SHAPES
from tests import models
from tests.e2e.platform import Platform, running, wait_until
from tidegate.assemble.settings import core_settings, node_limits
from tidegate.config import load
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment
from tidegate.domain.fleet import Accelerator
from tidegate.policy.reconcile import FleetCore
from tidegate.sim import workload
from tidegate.sim.meter import Meter
from tidegate.sim.nodes import SimNode
from tidegate.sim.profile import AcceleratorProfile, FleetProfile, ModelSpec, NodeProfile
from tidegate.sim.trace import Row
from tidegate.sim.workload import Traffic
from tidegate.sim.world import World
from tidegate.stores.database import open_database
from tidegate.stores.state import SqlStateStore

ENDPOINTS = 6
REPLICA_BYTES = 400 << 20
ACCELERATOR_BYTES = 820 << 20  # holds two
SETTLE_MS = 60_000.0
TTFT_MS_MAX, TPOT_MS_MAX = 500.0, 100.0
PROMPT_TOKENS, OUTPUT_TOKENS = 120, 24
RESULTS = Path(__file__).parent / "results" / "calibrate.md"
CONFIG = f"""
demo = false
host_memory = "6GiB"
[accelerators]
kind = "cpu"
count = 2
memory = "{ACCELERATOR_BYTES}"
[engine]
threads = 1
[[tenants]]
id = "cal"
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """This machine, as one client sees it: milliseconds and tokens a millisecond."""

    fixed_ms: float
    prefill_tokens_per_ms: float
    decode_ms: float
    wake_ms: float


@dataclass(slots=True)
class Seen:
    """One request as its client saw it. Instants in ms from the start of the replay."""

    endpoint: str
    sent_ms: float
    ttft_ms: float = -1.0
    ended_ms: float = -1.0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot_ms(self) -> float:
        gaps = self.output_tokens - 1
        return (self.ended_ms - self.sent_ms - self.ttft_ms) / gaps if gaps > 0 else 0.0


def run(seconds: float = 300.0, seed: int = 7) -> dict[str, Any]:
    """Figures of both, and live ÷ simulated."""
    with tempfile.TemporaryDirectory(prefix="tg-cal-") as folder:
        directory = Path(folder)
        with running(directory, config=CONFIG) as platform:
            seen, measured, activations = asyncio.run(_live(platform, seconds, seed))
        deployments = SqlStateStore(open_database(f"sqlite:///{directory}/data/tidegate.db")).load().deployments
        simulated = _simulate(seen, measured, deployments, directory)
    live = _figures([s.ttft_ms for s in seen], _attained(seen, measured), activations)
    keys = ("ttft_p50_ms", "ttft_p95_ms", "activations", "attainment")
    return {
        "requests": len(seen),
        "seconds": seconds,
        "load_average": round(os.getloadavg()[0], 1),
        "measured": {name: round(getattr(measured, name), 3) for name in Measured.__slots__},
        "live": live,
        "simulated": simulated,
        "simulated_to_live": {key: round(simulated[key] / live[key], 3) if live[key] else None for key in keys},
    }


# --- the live side ----------------------------------------------------------------------------------------------------


async def _live(platform: Platform, seconds: float, seed: int) -> tuple[list[Seen], Measured, int]:
    model = models.llama_of_words(**SHAPES["30M"], context=1024, dtype="bfloat16")
    with platform.admin() as admin:
        for number in range(ENDPOINTS):
            body = {"model": str(model), "slots": 8, "accelerator_memory": REPLICA_BYTES}
            admin.put(f"/api/v1/endpoints/cal/e{number}", json=body).raise_for_status()
        wait_until(lambda: all(e["state"] != "creating" for e in _endpoints(admin)), "every endpoint loaded once")
        key = admin.post("/api/v1/keys", json={"tenant": "cal"}).json()["secret"]
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=platform.base_url, headers=headers, timeout=120) as client:
            measured = await _measure(client, admin)
            before = sum(e["activations"] for e in _endpoints(admin))
            seen = await _replay(client, seconds, seed)
        return seen, measured, sum(e["activations"] for e in _endpoints(admin)) - before


def _endpoints(admin: httpx.Client) -> list[dict[str, Any]]:
    return list(admin.get("/api/v1/endpoints").raise_for_status().json()["data"])


async def _measure(client: httpx.AsyncClient, admin: httpx.Client) -> Measured:
    """Medians of nine, one stream at a time, on an endpoint that is awake; then asleep each time."""
    began = time.perf_counter()
    await _ask(client, "cal/e0", 16, 2, began)
    short = [await _ask(client, "cal/e0", 16, 33, began) for _ in range(9)]
    long = [await _ask(client, "cal/e0", 616, 2, began) for _ in range(9)]
    woken = []
    for _ in range(9):
        _put_to_sleep(admin)
        woken.append(await _ask(client, "cal/e0", 16, 2, began))
    short_ms, long_ms = (statistics.median(s.ttft_ms for s in some) for some in (short, long))
    tokens = statistics.median(s.input_tokens for s in long) - statistics.median(s.input_tokens for s in short)
    rate = tokens / (long_ms - short_ms)
    return Measured(
        fixed_ms=short_ms - statistics.median(s.input_tokens for s in short) / rate,
        prefill_tokens_per_ms=rate,
        decode_ms=statistics.median(s.tpot_ms for s in short),
        wake_ms=statistics.median(s.ttft_ms for s in woken) - short_ms,
    )


def _put_to_sleep(admin: httpx.Client) -> None:
    admin.post("/api/v1/endpoints/cal/e0/sleep").raise_for_status()
    wait_until(lambda: admin.get("/api/v1/endpoints/cal/e0").json()["state"] == "asleep", "e0 asleep")


async def _replay(client: httpx.AsyncClient, seconds: float, seed: int) -> list[Seen]:
    began = time.perf_counter()
    tasks = []
    for at_ms, endpoint, input_tokens, output_tokens in _trace(seconds, seed):
        await asyncio.sleep(max(0.0, began + at_ms / 1000.0 - time.perf_counter()))
        asked = _ask(client, endpoint, min(input_tokens, 700), min(max(output_tokens, 2), 128), began)
        tasks.append(asyncio.create_task(asked))
    return sorted(await asyncio.gather(*tasks), key=lambda s: s.sent_ms)


def _trace(seconds: float, seed: int) -> Iterator[Row]:
    traffic = [
        Traffic(f"cal/e{n}", "on_off", 0.5, PROMPT_TOKENS, OUTPUT_TOKENS, period_ms=15_000.0) for n in range(ENDPOINTS)
    ]
    return workload.rows(traffic, seconds * 1000.0, seed)


async def _ask(client: httpx.AsyncClient, endpoint: str, input_tokens: int, output_tokens: int, began: float) -> Seen:
    seen = Seen(endpoint, (time.perf_counter() - began) * 1000.0)
    body = {
        "model": endpoint, "prompt": "word1 " * input_tokens, "max_tokens": output_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            now_ms = (time.perf_counter() - began) * 1000.0
            if event.get("choices"):
                if seen.ttft_ms < 0.0:
                    seen.ttft_ms = now_ms - seen.sent_ms
                seen.ended_ms = now_ms
            if event.get("usage"):
                seen.input_tokens, seen.output_tokens = (
                    event["usage"]["prompt_tokens"],
                    event["usage"]["completion_tokens"],
                )
    return seen


def _attained(seen: list[Seen], measured: Measured) -> float:
    """Share within the SLO, TTFT counted beyond the prefill and the fixed cost as in the simulator."""
    own = [s.ttft_ms - measured.fixed_ms - s.input_tokens / measured.prefill_tokens_per_ms for s in seen]
    good = sum(1 for s, beyond in zip(seen, own, strict=True) if beyond <= TTFT_MS_MAX and s.tpot_ms <= TPOT_MS_MAX)
    return good / len(seen)


# --- the simulated side -----------------------------------------------------------------------------------------------


def _profile(measured: Measured, deployment: Deployment) -> FleetProfile:
    """Rates such that one stream alone takes what was measured. A wake copies nothing on a CPU: all of it is fixed."""
    model = deployment.model
    params = max(model.params, 1)
    spec = ModelSpec("m", model.weight_bytes, float(params), model.kv_bytes_per_token)
    flop_per_ms = 2.0 * params * measured.prefill_tokens_per_ms / spec.flop_rate_factor
    hardware = AcceleratorProfile(
        name="cpu",
        memory_bytes=ACCELERATOR_BYTES,
        memory_bytes_per_ms=model.weight_bytes / measured.decode_ms,
        link_bytes_per_ms=1e12,
        dense_flop_per_ms=flop_per_ms,
        usd_per_hour=1.0,
        workspace_bytes=ControlSettings().workspace_bytes,
    )
    node = NodeProfile(
        accelerators=2, host_memory_bytes=6 << 30, start_ms=1_000.0, wake_fixed_ms=measured.wake_ms, sleep_fixed_ms=20.0
    )
    return FleetProfile(hardware, node, {"m": spec}, default_model="m", tpot_ms=TPOT_MS_MAX)


def _simulate(
    seen: list[Seen], measured: Measured, deployments: tuple[Deployment, ...], directory: Path
) -> dict[str, Any]:
    config = load(directory / "tidegate.toml")
    accelerators = tuple(Accelerator(f"cpu-{i}", "cpu", ACCELERATOR_BYTES) for i in range(2))
    core = FleetCore(core_settings(config, node_limits(config), accelerators))
    profile = _profile(measured, deployments[0])
    meter = Meter(TTFT_MS_MAX, TPOT_MS_MAX)
    world = World(profile, core, meter)
    world.add_node(SimNode("node-0", 2, profile))
    for deployment in sorted(deployments, key=lambda d: d.endpoint):
        world.apply(deployment)
    world.run_until(SETTLE_MS)
    meter.begin(world.now_ms)
    world.run((s.sent_ms, s.endpoint, s.input_tokens, max(s.output_tokens, 1)) for s in seen)
    figures = {name: meter.ttft.quantile(q) + measured.fixed_ms for name, q in (("p50", 0.5), ("p95", 0.95))}
    return {
        "ttft_p50_ms": round(figures["p50"], 1),
        "ttft_p95_ms": round(figures["p95"], 1),
        "activations": meter.activations,
        "attainment": round(meter.attained / max(meter.requests, 1), 4),
    }


def _figures(ttft_ms: list[float], attainment: float, activations: int) -> dict[str, Any]:
    cuts = statistics.quantiles(ttft_ms, n=100, method="inclusive")
    return {
        "ttft_p50_ms": round(cuts[49], 1),
        "ttft_p95_ms": round(cuts[94], 1),
        "activations": activations,
        "attainment": round(attainment, 4),
    }


# --- report -----------------------------------------------------------------------------------------------------------


def page(figures: dict[str, Any]) -> str:
    measured = figures["measured"]
    names = {"ttft_p50_ms": "TTFT p50, ms", "ttft_p95_ms": "TTFT p95, ms", "activations": "activations",
             "attainment": "within SLO"}  # fmt: skip
    rows = [
        f"| {name} | {figures['live'][key]} | {figures['simulated'][key]} | {figures['simulated_to_live'][key]} |"
        for key, name in names.items()
    ]
    return (
        "# bench calibrate\n\n"
        f"{figures['requests']} requests in {figures['seconds']:.0f} s, {ENDPOINTS} endpoints on 2 CPU accelerators "
        f"that hold two replicas each, load average {figures['load_average']}. Measured beforehand and given to the "
        f"simulator: prefill {measured['prefill_tokens_per_ms']} tokens/ms, decode {measured['decode_ms']} ms a token, "
        f"sleep to first token {measured['wake_ms']} ms, fixed {measured['fixed_ms']} ms a request. Aim: within 20 %. "
        "`python -m bench.calibrate --write` writes this page.\n\n"
        "| | live | simulated | simulated ÷ live |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write bench/results/calibrate.md")
    options = parser.parse_args()
    results = run(options.seconds, options.seed)
    print(json.dumps(results, indent=2))
    if options.write:
        RESULTS.write_text(page(results))
