"""Discovery of accelerators, with a stand-in for NVML: this must work on machines with and without a GPU."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tidegate.domain.errors import Refusal
from tidegate.domain.fleet import Accelerator
from tidegate.engines.discover import GPU_RESERVED_BYTES, discover


class NvmlError(Exception):
    pass


def install_nvml(monkeypatch: pytest.MonkeyPatch, gpus: int, *, broken: bool = False) -> list[str]:
    """A `pynvml` with `gpus` GPUs of 80 GB; `broken` as without a driver. Returns the log of what was called."""
    calls: list[str] = []

    def init() -> None:
        calls.append("init")
        if broken:
            raise NvmlError

    nvml = ModuleType("pynvml")
    nvml.__dict__.update(
        NVMLError=NvmlError,
        nvmlInit=init,
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetCount=lambda: gpus,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 << 30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return calls


def test_without_a_driver_cpu_accelerators_of_the_configured_size(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, 0, broken=True)
    found = discover("auto", cpu_count=2, cpu_memory_bytes=100)
    assert found == (Accelerator("cpu-0", "cpu", 100), Accelerator("cpu-1", "cpu", 100))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert [a.id for a in discover("auto", cpu_count=1, cpu_memory_bytes=1)] == ["cpu-0"]
    with pytest.raises(Refusal, match="no NVIDIA GPU was found"):
        discover("nvidia", cpu_count=1, cpu_memory_bytes=1)


def test_gpus_come_first_and_keep_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_nvml(monkeypatch, 2)
    found = discover("auto", cpu_count=4, cpu_memory_bytes=1)
    assert [a.id for a in found] == ["gpu-0", "gpu-1"]
    assert found[0] == Accelerator("gpu-0", "NVIDIA H100", (80 << 30) - GPU_RESERVED_BYTES)
    assert calls == ["init", "shutdown"]


def test_cpu_asked_for_is_cpu_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_nvml(monkeypatch, 8)
    assert [a.kind for a in discover("cpu", cpu_count=1, cpu_memory_bytes=1)] == ["cpu"]
    assert calls == []
