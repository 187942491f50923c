"""One master copy of a model's weights a node: filled once, shared by its engines, gone with the last of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests import models
from tests.torch_engine.test_process import WAIT_S_MAX, Template, alive, until
from tests.torch_engine.test_process import template as template
from tidegate.torch_engine import devices, host_copy, shared
from tidegate.torch_engine.faults import MemoryFault
from tidegate.torch_engine.host_copy import HostCopy
from tidegate.torch_engine.weights import Weights


@pytest.fixture
def fd() -> Iterator[int]:
    made = shared.make()
    yield made
    os.close(made)


def copy_of(folder: Path, fd: int | None, *, writable: bool = False) -> HostCopy:
    return HostCopy(folder, Weights(folder), fd, writable=writable)


def test_the_second_engine_finds_what_the_first_filled(fd: int) -> None:
    folder = models.llama()
    first, second = copy_of(folder, fd), copy_of(folder, fd)
    assert (first.filled_here, second.filled_here) == (True, False)
    for copy in (first, second):
        for file, copied in zip(Weights(folder).files, copy.files, strict=True):
            assert torch.equal(file.buffer, copied)
    second.files[0][0] += 1  # a stray write of one engine is its own
    assert torch.equal(first.files[0], Weights(folder).files[0].buffer)
    with pytest.raises(PermissionError):  # sealed: nobody's mapping can lose its end
        os.ftruncate(fd, 0)


def test_what_was_left_half_way_is_filled_anew(fd: int) -> None:
    folder = models.llama()
    os.ftruncate(fd, 123_456)
    os.pwrite(fd, b"half", 0)
    copy = copy_of(folder, fd)
    assert copy.filled_here
    assert torch.equal(copy.files[0], Weights(folder).files[0].buffer)
    assert not copy_of(folder, fd).filled_here


def test_other_files_than_those_shared_get_a_copy_of_their_own(
    fd: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = models.copy(models.llama(), tmp_path)
    first = copy_of(folder, fd)
    (folder / "model.safetensors").touch()
    second = copy_of(folder, fd)
    assert second.filled_here
    assert "a copy of its own" in caplog.text
    assert torch.equal(first.files[0], second.files[0])


def test_a_host_without_room_says_so(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy.memory, "available_bytes", lambda: 1_000)
    with pytest.raises(MemoryFault, match="host memory"):
        copy_of(models.llama(), fd)


class _Runtime:
    """`torch.cuda.cudart()` as far as locking pages goes: the first `refusals` calls fail, as in a driver that cannot
    lock shared memory (cudaErrorInvalidValue).
    """

    def __init__(self, refusals: int) -> None:
        self.refusals, self.asked = refusals, list[tuple[int, int, int]]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked.append((address, nbytes, flags))
        return 1 if len(self.asked) <= self.refusals else 0


@pytest.mark.parametrize("refusals", [0, 1, 2])
def test_pages_are_locked_where_they_are_or_in_a_private_copy(
    fd: int, refusals: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = _Runtime(refusals)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    folder = models.llama()
    copy = copy_of(folder, fd, writable=True)
    first = copy.buffer.data_ptr()
    device = devices.CudaDevice.__new__(devices.CudaDevice)  # without a stream, which needs a driver
    if refusals == 2:
        with pytest.raises(MemoryFault, match="CUDA error 1"):
            device.lock(copy)
        return
    device.lock(copy)
    device.lock(copy)  # a second device of the same engine: locked already
    assert len(runtime.asked) == 1 + refusals
    assert all(nbytes == copy.nbytes and flags == 1 for _, nbytes, flags in runtime.asked)
    assert (copy.buffer.data_ptr() == first) is (refusals == 0)
    assert ("is not shared" in caplog.text) is (refusals == 1)
    assert torch.equal(copy.files[0], Weights(folder).files[0].buffer)


# --- real processes ---------------------------------------------------------------------------------------------------


def client(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://engine", timeout=60)


def ready(path: Path) -> dict[str, Any]:
    until(path.exists)
    with client(path) as http:
        state: dict[str, Any] = http.get("/control/ready").json()
    assert state["state"] == "ready", state
    return state


def mapped_copy(pid: int, name: str = f"memfd:{shared.NAME}") -> tuple[int, int]:
    """(Rss, Pss) in bytes of what the process maps of files with `name` in their path: host copies."""
    rss = pss = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name in line
        elif inside and line.startswith(("Rss:", "Pss:")):
            kib = int(line.split()[1])
            rss, pss = rss + kib * 1024 * line.startswith("Rss"), pss + kib * 1024 * line.startswith("Pss")
    return rss, pss


def open_copies(pid: int) -> int:
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(shared.NAME in link for link in links)


@pytest.mark.e2e
def test_two_replicas_of_one_model_hold_one_copy_and_the_last_takes_it_along(
    template: Template, tmp_path: Path
) -> None:
    folder = models.llama(hidden=512, layers=4, intermediate=1408, vocab=4096)
    weights = Weights(folder).tensor_bytes
    paths = [tmp_path / f"{n}.sock" for n in range(3)]
    pids = [template.fork(folder, path, device="apart", slots=2) for path in paths[:2]]
    other = template.fork(models.llama(), paths[2], device="apart", slots=2)
    for path in paths:
        ready(path)
    for path in paths[:2]:
        with client(path) as http:
            assert http.post("/control/drain").status_code == 200
            assert http.post("/control/sleep").json()["accelerator_bytes"] == 0
    seen = [mapped_copy(pid) for pid in pids]
    assert all(rss >= weights for rss, _ in seen), "each maps the whole copy"
    assert weights <= sum(pss for _, pss in seen) < 1.2 * weights + (4 << 20), "and there is one of it"
    assert open_copies(template.process.pid) == 2
    with client(paths[0]) as http:
        http.post("/control/wake")
        canary = http.post("/control/canary").json()["tokens"]
    os.kill(pids[0], signal.SIGKILL)  # whoever filled it may go: the copy stays with the other
    until(lambda: not alive(pids[0]))
    with client(paths[1]) as http:
        http.post("/control/wake")
        assert http.post("/control/canary").json()["tokens"] == canary
    for pid in (pids[1], other):
        os.kill(pid, signal.SIGTERM)
    until(lambda: open_copies(template.process.pid) == 0)


@pytest.mark.e2e
def test_two_replicas_on_a_cpu_share_the_pages_of_the_files(template: Template, tmp_path: Path) -> None:
    folder = models.copy(models.llama(hidden=512, layers=4, intermediate=1408, vocab=4096), tmp_path)
    weights = (folder / "model.safetensors").stat().st_size
    paths = [tmp_path / f"{n}.sock" for n in range(2)]
    pids = [template.fork(folder, path, device="cpu", slots=2) for path in paths]
    for path in paths:
        ready(path)
    seen = [mapped_copy(pid, str(folder)) for pid in pids]
    assert all(rss >= weights for rss, _ in seen), "each has all of it mapped"
    assert sum(pss for _, pss in seen) < 1.1 * weights, "and it is there once"
    assert all(mapped_copy(pid) == (0, 0) for pid in pids), "nothing is copied on a CPU"
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


_FILLER = """
import sys, time
from pathlib import Path
from tidegate.torch_engine import host_copy
from tidegate.torch_engine.weights import Weights

