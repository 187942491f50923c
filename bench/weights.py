"""Loading one model's weights: GB/s of each loader against what the disk and the memory of this machine give.

    python -m bench.weights [--gib 2] [--rounds 3]

A model of random bf16 weights is made once (two safetensors files). In every round each reader gets it twice: cold (its
pages dropped from the page cache with ``posix_fadvise(DONTNEED)``) and warm. A reader is done when every byte of every
tensor can be read without another fault: what maps files has mapped each page, what copies has copied.

Limits, in the same rounds: disk = the best of `dd` with O_DIRECT and of several threads reading with and without it
(one `dd` does not fill a fast drive, and readahead may ask for more at once than a program does); memory = one copy
between two buffers that are there already.

Loaders: ours (`tidegate.torch_engine.weights`: the files mapped, their pages faulted in ahead by several threads),
plain `safetensors` (mapped, then touched), `safetensors` copied (what a loader that must own its tensors does), and,
where installed (``pip install runai-model-streamer fastsafetensors instanttensor``), the streaming libraries.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import mmap
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "weights.md"
THREADS = len(os.sched_getaffinity(0))
DIRECT_BYTES = 4 << 20
AIM = 0.9


def run(gib: float = 2.0, rounds: int = 3) -> dict[str, Any]:
    """GB/s (10^9 bytes), medians of `rounds`, and each loader's ratio to the limit of its case."""
    folder = make_model(gib)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    readers: dict[str, Callable[[list[Path]], object]] = {
        "disk: dd O_DIRECT": _dd,
        "disk: threads O_DIRECT": _direct,
        "disk: threads buffered": _buffered,
        "memory: one copy": _Memcpy(size),
        **loaders(),
    }
    taken: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            for case in ("cold", "warm"):
                _prepare(files, case)
                began = time.perf_counter()
                kept = read(files)
                taken[name][case].append(time.perf_counter() - began)
                del kept
    rates = {
        name: {case: size / statistics.median(s) / 1e9 for case, s in cases.items()} for name, cases in taken.items()
    }
    limits = {
        "cold": max(cases["cold"] for name, cases in rates.items() if name.startswith("disk")),
        "warm": rates["memory: one copy"]["warm"],
    }
    return {
        "bytes": size,
        "rounds": rounds,
        "threads": THREADS,
        "load_average": round(os.getloadavg()[0], 1),
        "device": "cpu",
        "gb_per_s": {name: {case: round(rate, 2) for case, rate in cases.items()} for name, cases in rates.items()},
        "of_limit": {
            name: {case: round(cases[case] / limits[case], 2) for case in cases}
            for name, cases in rates.items()
            if ":" not in name
        },
        "aim_of_limit": AIM,
        "not_measured": absent(),
    }


# --- loaders ----------------------------------------------------------------------------------------------------------


def loaders() -> dict[str, Callable[[list[Path]], object]]:
    found: dict[str, Callable[[list[Path]], object]] = {
        "tidegate": _ours,
        "safetensors, mapped": _safetensors,
        "safetensors, copied": _safetensors_cloned,
    }
    if importlib.util.find_spec("runai_model_streamer"):
        found["runai-model-streamer"] = _runai
    if importlib.util.find_spec("fastsafetensors"):
        found["fastsafetensors"] = _fast
    return found


def absent() -> dict[str, str]:
    """Loaders without a figure, and why."""
    names = {"runai_model_streamer": "runai-model-streamer", "fastsafetensors": "fastsafetensors"}
    missing = {shown: "not installed" for module, shown in names.items() if importlib.util.find_spec(module) is None}
    return missing | {"instanttensor": "loads to CUDA devices only; bench/wake_gpu.py's machine is the place for it"}


def _ours(files: list[Path]) -> object:
    from tidegate.torch_engine.weights import Weights

    weights = Weights(files[0].parent)
    weights.read_ahead().join()
    return weights.tensors()


def _safetensors(files: list[Path]) -> object:
    from safetensors.torch import load_file

    tensors = [load_file(file) for file in files]
    for each in tensors:
        for tensor in each.values():
            _touch(tensor)
    return tensors


