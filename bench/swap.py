"""How fast a replica comes back: wake from `host`, and cold start from `disk`, beside a fresh process and a plain copy.

Run: ``python -m bench.swap``. The model is Llama-shaped with about 1 GB of random bf16 weights, made on first use and
kept in the temporary folder. All figures are of one run on one machine; only their ratios mean anything elsewhere.

* fresh: a new Python process imports transformers, loads the model and generates one token (what one does without us).
* cold: the template forks an engine, which maps the weights and answers one token over HTTP (`disk` → first token).
* wake: a sleeping engine (`host`) is woken and answers one token; `awake` is the same request with nothing to wake.
* canary: what the node's supervisor adds between wake and READY (8 greedy tokens, so mostly reading the weights).
* copy: bytes of the weights ÷ memcpy bandwidth between two prefaulted buffers, measured here (what a copy would take).

The page cache is warm for all of them: the fresh process has just read the same file, and the first engine (not
measured) has read it from the disk, after what else the page cache had of it was dropped. How a file came into the page
cache decides how fast it is mapped: `torch_engine.memory.prefer_huge_pages`. `huge_pages_share` says how much of the
engine's weights the kernel maps in pages of 2 MiB.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import Engine, StartOrder
from tidegate.engines.builtin import BuiltinDriver, BuiltinEngine
from tidegate.engines.inspect import FileInspector
from tidegate.engines.process import Lifeline, memory_of

ROUNDS = 5
SWAPS_A_ROUND = 2
SHAPE = {"hidden": 2048, "layers": 11, "heads": 16, "kv_heads": 4, "intermediate": 5632, "context": 1024, "version": 2}
QUESTION = "Tide?"  # short, so that what is compared is getting ready, not the prefill of a long prompt
RESULTS = Path(__file__).parent / "results" / "swap.md"

_FRESH = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
with torch.inference_mode():
    out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(out[0][-1:]), flush=True)
"""


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """The figures, in ms and bytes, and the ratios the project promises with their targets."""
    model = make_model()
    weight_bytes = FileInspector().inspect(str(model)).weight_bytes
    threads = len(os.sched_getaffinity(0))
    fresh = [_fresh_ms(model, threads) for _ in range(rounds)]
    _drop_from_page_cache(model)
    copy_ms = weight_bytes / memcpy_bytes_per_s() * 1000
    measured = asyncio.run(_engine_figures(model, threads, rounds))
    figures = {
        "weight_bytes": weight_bytes,
        "threads": threads,
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "fresh_process_ms": _median(fresh),
        "copy_ms": round(copy_ms, 1),
        **measured,
    }
    wake, cold = figures["wake_first_token_ms"], figures["cold_first_token_ms"]
    figures["ratios"] = {
        "wake_to_fresh": round(wake / figures["fresh_process_ms"], 4),
        "wake_to_fresh_target": 0.02,
        "cold_to_fresh": round(cold / figures["fresh_process_ms"], 4),
        "cold_to_fresh_target": 0.25,
        "wake_to_copy": round(wake / copy_ms, 4),
        "wake_beyond_awake_ms": round(wake - figures["awake_first_token_ms"], 1),
        "wake_beyond_awake_ms_target": 50,
        "wake_beyond_awake_to_fresh": round((wake - figures["awake_first_token_ms"]) / figures["fresh_process_ms"], 4),
    }
    return figures


# --- the engine under measure -----------------------------------------------------------------------------------------


async def _engine_figures(model: Path, threads: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        lifeline = Lifeline()
        driver = BuiltinDriver(directory=Path(folder), lifeline=lifeline, threads=threads)
        try:
            await _warm_template(driver, model)
            cold = [await _cold_ms(driver, model) for _ in range(rounds)]
            async with _engine(driver, model) as engine:
                return {"cold_first_token_ms": _median(cold), **await _swap_figures(engine, model, rounds)}
        finally:
            await driver.close()
            lifeline.close()


async def _swap_figures(engine: BuiltinEngine, model: Path, rounds: int) -> dict[str, Any]:
    """Each round sleeps, wakes, asks, and asks again: the two requests meet the same machine, moments apart."""
    await first_token_ms(engine)
    huge = _huge_pages_share(engine, model)
    sleep_ms, wake_ms, first_ms, awake_ms, canary_ms, freed = [], [], [], [], [], []
    for _ in range(SWAPS_A_ROUND * rounds):
        await engine.drain()
        held = memory_of(engine.pid).resident
        sleep_ms.append(await _timed(engine.sleep()))
        freed.append(held - memory_of(engine.pid).resident)
        began = time.perf_counter()
        await engine.wake()
        wake_ms.append((time.perf_counter() - began) * 1000)
        await first_token_ms(engine)
        first_ms.append((time.perf_counter() - began) * 1000)
        awake_ms.append(await first_token_ms(engine))
        canary_ms.append(await _timed(engine.canary()))
    return {
        "awake_first_token_ms": _median(awake_ms),
        "wake_first_token_ms": _median(first_ms),
        "wake_call_ms": _median(wake_ms),
        "canary_call_ms": _median(canary_ms),
        "sleep_call_ms": _median(sleep_ms),
        "huge_pages_share": huge,
        "sleep_freed_rss_bytes": int(statistics.median(freed)),
    }


def _huge_pages_share(engine: BuiltinEngine, model: Path) -> float:
    rollup = Path(f"/proc/{engine.pid}/smaps_rollup").read_text()
    mapped = sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("FilePmdMapped:"))
    return round(mapped / sum(file.stat().st_size for file in model.glob("*.safetensors")), 2)


