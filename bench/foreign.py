"""llama-server and vLLM beside the built-in engine: the same random weights, threads and concurrency, over HTTP.

Run: ``python -m bench.foreign [--rounds N] [--threads N] [--vllm PYTHON]``. Engines are found as tests find them
(`tests/programs.py`); one that is not there is said to be not measured.

Each round asks every engine, one after the other, for 1, 4 and 16 answers at once (whole answers, end token ignored);
a ratio is to the built-in engine in the same round, and what is shown is the median over rounds. Only one engine is
being asked at a time, the others idle. Cold is from the start of the process until the canary was answered (for the
built-in one: forked from its warm template). Sleep and wake are by the driver, the canary included in a wake.

What differs: llama.cpp computes in f16 from GGUF, the others in bf16 from safetensors. vLLM's CPU build counts its
whole Python process as held.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from tests import gguf, models
from tests.programs import LLAMA_SERVER, VLLM_PYTHON
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import Engine, EngineDriver, StartOrder
from tidegate.engines.builtin import BuiltinDriver
from tidegate.engines.inspect import FileInspector
from tidegate.engines.llamacpp import LlamaDriver
from tidegate.engines.process import Lifeline
from tidegate.engines.programs import Program
from tidegate.engines.vllm import VllmDriver

SHAPE: dict[str, Any] = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 1408, "vocab": 8000}
BATCHES = (1, 4, 16)
TOKENS, CONTEXT, SLOTS = 64, 512, 16
RESULTS = Path(__file__).parent / "results" / "foreign.md"
PROMPT = "how many words make a long sound and what is the water for"


def run(rounds: int = 3, threads: int = 0, vllm: str = VLLM_PYTHON) -> dict[str, Any]:
    """Figures by engine; `not_measured` says which were not found."""
    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        figures = asyncio.run(_measure(Path(folder), rounds, threads, vllm))
    missing = [name for name, found in (("llamacpp", LLAMA_SERVER), ("vllm", vllm)) if not found]
    report = {"threads": threads, "rounds": rounds, "load_average": os.getloadavg()[0], "tokens": TOKENS}
    return {**report, "engines": figures, "not_measured": missing}


async def _measure(folder: Path, rounds: int, threads: int, vllm: str) -> dict[str, Any]:
    directory = models.llama(**SHAPE, context=CONTEXT, dtype="bfloat16")
    async with contextlib.AsyncExitStack() as stack:
        lifeline = Lifeline()
        stack.callback(lifeline.close)
        running: dict[str, tuple[Engine, float]] = {}
        for name, driver, model in _drivers(folder, directory, lifeline, threads, vllm):
            running[name] = await stack.enter_async_context(_started(name, driver, model))
        speeds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in running}
        for engine, _ in running.values():
            await _answers(engine, 2, 8)  # warms it up
        for _ in range(rounds):
            for batch in BATCHES:
                for name, (engine, _) in running.items():
                    speeds[name][batch].append(await _answers(engine, batch, TOKENS))
        return {
            name: {
                "cold_ms": round(cold_ms),
                "tokens_per_s": {str(b): round(statistics.median(speeds[name][b]), 1) for b in BATCHES},
                "ratio_to_builtin": {str(b): _ratio(speeds[name][b], speeds["builtin"][b]) for b in BATCHES},
                **await _slept(engine),
            }
            for name, (engine, cold_ms) in running.items()
        }


def _drivers(
    folder: Path, directory: Path, lifeline: Lifeline, threads: int, vllm: str
) -> list[tuple[str, EngineDriver, str]]:
    run_dir = folder / "run"
    found: list[tuple[str, EngineDriver, str]] = [
        ("builtin", BuiltinDriver(directory=run_dir, lifeline=lifeline, threads=threads), str(directory))
    ]
    if LLAMA_SERVER:
        file = gguf.from_llama(directory, folder / "model.gguf")
        driver = LlamaDriver(Program.find([LLAMA_SERVER]), directory=run_dir, lifeline=lifeline, threads=threads)
        found.append(("llamacpp", driver, str(file)))
    if vllm:
        program = Program.find([vllm, "-m", "vllm.entrypoints.openai.api_server"])
        found.append(
            ("vllm", VllmDriver(program, directory=run_dir, lifeline=lifeline, threads=threads), str(directory))
        )
    return found


@contextlib.asynccontextmanager
async def _started(name: str, driver: EngineDriver, model: str) -> AsyncIterator[tuple[Engine, float]]:
    """The engine, and how long it took from its start until it had answered. The first start of a driver is not it:
    that one also tries out what sleep is worth, or warms up the template.
    """
    deployment = Deployment(
        f"bench/{name}", "bench", FileInspector().inspect(model), Mode.DEDICATED, slots=SLOTS, engine=name,
        engine_args=(("enforce_eager", "true"),) if name == "vllm" else (),
    )  # fmt: skip
    order = StartOrder(f"bench/{name}-1", deployment, (Accelerator("cpu-0", "cpu", 16 << 30),), 12 << 30)
    first = await driver.start(order)
    await first.ready()
    await first.stop()
    began = time.perf_counter()
    engine = await driver.start(order)
    try:
        await engine.ready()
        await engine.canary()
        yield engine, (time.perf_counter() - began) * 1_000
    finally:
        await engine.stop()
        await driver.close()


async def _answers(engine: Engine, count: int, tokens: int) -> float:
    """Tokens a second of `count` whole answers asked for at once."""
    transport = httpx.AsyncHTTPTransport(uds=engine.address.removeprefix("unix:"))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=600) as http:

        async def ask(number: int) -> int:
            body = {"model": _name(engine), "prompt": f"{number} {PROMPT}", "max_tokens": tokens, "temperature": 0}
            response = await http.post("/v1/completions", json={**body, "ignore_eos": True})
            response.raise_for_status()
            return int(response.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        made = sum(await asyncio.gather(*(ask(number) for number in range(count))))
        return made / (time.perf_counter() - began)


def _name(engine: Engine) -> str:
    order = getattr(engine, "order", None)
    return order.deployment.endpoint if order is not None else "bench/builtin"


async def _slept(engine: Engine) -> dict[str, Any]:
    awake = await engine.memory()
    await engine.drain()
    sleep_ms, asleep = await _timed(engine.sleep)
    wake_ms, _ = await _timed(engine.wake)
    canary_ms, _ = await _timed(engine.canary)
    return {
        "awake_mb": awake.accelerator_bytes >> 20,
        "asleep_mb": asleep.accelerator_bytes >> 20,
        "asleep_host_mb": asleep.host_bytes >> 20,
        "sleep_ms": round(sleep_ms, 1),
        "wake_ms": round(wake_ms + canary_ms, 1),
    }


async def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = await call()
    return (time.perf_counter() - began) * 1_000, result


def _ratio(mine: list[float], builtin: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, builtin, strict=True)), 3)


def table(report: dict[str, Any]) -> str:
    lines = [
        "| engine | tokens/s at 1, 4, 16 | ratio to built-in | cold ms | sleep ms | wake ms | awake MiB | asleep |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, f in report["engines"].items():
        speeds = " / ".join(str(f["tokens_per_s"][str(b)]) for b in BATCHES)
        ratios = " / ".join(str(f["ratio_to_builtin"][str(b)]) for b in BATCHES)
        lines.append(
            f"| {name} | {speeds} | {ratios} | {f['cold_ms']} | {f['sleep_ms']} | {f['wake_ms']} "
            f"| {f['awake_mb']} | {f['asleep_mb']} |"
        )
    lines += [f"| {name} | not measured | | | | | | |" for name in report["not_measured"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--vllm", default=VLLM_PYTHON, help="the Python of an environment with vLLM")
    parser.add_argument("--write", action="store_true", help="also write bench/results/foreign.md")
    arguments = parser.parse_args()
    report = run(arguments.rounds, arguments.threads, arguments.vllm)
    print(json.dumps(report))
    print(table(report))
    if arguments.write:
        RESULTS.parent.mkdir(exist_ok=True)
        command = f"python -m bench.foreign --rounds {report['rounds']} --threads {report['threads']}"
        head = f"# Foreign engines beside the built-in one\n\n`{command}`; load average {report['load_average']:.1f}. "
        RESULTS.write_text(f"{head}What each column means: `bench/foreign.py`.\n\n{table(report)}\n")


if __name__ == "__main__":
    main()