def _safetensors_cloned(files: list[Path]) -> object:
    from safetensors.torch import load_file

    return [{name: tensor.clone() for name, tensor in load_file(file).items()} for file in files]


def _runai(files: list[Path]) -> object:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}  # its buffer is used again


def _fast(files: list[Path]) -> object:
    from fastsafetensors import fastsafe_open

    with fastsafe_open([str(file) for file in files], nogds=True, device="cpu") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping


def _touch(tensor: Any) -> int:
    """One byte of each page: afterwards no access faults."""
    import torch

    return int(tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum())


# --- limits -----------------------------------------------------------------------------------------------------------


def _dd(files: list[Path]) -> None:
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=16M", "iflag=direct", "status=none"]
        subprocess.run(command, check=True)


def _direct(files: list[Path]) -> None:
    """Past the page cache."""
    _threads(files, os.O_RDONLY | os.O_DIRECT)


def _buffered(files: list[Path]) -> None:
    _threads(files, os.O_RDONLY)


def _threads(files: list[Path], flags: int) -> None:
    """Pieces of all files, read by several threads into one buffer each."""
    pieces = [(f, at) for f in files for at in range(0, f.stat().st_size, DIRECT_BYTES)]
    taking = threading.Lock()

    def read() -> None:
        buffer = mmap.mmap(-1, DIRECT_BYTES)
        descriptors = {file: os.open(file, flags) for file in files}
        while True:
            with taking:
                if not pieces:
                    break
                file, at = pieces.pop()
            os.preadv(descriptors[file], [buffer], at)
        for descriptor in descriptors.values():
            os.close(descriptor)

    threads = [threading.Thread(target=read) for _ in range(4 * THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Memcpy:
    """One copy of as many bytes, between two buffers whose pages are there. By as many threads as loaders may use."""

    def __init__(self, size: int) -> None:
        import torch

        self._source, self._target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def __call__(self, files: list[Path]) -> None:
        self._target.copy_(self._source)


def _prepare(files: list[Path], case: str) -> None:
    _trim()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if case == "warm":
                while os.read(descriptor, 16 << 20):
                    pass
        finally:
            os.close(descriptor)


def _trim() -> None:
    """What the last loader freed goes back to the kernel, so that no loader profits from another's warm pages."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


# --- the model --------------------------------------------------------------------------------------------------------


def make_model(gib: float) -> Path:
    """Two safetensors files of random bf16, in tensors of 32 MiB as a model of 8 billion parameters has them."""
    folder = Path(tempfile.gettempdir()) / f"tidegate-bench-weights-{int(gib * 1024)}"
    if folder.is_dir():
        return folder
    import torch
    from safetensors.torch import save_file

    making = Path(tempfile.mkdtemp(prefix="tidegate-bench-"))
    half = max(1, int(gib * 1024) // 64)
    weight_map = {}
    for shard in range(2):
        tensors = {f"layers.{shard}.{i}.weight": torch.randn(4096, 4096).bfloat16() for i in range(half)}
        save_file(tensors, making / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    (making / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.sync()
    making.rename(folder)
    return folder


# --- report -----------------------------------------------------------------------------------------------------------


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown page."""
    lines = ["| | cold, GB/s | of the disk | warm, GB/s | of one copy |", "|---|---|---|---|---|"]
    for name, rates in figures["gb_per_s"].items():
        of = figures["of_limit"].get(name, {"cold": "", "warm": ""})
        lines.append(f"| {name} | {rates['cold']} | {of['cold']} | {rates['warm']} | {of['warm']} |")
    lines += [f"| {name} | not measured: {why} | | | |" for name, why in figures["not_measured"].items()]
    return (
        f"# bench weights\n\n{figures['bytes'] / 2**20:.0f} MiB of bf16 weights in two files, {figures['threads']} "
        f"threads, medians of {figures['rounds']} rounds, load average {figures['load_average']}, on "
        f"{figures['device']}. `python -m bench.weights` writes this page; what is measured is at the top of "
        f"bench/weights.py, what follows from it in docs/weights.md. Aim: ≥ {AIM} of the limit.\n\n"
        + "\n".join([*lines, ""])
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    figures = run(options.gib, options.rounds)
    print(json.dumps(figures, indent=2))
    page = table(figures)
    if not options.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
