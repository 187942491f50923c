"""GPU memory by process, from a stand-in for NVML: what it does not say is never taken for free."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.domain.errors import EngineFault
from tidegate.engines.gpu_memory import gpu_held_by

GIB = 1 << 30


class NVMLError(Exception):
    pass


def install(monkeypatch: pytest.MonkeyPatch, gpus: list[list[tuple[int, int | None]]] | None) -> None:
    """`gpus`: the (pid, bytes) running on each; None: the driver refuses to tell."""

    def running(index: int) -> list[Any]:
        if gpus is None:
            raise NVMLError
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in gpus[index]]

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1 if gpus is None else len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=running,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_the_most_on_any_one_gpu_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [[(10, 3 * GIB), (11, GIB), (99, 50 * GIB)], [(11, 5 * GIB)]])
    assert gpu_held_by((10, 11)) == 5 * GIB
    assert gpu_held_by((10,)) == 3 * GIB
    assert gpu_held_by((os.getpid(),)) == 0


def test_what_is_not_told_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [[(10, None)]])
    with pytest.raises(EngineFault, match="by process"):
        gpu_held_by((10,))
    assert gpu_held_by((11,)) == 0
    install(monkeypatch, None)
    with pytest.raises(EngineFault, match="does not tell"):
        gpu_held_by((10,))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EngineFault, match="not available"):
        gpu_held_by((10,))
