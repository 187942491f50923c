"""Tiers of one model in this process: `accelerator` (ready) and `host` (asleep, accelerator memory given back).

CPU: the accelerator's memory is this process's resident pages of the weight mapping, plus the KV cache. Asleep, both
are gone from the process; the file's contents stay in the kernel's page cache, which is the host tier, uncopied.
CUDA: one pinned host copy of the files is made at load; asleep, the device copy and the KV cache are freed.
"""

import mmap
from typing import Any, Protocol

import torch

from tidegate.torch_engine import memory
from tidegate.torch_engine.faults import MemoryFault
from tidegate.torch_engine.kv import KvStore
from tidegate.torch_engine.weights import Weights

ALIGNED_BYTES = 256  # what a tensor of its own would have on the device; vectorised kernels need 16


class Residency(Protocol):
    """Called on the worker's thread, between steps."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def accelerator_bytes(self) -> int:
        """Measured, not computed."""
        ...


class CpuResidency:
    """The mapping stays, its pages go: waking is page-table work, never a copy."""

    def __init__(self, weights: Weights, store: KvStore | None) -> None:
        self._weights = weights
        self._store = store

    def sleep(self) -> None:
        if self._store is not None and self._store.allocated:
            self._store.free()
        for file in self._weights.files:
            file.drop_pages()
        memory.give_back()

    def wake(self) -> None:
        if self._store is not None and not self._store.allocated:
            self._store.allocate()
        for file in self._weights.files:
            file.prefault(torch.get_num_threads())

    def accelerator_bytes(self) -> int:
        # The cache has room for every context at once: a sparse range, too long to be looked at page by page.
        cache = memory.mapped_bytes(self._store.addresses) if self._store is not None else 0
        return cache + sum(memory.resident_bytes(file.address, file.buffer.numel()) for file in self._weights.files)


def pinned(size: int) -> torch.Tensor:
    """uint8 [size], page-locked, zeros; kept for the life of the process. MemoryFault when it cannot be had.

    Not torch's own pinned allocator: that rounds up to a power of two, so that a model of 17 GB would hold 32 GB.
    """
    area = mmap.mmap(-1, size)
    area.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock: pinning costs by the page
    buffer = torch.frombuffer(area, dtype=torch.uint8)
    error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))  # type: ignore[no-untyped-call]
    if error:
        raise MemoryFault(f"{size} bytes of host memory could not be pinned (CUDA error {error})")
    return buffer


class CudaResidency:
    """Parameters are views of one device buffer a file, so a wake is one asynchronous copy a file."""

    def __init__(self, weights: Weights, model: Any, store: KvStore | None, device: torch.device) -> None:
        self._store = store
        self._device = device
        # A file's tensors begin wherever its header ends; on the device they must begin where kernels want them.
        shifts = [-min(spec.start for spec in file.specs) % ALIGNED_BYTES for file in weights.files]
        self._host = [pinned(shift + file.buffer.numel()) for shift, file in zip(shifts, weights.files, strict=True)]
        for host, shift, file in zip(self._host, shifts, weights.files, strict=True):
            host[shift:].copy_(file.buffer)
        self._places: list[tuple[torch.nn.Parameter, int, int]] = []  # (parameter, file, byte offset in its copy)
        for parameter in model.parameters():
            for index, file in enumerate(weights.files):
                offset = parameter.data_ptr() - file.address
                if 0 <= offset < file.buffer.numel():
                    self._places.append((parameter, index, shifts[index] + offset))
        for module in model.modules():  # computed, not stored: small, and they stay on the device
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        for file in weights.files:
            file.drop_pages()
        self.wake()

    def sleep(self) -> None:
        for parameter, index, offset in self._places:
            parameter.data = self._view(self._host[index], parameter, offset)
        if self._store is not None and self._store.allocated:
            self._store.free()
        torch.cuda.synchronize(self._device)
        memory.give_back()
        torch.cuda.empty_cache()

    def wake(self) -> None:
        for index, host in enumerate(self._host):
            device = host.to(self._device, non_blocking=True)
            for parameter, _, offset in (place for place in self._places if place[1] == index):
                parameter.data = self._view(device, parameter, offset)
        if self._store is not None and not self._store.allocated:
            self._store.allocate()
        torch.cuda.synchronize(self._device)

    def accelerator_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    @staticmethod
    def _view(buffer: torch.Tensor, parameter: torch.nn.Parameter, offset: int) -> torch.Tensor:
        size = parameter.numel() * parameter.element_size()
        return buffer[offset : offset + size].view(parameter.dtype).view(parameter.shape)
