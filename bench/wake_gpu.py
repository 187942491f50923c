"""Wake of a large model on an NVIDIA GPU: seconds from the wake to the first token, against the link.

    python -m bench.wake_gpu [--sizes 16 60] [--rounds 5]

Needs a CUDA device that holds the model, a CUDA build of torch, the model's bytes on disk (in TMPDIR), and once more in
host memory beside what the page cache takes; a size for which one of these is short is left out, with the reason.
Nothing is fetched: the models are made on the spot, random bf16 weights in the shape of a Llama of 8 or 30 billion
parameters. Each is started in the built-in engine as the platform does, asked once, put to sleep, woken, asked again.
A wake returns before the weights are there, and the first forward follows them layer by layer: what counts is the
first token.

Limit: bytes ÷ the bandwidth of one long copy from pinned host memory to the device, measured in the same run, + 0.15 s.
Aim: first token within 1.10 × bytes ÷ bandwidth + 0.15 s.

Without a CUDA device nothing is measured and the page says so. The script drives the engine through the same driver as
`bench.swap`, which runs everywhere.
"""

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.swap import first_token_ms, save_tokenizer
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import StartOrder
from tidegate.engines.builtin import BuiltinDriver, BuiltinLimits
from tidegate.engines.inspect import FileInspector
from tidegate.engines.process import Lifeline

RESULTS = Path(__file__).parent / "results" / "wake_gpu.md"
FIXED_S, AIM = 0.15, 1.10
COPY_BYTES, COPIES = 4 << 30, 5
HEADROOM_BYTES = 2 << 30
VOCAB, CONTEXT = 32_000, 4_096
DRAWN = 100_000_007  # a prime: no two rows of a matrix begin alike
LIMITS = BuiltinLimits(ready_ms_max=1_800_000, wake_ms_max=120_000, sleep_ms_max=120_000)


@dataclass(frozen=True)
class Shape:
    """A Llama's; `gb` names it."""

    gb: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


SHAPES = {16: Shape(16, 4096, 36, 32, 8, 14336), 60: Shape(60, 6656, 56, 52, 52, 17920)}


def run(sizes: tuple[int, ...] = (16, 60), rounds: int = 5) -> dict[str, Any]:
    """The figures of each size, or why there are none."""
    import torch

    machine: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tidegate": importlib.metadata.version("tidegate"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {memory_bytes() >> 30} GiB of memory",
        "load_average": round(os.getloadavg()[0], 1),
    }
    if not torch.cuda.is_available():
        return {**machine, "device": None, "not_measured": "no CUDA device on this machine", "sizes": {}}
    device = torch.cuda.get_device_properties(0)
    bytes_per_s = pinned_bytes_per_s()
    measured: dict[str, Any] = {}
    for size in sizes:
        if short := shortage(SHAPES[size], device.total_memory):
            measured[str(size)] = {"not_measured": short}
            continue
        with tempfile.TemporaryDirectory(prefix="tidegate-bench-gpu-") as folder:
            make_model(Path(folder), SHAPES[size])
            measured[str(size)] = asyncio.run(measure(Path(folder), device.total_memory, bytes_per_s, rounds))
    name = f"{device.name}, {device.total_memory >> 30} GiB, CUDA {torch.version.cuda}"
    return {**machine, "device": name, "pinned_gb_per_s": round(bytes_per_s / 1e9, 2), "sizes": measured}


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def shortage(shape: Shape, device_bytes: int) -> str:
    """What this machine has too little of for a model of this shape; empty where it has enough."""
    size = sum(2 * math.prod(dims) for dims in tensors(shape).values())
    for what, there, needed in (
        ("GPU memory", device_bytes, size + HEADROOM_BYTES),
        ("host memory", memory_bytes(), size + HEADROOM_BYTES),
        (f"disk in {tempfile.gettempdir()}", shutil.disk_usage(tempfile.gettempdir()).free, size),
    ):
        if there < needed:
            return f"{what}: {there} bytes, {needed} are needed"
    return ""


