"""Filling a node's disk cache from a Hub: GB/s against what the link, the disk and the hash of this machine give.

    python -m bench.fill [--gib 2] [--rounds 3]

A Hub on loopback (a process of its own that sends files with ``sendfile``) has a model of two safetensors files. In
every round each of these moves the same bytes once:

* link: the Hub client alone, as many connections, to nowhere
* disk: random bytes written by as many threads with O_DIRECT, allocated before, synced after
* hash: SHA-256 from memory, by as many threads as the fill may hash with
* one after another: what a plain program does: downloaded through the page cache, synced, then hashed
* tidegate: the disk cache of a node, from an empty one to a published model

The aim is the smallest of the three limits. Here all of them share the processors of one machine, the Hub's own
included, so it cannot be met on few cores: a real node does not serve the files it fetches.
"""

import argparse
import hashlib
import http.server
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tidegate.engines.inspect import FileInspector
from tidegate.engines.weights.access import Access, open_remote
from tidegate.engines.weights.cache import DiskCache
from tidegate.engines.weights.download import DownloadLimits
from tidegate.engines.weights.source import RemoteModel, wanted
from tidegate.engines.weights.sums import threads_for

RESULTS = Path(__file__).parent / "results" / "fill.md"
PIECE = 8 << 20
CONNECTIONS = DownloadLimits().connections
NAMES = ("model-0.safetensors", "model-1.safetensors")


def run(gib: float = 2.0, rounds: int = 3) -> dict[str, Any]:
    """GB/s (10^9 bytes), medians of `rounds`, and the fill's ratio to the smallest limit."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-fill-") as scratch:
        folder = make_model(Path(scratch) / "model", gib)
        size = sum(path.stat().st_size for path in folder.iterdir())
        with serving(folder) as url:
            source = open_remote("hf://bench/model@main", Access(hub_url=url, hub_token="none"))
            moves: dict[str, Callable[[], None]] = {
                "link": lambda: _link(source),
                "disk": lambda: _disk(Path(scratch) / "disk", size),
                "hash": lambda: _hash(size, threads_for(len(NAMES))),
                "one after another": lambda: _plain(source, Path(scratch) / "plain"),
                "tidegate": lambda: _fill(url, folder, Path(scratch) / "cache", 4 * size),
            }
            taken: dict[str, list[float]] = {name: [] for name in moves}
            processor: list[float] = []
            for _ in range(rounds):
                for name, move in moves.items():
                    began, used = time.perf_counter(), time.process_time()
                    move()
                    taken[name].append(time.perf_counter() - began)
                    processor += [time.process_time() - used] if name == "tidegate" else []
                    os.sync()
    rates = {name: size / statistics.median(seconds) / 1e9 for name, seconds in taken.items()}
    limit = min(rates[name] for name in ("link", "disk", "hash"))
    return {
        "bytes": size,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "gb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "of_limit": round(rates["tidegate"] / limit, 2),
        "of_one_after_another": round(rates["tidegate"] / rates["one after another"], 2),
        "cpu_s_per_gb": round(statistics.median(processor) / size * 1e9, 2),
    }


# --- what moves bytes -------------------------------------------------------------------------------------------------


def _pieces(source: RemoteModel) -> list[tuple[str, int, int]]:
    return [(f.name, at, min(at + PIECE, f.size)) for f in wanted(source) for at in range(0, f.size, PIECE)]


def _link(source: RemoteModel) -> None:
    own = threading.local()

    def read(piece: tuple[str, int, int]) -> None:
        name, start, end = piece
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(mmap.mmap(-1, PIECE))
        source.read_into(name, start, own.buffer[: end - start])

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(read, _pieces(source)):
            pass


def _disk(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(descriptor, 0, size)
    noise = mmap.mmap(-1, PIECE)
    noise.write(os.urandom(PIECE))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(lambda at: os.pwrite(descriptor, noise, at), range(0, size - PIECE, PIECE)):
            pass
    os.fdatasync(descriptor)
    os.close(descriptor)
    path.unlink()


def _hash(size: int, threads: int) -> None:
    piece = os.urandom(1 << 20)

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(0, size // threads, len(piece)):
            digest.update(piece)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


def _plain(source: RemoteModel, folder: Path) -> None:
    folder.mkdir()
    files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in {f.name for f in wanted(source)}}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(lambda p: os.pwrite(files[p[0]], source.read(*p), p[1]), _pieces(source)):
            pass
    for name, descriptor in files.items():
        os.fdatasync(descriptor)
        os.close(descriptor)
        with (folder / name).open("rb", buffering=0) as opened:
            hashlib.file_digest(opened, "sha256")
    shutil.rmtree(folder)


def _fill(url: str, folder: Path, root: Path, budget: int) -> None:
    access = Access(hub_url=url, hub_token="none")
    cache = DiskCache(root, budget, lambda source: open_remote(source, access))
    found = FileInspector().inspect(str(folder))
    held = cache.hold(replace(found, source="hf://bench/model@main"), lambda _: None, threading.Event())
    held.release()
    shutil.rmtree(root)


# --- the Hub ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a Hub that has `folder`, in a process of its own."""
    command = [sys.executable, "-m", "bench.fill", "--serve", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def serve(folder: Path) -> None:
    """The two routes of the Hub's API that a download uses: the listing and ranges of files."""
    listing = json.dumps(
        {"id": "bench/model", "modelId": "bench/model", "sha": "0" * 40, "siblings": [*map(_sibling, folder.iterdir())]}
    ).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith("/api/"):
                self._head(200, len(listing))
                self.wfile.write(listing)
                return
            with (folder / path.rpartition("/")[2]).open("rb") as file:
                start, end = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
                self._head(206, end + 1 - start)
                self.connection.sendfile(file, start, end + 1 - start)

        def _head(self, status: int, length: int) -> None:
            self.send_response(status)
            self.send_header("content-length", str(length))
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


def _sibling(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    lfs = {"sha256": digest, "size": size, "pointerSize": 130}
    return {"rfilename": path.name, "size": size, "blobId": "0" * 40, "lfs": lfs}


def make_model(folder: Path, gib: float) -> Path:
    """Two safetensors files of noise that the inspector takes for a model of bf16 weights."""
    folder.mkdir()
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "vocab_size": 32000,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.json").write_text("{}")
    size, weight_map = int(gib * 2**30) // len(NAMES) // 2 * 2, {}
    noise = os.urandom(64 << 20)
    for number, name in enumerate(NAMES):
        tensor = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
        header = json.dumps({f"t{number}": tensor}).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for at in range(0, size, len(noise)):
                file.write(noise[: size - at])
        weight_map[f"t{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.sync()
    return folder


# --- report -----------------------------------------------------------------------------------------------------------


def page(figures: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {rate} |" for name, rate in figures["gb_per_s"].items())
    return (
        f"# bench fill\n\n{figures['bytes'] / 2**20:.0f} MiB in two files over loopback, {figures['cores']} cores "
        f"shared with the Hub, medians of {figures['rounds']} rounds, load average {figures['load_average']}. "
        f"`python -m bench.fill` writes this page; what the rows are is at the top of bench/fill.py.\n\n"
        f"| | GB/s |\n|---|---|\n{rows}\n\ntidegate ÷ the smallest limit: {figures['of_limit']}; ÷ one after another: "
        f"{figures['of_one_after_another']}; {figures['cpu_s_per_gb']} CPU seconds a GB.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    figures = run(options.gib, options.rounds)
    print(json.dumps(figures, indent=2))
    if not options.dry:
        RESULTS.write_text(page(figures))
    print(page(figures))
    return None


if __name__ == "__main__":
    main()