def stop_half_way(self, file, weights, starts, mark):
    host_copy.os.ftruncate(file, self.nbytes + host_copy.mmap.PAGESIZE)
    host_copy.os.pwrite(file, b"half", 0)
    print("half", flush=True)
    time.sleep(600)

host_copy.HostCopy._fill = stop_half_way
folder = Path(sys.argv[1])
host_copy.HostCopy(folder, Weights(folder), int(sys.argv[2]), writable=False)
"""


@pytest.mark.e2e
def test_an_engine_killed_while_it_fills_leaves_the_filling_to_the_next(fd: int) -> None:
    folder = models.llama()
    with subprocess.Popen(
        [sys.executable, "-c", _FILLER, str(folder), str(fd)], pass_fds=[fd], stdout=subprocess.PIPE, text=True
    ) as filler:
        assert filler.stdout is not None
        assert filler.stdout.readline() == "half\n"
        began = time.monotonic()
        _later(0.2, filler.kill)  # until then the next one waits for its lock
        copy = copy_of(folder, fd)
    assert time.monotonic() - began < WAIT_S_MAX
    assert copy.filled_here
    assert torch.equal(copy.files[0], Weights(folder).files[0].buffer)


def _later(seconds: float, act: Callable[[], None]) -> None:
    import threading

    threading.Timer(seconds, act).start()


def test_the_template_keeps_a_copy_while_somebody_uses_it(tmp_path: Path) -> None:
    copies, folders = shared.SharedCopies(), [models.copy(models.llama(), tmp_path / str(n)) for n in range(2)]
    first = copies.of(folders[0])
    copies.forked(101, first)
    copies.forked(102, copies.of(folders[0]))
    other = copies.of(folders[1])
    copies.let_go()  # its fork failed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(other)
    copies.ended(101)
    assert os.fstat(first)
    config = folders[0] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    assert copies.of(folders[0]) == first, "only weights count"
    (folders[0] / "model.safetensors").touch()
    changed = copies.of(folders[0])
    assert changed != first
    copies.forked(103, changed)
    copies.ended(102)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    copies.ended(103)
