"""Tokens a second of the built-in engine over HTTP, beside plain `model.generate`, and what joining a full batch costs.

Run: ``python -m bench.engine [--shapes 30M,300M] [--rounds N] [--threads N]``. Random bf16 Llama-shaped models.

Each round measures the baseline and the engine one after the other, at 1, 4 and 16 sequences; a ratio is of one round,
and what is shown is the median over rounds, so that a busy machine disturbs both sides alike.

* generate: `model.generate`, greedy, one static batch, in a process of its own.
* engine: streams over the Unix socket that start at different moments (each when the one before has some tokens).
  Counted is the window in which all of them run: from the last one's first token to the first one's end.
* per CPU second: the same tokens over the CPU time of the process that made them (all its threads, HTTP included).
* foreign: llama-server and vLLM beside it, where they are found (`bench/foreign.py`).
* join: TTFT of a request that joins 15 running streams, beside its TTFT alone, and the longest pause of a running one.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from bench import foreign

SHAPES: dict[str, dict[str, Any]] = {
    "30M": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 1408, "vocab": 8000},
    "300M": {"hidden": 1024, "layers": 24, "heads": 16, "kv_heads": 8, "intermediate": 2816, "vocab": 16000},
}
TOKENS = {"30M": 96, "300M": 32}  # of one answer
STAGGER_TOKENS = {"30M": 2, "300M": 1}
BATCHES = (1, 4, 16)
PROMPT_TOKENS = 16
TARGETS = {1: 0.9, 16: 0.8}
RESULTS = Path(__file__).parent / "results" / "engine.md"
READY_S_MAX = 120.0

_GENERATE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
print("ready", flush=True)
for line in sys.stdin:
    batch, length, tokens = json.loads(line)
    ids = torch.randint(5, 500, (batch, length), generator=torch.Generator().manual_seed(batch))
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""


def run(shapes: tuple[str, ...] = ("30M", "300M"), rounds: int = 3, threads: int = 0) -> dict[str, Any]:
    """Figures by shape: tokens a second, ratios to `generate` with their targets, TTFT of joining."""
    threads = threads or len(os.sched_getaffinity(0))
    report: dict[str, Any] = {"threads": threads, "rounds": rounds, "load_average": os.getloadavg()[0], "shapes": {}}
    for shape in shapes:
        report["shapes"][shape] = asyncio.run(_measure(shape, rounds, threads))
    report["foreign"] = foreign.run(rounds, threads)
    return report


async def _measure(shape: str, rounds: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return await _measure_model(_model(shape, Path(folder)), shape, rounds, threads)


def _model(shape: str, folder: Path) -> Path:
    """Random weights, and a tokenizer in which every token is a word: so there is text to stream at every step."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from tests import models

    source = models.llama(**SHAPES[shape], context=1024, dtype="bfloat16")
    words = WordLevel({f"word{i}": i for i in range(SHAPES[shape]["vocab"])}, unk_token="word0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(source / name)
    return folder


async def _measure_model(model: Path, shape: str, rounds: int, threads: int) -> dict[str, Any]:
    seen: dict[int, list[dict[str, float]]] = {batch: [] for batch in BATCHES}
    joins = []
    with _baseline(model, threads) as baseline:
        async with _engine(model, threads) as engine:
            baseline.generate(2, 8)  # warms both sides up
            await engine.streams(2, 8, 1)
            for _ in range(rounds):
                for batch in BATCHES:
                    figures = baseline.generate(batch, TOKENS[shape])
                    figures |= await engine.streams(batch, TOKENS[shape], STAGGER_TOKENS[shape])
                    seen[batch].append(figures)
                joins.append(await engine.join(TOKENS[shape], STAGGER_TOKENS[shape]))
    out: dict[str, Any] = {"batches": {str(batch): _summary(batch, seen[batch]) for batch in BATCHES}}
    out["join"] = {name: round(statistics.median(j[name] for j in joins), 1) for name in joins[0]}
    return out


def _summary(batch: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(r[name] for r in rounds)

    ratios = [r["engine_tps"] / r["generate_tps"] for r in rounds]
    return {
        "generate_tps": round(median("generate_tps"), 1),
        "engine_tps": round(median("engine_tps"), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ratio_per_cpu_second": round(
            statistics.median(r["engine_per_cpu_s"] / r["generate_per_cpu_s"] for r in rounds), 3
        ),
        "target": TARGETS.get(batch),
    }


# ---- the baseline ---------------------------------------------------------------------------------------------------


class _Baseline:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def generate(self, batch: int, tokens: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([batch, PROMPT_TOKENS, tokens]) + "\n")
        self._process.stdin.flush()
        wall, cpu = json.loads(self._process.stdout.readline())
        return {"generate_tps": batch * tokens / wall, "generate_per_cpu_s": batch * tokens / cpu}


@contextlib.contextmanager
def _baseline(model: Path, threads: int) -> Iterator[_Baseline]:
    process = subprocess.Popen(
        [sys.executable, "-c", _GENERATE, str(model), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # as the engine does: else a busy machine punishes one side
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield _Baseline(process)
    finally:
        process.terminate()
        process.wait()


# ---- the engine -----------------------------------------------------------------------------------------------------


class _Stream:
    """One streamed completion; `times[i]` is when token i+1 had arrived."""

    def __init__(self, path: str, tokens: int, seed: int) -> None:
        self._path, self._seed = path, seed
        self._tokens = tokens
        self.begun = 0.0
        self.times: list[float] = []
        self.event = asyncio.Event()
        self.event_at = 0

    async def run(self) -> None:
        prompt = [5 + (self._seed * 31 + i * 7) % 490 for i in range(PROMPT_TOKENS)]
        body = json.dumps(
            {"model": "m", "prompt": prompt, "max_tokens": self._tokens, "temperature": 0, "ignore_eos": True}
            | {"stream": True}
        ).encode()
        reader, writer = await asyncio.open_unix_connection(self._path)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.begun = time.perf_counter()
        writer.write(head + body)
        while len(self.times) < self._tokens:
            line = await reader.readline()
            assert line, "the engine closed the stream"
            if line.startswith(b"id: "):
                count = int(line[4:])
                self.times += [time.perf_counter()] * (count - len(self.times))
                if len(self.times) >= self.event_at:
                    self.event.set()
        writer.close()

    async def until(self, tokens: int) -> None:
        self.event_at = tokens
        if len(self.times) < tokens:
            self.event.clear()
            await self.event.wait()


class _Engine:
    def __init__(self, path: str, pid: int) -> None:
        self._path, self._pid = path, pid

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def _start(self, count: int, tokens: int, stagger: int) -> tuple[list[_Stream], list["asyncio.Task[None]"]]:
        streams: list[_Stream] = []
        tasks = []
        for i in range(count):
            if streams:
                await streams[-1].until(stagger)
            streams.append(_Stream(self._path, tokens, i))
            tasks.append(asyncio.create_task(streams[-1].run()))
        await streams[-1].until(1)
        return streams, tasks

    async def streams(self, count: int, tokens: int, stagger: int) -> dict[str, float]:
        streams, tasks = await self._start(count, tokens, stagger)
        cpu, begun = self._cpu_s(), time.perf_counter()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        wall, used = time.perf_counter() - begun, self._cpu_s() - cpu
        made = sum(begun < at <= begun + wall for stream in streams for at in stream.times)
        await asyncio.gather(*tasks)
        return {"engine_tps": made / wall, "engine_per_cpu_s": made / max(used, 0.01)}

    async def join(self, tokens: int, stagger: int) -> dict[str, float]:
        alone = _Stream(self._path, 1, 99)
        await alone.run()
        streams, tasks = await self._start(15, tokens, stagger)
        joining = _Stream(self._path, 1, 98)
        await joining.run()
        begun, ended = joining.begun, joining.times[0]
        pauses, usual = [], []
        await asyncio.gather(*tasks)
        for stream in streams:
            gaps = [(b - a, a, b) for a, b in zip(stream.times, stream.times[1:], strict=False)]
            pauses += [gap for gap, a, b in gaps if b > begun and a < ended]
            usual += [gap for gap, a, _ in gaps if a >= ended]
        return {
            "ttft_alone_ms": (alone.times[0] - alone.begun) * 1000,
            "ttft_joining_ms": (ended - begun) * 1000,
            "running_pause_max_ms": max(pauses) * 1000,
            "running_gap_median_ms": statistics.median(usual) * 1000,
        }


@contextlib.asynccontextmanager
async def _engine(model: Path, threads: int) -> AsyncIterator[_Engine]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/engine.sock"
        argv = [sys.executable, "-m", "tidegate.torch_engine", "--model", str(model), "--socket", path]
        process = await asyncio.create_subprocess_exec(*argv, "--threads", str(threads), stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + READY_S_MAX
            while not await _ready(path):
                assert process.returncode is None, "the engine did not start"
                assert time.monotonic() < deadline, "the engine did not become ready"
                await asyncio.sleep(0.1)
            yield _Engine(path, process.pid)
        finally:
            process.terminate()
            await process.wait()


async def _ready(path: str) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.write(b"GET /control/state HTTP/1.1\r\nhost: e\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return b'"state":"ready"' in answer


# ---- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    lines = [
        "| model | streams | generate tok/s | engine tok/s | ratio (min–max) | target | ratio per CPU second |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for shape, figures in report["shapes"].items():
        for batch, f in figures["batches"].items():
            spread = f"**{f['ratio']}** ({f['ratio_min']}–{f['ratio_max']})"
            target = f"≥ {f['target']}" if f["target"] else ""
            lines.append(
                f"| {shape} | {batch} | {f['generate_tps']} | {f['engine_tps']} | {spread} | {target} "
                f"| {f['ratio_per_cpu_second']} |"
            )
    lines += [
        "",
        "| model | TTFT alone | TTFT joining 15 | longest pause of a running stream meanwhile | its usual gap |",
        "|---|--:|--:|--:|--:|",
    ]
    for shape, figures in report["shapes"].items():
        j = figures["join"]
        lines.append(
            f"| {shape} | {j['ttft_alone_ms']} ms | {j['ttft_joining_ms']} ms | {j['running_pause_max_ms']} ms "
            f"| {j['running_gap_median_ms']} ms |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="30M,300M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="also write bench/results/engine.md")
    arguments = parser.parse_args()
    report = run(tuple(arguments.shapes.split(",")), arguments.rounds, arguments.threads)
    print(json.dumps(report))
    print(table(report))
    if arguments.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            "# Built-in engine beside `model.generate`\n\n"
            f"`python -m bench.engine --threads {report['threads']} --rounds {report['rounds']}`; "
            f"load average at start {report['load_average']:.1f}. What each column means: `bench/engine.py`.\n\n"
            f"{table(report)}\n"
        )


if __name__ == "__main__":
    main()
