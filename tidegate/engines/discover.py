"""What this machine can compute on: NVIDIA GPUs through NVML where they are, otherwise CPU accelerators."""

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tidegate.domain.errors import Refusal
from tidegate.domain.fleet import Accelerator

if TYPE_CHECKING:
    from collections.abc import Iterator

# Left to the driver, the CUDA context of each engine and fragmentation; what replicas reserve must really be there.
GPU_RESERVED_BYTES = 1 << 30


def discover(kind: str, *, cpu_count: int, cpu_memory_bytes: int) -> tuple[Accelerator, ...]:
    """`kind` is ``auto`` (GPUs if there are any, else CPU), ``nvidia`` or ``cpu``.

    `cpu_count` accelerators of `cpu_memory_bytes` each are slices of host memory that engines are kept within.
    Raises Refusal("invalid_configuration") when ``nvidia`` is asked for and there is none.
    """
    gpus = nvidia() if kind in ("auto", "nvidia") else ()
    if kind == "nvidia" and not gpus:
        raise Refusal(
            "invalid_configuration",
            "accelerators.kind is nvidia, but no NVIDIA GPU was found (driver missing, or nvidia-ml-py not installed)",
            param="accelerators.kind",
        )
    return gpus or tuple(Accelerator(f"cpu-{n}", "cpu", cpu_memory_bytes) for n in range(cpu_count))


def nvidia() -> tuple[Accelerator, ...]:
    """Every GPU NVML shows, ``gpu-0…`` in its order; none when the library or the driver is absent."""
    with nvml_library() as nvml:
        if nvml is None:
            return ()
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            kind = name.decode() if isinstance(name, bytes) else str(name)
            found.append(Accelerator(f"gpu-{index}", kind, max(0, total - GPU_RESERVED_BYTES)))
        return tuple(found)


@contextmanager
def nvml_library() -> "Iterator[Any]":
    """The initialised NVML module, or None where it cannot be used (https://docs.nvidia.com/deploy/nvml-api/)."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):  # a driver going away while we leave: nothing was left open
            pynvml.nvmlShutdown()