def _drop_from_page_cache(model: Path) -> None:
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _order(model: Path) -> StartOrder:
    profile = FileInspector().inspect(str(model))
    memory_bytes = profile.weight_bytes + profile.kv_bytes_per_token * SHAPE["context"] * 8 + (256 << 20)
    deployment = Deployment("bench/swap", "bench", profile, Mode.DEDICATED_SERVERLESS, slots=4)
    return StartOrder("bench/swap-1", deployment, (Accelerator("cpu-0", "cpu", memory_bytes),), memory_bytes)


@contextlib.asynccontextmanager
async def _engine(driver: BuiltinDriver, model: Path) -> AsyncIterator[BuiltinEngine]:
    engine = await driver.start(_order(model))
    try:
        await engine.ready()
        yield engine
    finally:
        await engine.stop()


async def _warm_template(driver: BuiltinDriver, model: Path) -> None:
    """The template runs since the platform did: its own imports are not part of a cold start."""
    async with _engine(driver, model):
        pass


async def _cold_ms(driver: BuiltinDriver, model: Path) -> float:
    began = time.perf_counter()
    async with _engine(driver, model) as engine:
        await first_token_ms(engine)
        return (time.perf_counter() - began) * 1000


async def first_token_ms(engine: Engine) -> float:
    """From sending the request to the first event of its stream."""
    transport = httpx.AsyncHTTPTransport(uds=engine.address.removeprefix("unix:"), verify=False)
    body = {
        "model": "swap",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=120) as client:
        began = time.perf_counter()
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return (time.perf_counter() - began) * 1000
    raise RuntimeError("the stream ended without an event")


async def _timed(call: Any) -> float:
    began = time.perf_counter()
    await call
    return (time.perf_counter() - began) * 1000


# --- baselines --------------------------------------------------------------------------------------------------------


def _fresh_ms(model: Path, threads: int) -> float:
    """Spawn → one generated token printed, as `transformers` alone does it. Network off: nothing is looked up."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _FRESH, str(model), QUESTION, str(threads)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout is not None
        answered = process.stdout.readline()
        took_ms = (time.perf_counter() - began) * 1000
    if process.returncode != 0 or not answered:
        raise RuntimeError(f"the fresh process failed with exit code {process.returncode}")
    return took_ms


def memcpy_bytes_per_s(size: int = 512 << 20) -> float:
    """Best of five copies between two prefaulted buffers: a slower one was disturbed, a faster one does not exist."""
    import numpy as np

    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    best_s = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        best_s = min(best_s, time.perf_counter() - began)
    return size / best_s


# --- the model ---------------------------------------------------------------------------------------------------


def make_model() -> Path:
    """About 1 GB of random bf16 weights, Llama-shaped, with a byte-level tokenizer; made once per temporary folder."""
    key = hashlib.sha256(json.dumps(SHAPE, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"tidegate-bench-swap-{key}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    making = Path(tempfile.mkdtemp(prefix="tidegate-bench-"))
    eos = save_tokenizer(making)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["intermediate"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        max_position_embeddings=SHAPE["context"],
        bos_token_id=None,
        eos_token_id=eos,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(making, max_shard_size="10GB")
    making.rename(folder)
    return folder


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with a chat template, written to `folder`; the id of its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*alphabet, "<|im_start|>", "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    fast.save_pretrained(folder)
    return vocab["<|im_end|>"]


# --- report ------------------------------------------------------------------------------------------------------


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 1)


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown page."""
    ratios = figures["ratios"]
    rows = [
        ("fresh process with transformers → first token", f"{figures['fresh_process_ms']} ms", "1", ""),
        ("cold start through the template → first token", f"{figures['cold_first_token_ms']} ms",
         str(ratios["cold_to_fresh"]), "≤ 0.25"),
        ("wake from host → first token", f"{figures['wake_first_token_ms']} ms",
         str(ratios["wake_to_fresh"]), "≤ 0.10, aim 0.02"),
        ("the same request, already awake", f"{figures['awake_first_token_ms']} ms", "", ""),
        ("wake beyond awake", f"{ratios['wake_beyond_awake_ms']} ms",
         str(ratios["wake_beyond_awake_to_fresh"]), "≤ 50 ms"),
        ("copying the weights once (memcpy)", f"{figures['copy_ms']} ms", "", ""),
        ("wake from host → first token ÷ that copy", str(ratios["wake_to_copy"]), "", ""),
        ("the canary the node asks for before traffic", f"{figures['canary_call_ms']} ms", "", ""),
        ("the wake call alone", f"{figures['wake_call_ms']} ms", "", ""),
        ("share of the weights mapped in pages of 2 MiB", str(figures["huge_pages_share"]), "", ""),
        ("the sleep call", f"{figures['sleep_call_ms']} ms", "", ""),
        ("resident memory given back by it", f"{figures['sleep_freed_rss_bytes'] / 2**20:.0f} MiB", "", ""),
    ]  # fmt: skip
    lines = [
        "| what | measured | ÷ fresh | target |",
        "|---|---|---|---|",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]
    head = (
        f"# bench swap\n\nLlama-shaped model, {figures['weight_bytes'] / 2**20:.0f} MiB of bf16 weights, "
        f"{figures['threads']} threads, medians of {figures['rounds']} rounds, page cache warm, "
        f"load average {figures['load_average']}. "
        "`python -m bench.swap` writes this page; what each line means is at the top of bench/swap.py.\n\n"
    )
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    results = run()
    print(json.dumps(results, indent=2))
    page = table(results)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(page)
    print(page)
