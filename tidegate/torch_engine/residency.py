"""Tiers of one model in this process: `accelerator` (ready) and `host` (asleep, accelerator memory given back).

CPU: the accelerator's memory is this process's resident pages of the weight mapping, plus the KV cache. Asleep, both
are gone from the process; the file's contents stay in the kernel's page cache, which is the host tier: uncopied, and
one for all replicas of the model on the node.
Devices with memory of their own: the host tier is the node's master copy (`host_copy`); asleep, the device copy and the
KV cache are freed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from tidegate.torch_engine import memory
from tidegate.torch_engine.devices import Device, Piece, Wait
from tidegate.torch_engine.host_copy import HostCopy
from tidegate.torch_engine.kv import KvPart, KvStore
from tidegate.torch_engine.stages import Stage, before_each, divide, stages_of
from tidegate.torch_engine.weights import Weights

ALIGNED_BYTES = 256  # what a tensor of its own would have on the device; vectorised kernels need 16


class Residency(Protocol):
    """Called on the worker's thread, between steps. `store` joins once it is known how much room the weights leave."""

    store: KvStore | None

    @property
    def device(self) -> torch.device:
        """Where a forward begins."""
        ...

    def kv_parts(self, layers: int) -> list[KvPart]:
        """Where the KV cache of which layers shall be: a part a device."""
        ...

    def weight_bytes(self, side: int) -> int:
        """Of the weights, on one of the devices."""
        ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def accelerator_bytes(self) -> int:
        """Measured, not computed."""
        ...


class CpuResidency:
    """The mapping stays, its pages go: waking is page-table work, never a copy."""

    device = torch.device("cpu")

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.store: KvStore | None = None

    def kv_parts(self, layers: int) -> list[KvPart]:
        return [KvPart(self.device, range(layers))]

    def weight_bytes(self, side: int) -> int:
        return self._weights.tensor_bytes

    def sleep(self) -> None:
        if self.store is not None and self.store.allocated:
            self.store.free()
        for file in self._weights.files:
            file.drop_pages()
        memory.give_back()

    def wake(self) -> None:
        if self.store is not None and not self.store.allocated:
            self.store.allocate()
        for file in self._weights.files:
            file.prefault(torch.get_num_threads())

    def accelerator_bytes(self) -> int:
        # The cache has room for every context at once: a sparse range, too long to be looked at page by page.
        cache = memory.mapped_bytes(self.store.addresses) if self.store is not None else 0
        return cache + sum(memory.resident_bytes(file.address, file.buffer.numel()) for file in self._weights.files)


class CopiedResidency:
    """Weights on devices with memory of their own, filled from the host copy at each wake, stage by stage.

    A wake reserves the memory, orders all copies, and returns: the first forward waits before each stage for that
    stage's weights only, so computing begins while most of them are still on their way. Devices fill side by side.
    """

    def __init__(self, weights: Weights, model: Any, copy: HostCopy, devices: Sequence[Device]) -> None:
        self.stages = stages_of(model)
        divide(self.stages, len(devices))
        self.store: KvStore | None = None
        self._copy, self._devices = copy, list(devices)
        for device in devices:
            device.lock(copy)
        self._sources = {p: source for p, source in _sources(model, weights, copy)}
        self._buffers: list[torch.Tensor | None] = [None] * len(devices)
        self._waits: dict[Stage, Wait] = {}
        before_each(self.stages, self._wait, [device.place for device in devices])
        _move_computed(model, self.stages, devices)
        for file in weights.files:
            file.drop_pages()
        self.wake()

    def weight_bytes(self, side: int) -> int:
        """On one device, as they are laid out there."""
        return sum(_aligned(p) for stage in self.stages if stage.side == side for p in stage.parameters)

    @property
    def device(self) -> torch.device:
        return self._devices[0].place

    def kv_parts(self, layers: int) -> list[KvPart]:
        """Each layer's with the layer."""
        return [
            KvPart(device.place, [stage.layer for stage in self.stages if stage.side == side and stage.layer >= 0])
            for side, device in enumerate(self._devices)
        ]

    def sleep(self) -> None:
        for device in self._devices:
            device.settle()
        self._waits.clear()
        for parameter, source in self._sources.items():
            parameter.data = source
        self._buffers = [None] * len(self._devices)
        if self.store is not None and self.store.allocated:
            self.store.free()
        memory.give_back()
        torch.cuda.empty_cache()  # does nothing where CUDA was never begun

    def wake(self) -> None:
        self._buffers = [device.reserve(self.weight_bytes(side)) for side, device in enumerate(self._devices)]
        for side, (device, buffer) in enumerate(zip(self._devices, self._buffers, strict=True)):
            assert buffer is not None
            mine, at = [stage for stage in self.stages if stage.side == side], 0
            groups: list[list[Piece]] = []
            for stage in mine:
                groups.append([])
                for parameter in stage.parameters:
                    source = self._sources[parameter]
                    room = buffer[at : at + source.numel() * source.element_size()]
                    groups[-1].append((room, source.reshape(-1).view(torch.uint8)))
                    parameter.data = room.view(source.dtype).view(source.shape)
                    at += _aligned(source)
            self._waits |= dict(zip(mine, device.fill(groups), strict=True))
        if self.store is not None and not self.store.allocated:
            self.store.allocate()

    def accelerator_bytes(self) -> int:
        cache = memory.mapped_bytes(self.store.addresses) if self.store is not None else 0
        held = zip(self._devices, self._buffers, strict=True)
        return cache + max(device.held_bytes(buffer) for device, buffer in held)

    def _wait(self, stage: Stage) -> None:
        if self._waits and (wait := self._waits.pop(stage, None)) is not None:
            wait()


def _sources(model: Any, weights: Weights, copy: HostCopy) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter, now a view of a mapped file, and the same view of the host copy."""
    for parameter in model.parameters():
        for file, copied in zip(weights.files, copy.files, strict=True):
            offset = parameter.data_ptr() - file.address
            if 0 <= offset < file.buffer.numel():
                size = parameter.numel() * parameter.element_size()
                yield parameter, copied[offset : offset + size].view(parameter.dtype).view(parameter.shape)


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNED_BYTES) * ALIGNED_BYTES


def _move_computed(model: Any, stages: Sequence[Stage], devices: Sequence[Device]) -> None:
    """Buffers are computed, not stored: small, and they stay on their stage's device; else on the first."""
    sides = {module: stage.side for stage in stages if stage.layer >= 0 for module in stage.module.modules()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(devices[sides.get(module, 0)].place)