def pinned_bytes_per_s() -> float:
    """Best of several copies: a slower one was disturbed, a faster one does not exist."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    best_s = float("inf")
    for _ in range(COPIES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - began)
    del host, there
    torch.cuda.empty_cache()
    return COPY_BYTES / best_s


async def measure(
    model: Path, device_bytes: int, bytes_per_s: float, rounds: int, kind: str = "nvidia"
) -> dict[str, Any]:
    profile = FileInspector().inspect(str(model))
    deployment = Deployment("bench/wake", "bench", profile, Mode.DEDICATED_SERVERLESS, slots=1)
    needed = profile.weight_bytes + profile.kv_bytes_per_token * CONTEXT + HEADROOM_BYTES
    accelerator = Accelerator("gpu-0", kind, device_bytes)
    order = StartOrder("bench/wake-1", deployment, (accelerator,), min(device_bytes, needed))
    wakes, firsts, awakes = [], [], []
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        lifeline = Lifeline()
        driver = BuiltinDriver(
            directory=Path(folder), lifeline=lifeline, threads=len(os.sched_getaffinity(0)), limits=LIMITS
        )
        try:
            began = time.perf_counter()
            engine = await driver.start(order)  # ends with its lifeline, whatever happens
            await engine.ready()
            await first_token_ms(engine)
            cold_s = time.perf_counter() - began
            for _ in range(rounds):
                await engine.drain()
                await engine.sleep()
                began = time.perf_counter()
                await engine.wake()
                wakes.append(time.perf_counter() - began)
                await first_token_ms(engine)
                firsts.append(time.perf_counter() - began)
                awakes.append(await first_token_ms(engine) / 1000)
            await engine.stop()
        finally:
            await driver.close()
            lifeline.close()
    limit_s = profile.weight_bytes / bytes_per_s
    first_s = statistics.median(firsts)
    return {
        "weight_bytes": profile.weight_bytes,
        "cold_first_token_s": round(cold_s, 2),
        "wake_call_s": round(statistics.median(wakes), 3),
        "wake_first_token_s": round(first_s, 3),
        "awake_first_token_s": round(statistics.median(awakes), 3),
        "bytes_by_bandwidth_s": round(limit_s, 3),
        "beyond_fixed_to_limit": round((first_s - FIXED_S) / limit_s, 3),
        "aim": AIM,
    }


def make_model(folder: Path, shape: Shape) -> None:
    """A directory the engine loads. Written tensor by tensor: the whole is never in memory."""
    save_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_random(folder / "model.safetensors", tensors(shape))


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers' Llama has them."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, shape.hidden)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}self_attn.q_proj.weight": (shape.hidden, shape.hidden),
            f"{at}self_attn.k_proj.weight": (kv, shape.hidden),
            f"{at}self_attn.v_proj.weight": (kv, shape.hidden),
            f"{at}self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            f"{at}mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            f"{at}mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            f"{at}mlp.down_proj.weight": (shape.hidden, shape.intermediate),
            f"{at}input_layernorm.weight": (shape.hidden,),
            f"{at}post_attention_layernorm.weight": (shape.hidden,),
        }
    return found | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (VOCAB, shape.hidden)}


def write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """bf16 normal numbers of standard deviation 0.02 in the safetensors format: one draw, over and over, since drawing
    30 billion takes longer than all else here.
    """
    import torch

    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    drawn = (torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    block = drawn.view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while at > 0:
            at -= file.write(block[: min(at, len(block))])


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown page."""
    lines = [
        "| weights | link alone, s | wake → first token, s | (that − 0.15 s) ÷ link | aim | awake, s | cold, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in ("16", "60"):
        got = figures["sizes"].get(size, {})
        if "weight_bytes" not in got:
            lines.append(
                f"| {size} GB | not measured | not measured | not measured | ≤ {AIM} | not measured | not measured |"
            )
            continue
        keys = ("bytes_by_bandwidth_s", "wake_first_token_s", "beyond_fixed_to_limit", "aim", "awake_first_token_s")
        cells = [f"{got['weight_bytes'] / 1e9:.1f} GB", *(str(got[key]) for key in (*keys, "cold_first_token_s"))]
        lines.append(f"| {' | '.join(cells)} |")
    short = [f"{size} GB: {got['not_measured']}." for size, got in figures["sizes"].items() if "not_measured" in got]
    where = figures.get("not_measured") or f"{figures['device']}, pinned copy {figures['pinned_gb_per_s']} GB/s"
    return (
        f"# bench wake_gpu\n\n{where[0].upper()}{where[1:]}; {figures['date']}, {figures['machine']}, tidegate "
        f"{figures['tidegate']}, torch {figures['torch']}, Python {figures['python']}, "
        f"load average {figures['load_average']}. `python -m bench.wake_gpu` on a machine with an "
        "NVIDIA GPU writes this page; what is measured is at the top of bench/wake_gpu.py.\n\n"
        + "\n".join([*lines, *(["", *short] if short else []), ""])
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 60], choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures = run(tuple(options.sizes), options.rounds)
    print(json.dumps(figures, indent=2))
    page = table(figures)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
