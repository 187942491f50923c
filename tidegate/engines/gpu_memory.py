"""Accelerator memory some processes hold, by the GPU driver's own count (NVML), not by what an engine says."""

from collections.abc import Iterable

from tidegate.domain.errors import EngineFault
from tidegate.engines.discover import nvml_library


def gpu_held_by(pids: Iterable[int]) -> int:
    """The most bytes these processes hold on any one GPU. EngineFault where the driver cannot say: not measured is not
    free (https://docs.nvidia.com/deploy/nvml-api/, nvmlDeviceGetComputeRunningProcesses).
    """
    wanted, most = set(pids), 0
    with nvml_library() as nvml:
        if nvml is None:
            raise EngineFault("GPU memory cannot be measured: NVML is not available")
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                running = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
            except nvml.NVMLError as error:
                raise EngineFault("GPU memory cannot be measured: the driver does not tell") from error
            mine = [process.usedGpuMemory for process in running if process.pid in wanted]
            if None in mine:
                raise EngineFault("GPU memory cannot be measured: the driver does not tell it by process")
            most = max(most, sum(mine))
    return most
