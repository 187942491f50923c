"""Accelerators with memory of their own, and how weights get there: group by group, each group told when it is there.

`CudaDevice` copies on a stream of its own, with an event a group. `ApartDevice` is memory of its own on the CPU, filled
by a thread of its own: what a GPU does (groups that arrive one by one, several devices at once, a copy that fails
half-way) as it runs on a machine without one. It is for tests and for measuring the mechanism, not for serving.
"""

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from tidegate.torch_engine import memory
from tidegate.torch_engine.faults import MemoryFault, ModelFault
from tidegate.torch_engine.host_copy import HostCopy

Piece = tuple[torch.Tensor, torch.Tensor]
"""(target on the device, source in host memory), uint8 of one size."""
Wait = Callable[[], None]
"""Called before the first kernel that reads a group; returns when, or orders that kernel after, the group is there."""

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of this process


class Device(Protocol):
    """Called on the worker's thread."""

    place: torch.device
    locks_host: bool

    def lock(self, copy: HostCopy) -> None:
        """Once a process: whatever makes copies from it asynchronous."""
        ...

    def reserve(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device. MemoryFault when it has not that much."""
        ...

    def fill(self, groups: Sequence[Sequence[Piece]]) -> list[Wait]:
        """Begins to copy, in this order, and returns at once. One `Wait` a group."""
        ...

    def settle(self) -> None:
        """Nothing is on its way any more when this returns; what had not been copied never is."""
        ...

    def held_bytes(self, buffer: torch.Tensor | None) -> int:
        """Measured: what this process holds there, of `buffer` at least."""
        ...


def devices_of(wanted: str) -> list[Device]:
    """``auto``, ``cpu``, ``cuda:0,cuda:1`` or ``apart[:N]``. Empty: the CPU, where weights run as they lie."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return []
    kind, _, count = wanted.partition(":")
    if kind == "apart" and (count or "1").isdigit():
        return [ApartDevice() for _ in range(int(count or "1"))]
    try:
        found = [torch.device(name) for name in wanted.split(",")]
    except RuntimeError as error:
        raise ModelFault(f"no such device: {wanted[:80]}") from error
    if any(device.type != "cuda" for device in found):
        raise ModelFault(f"no such device: {wanted[:80]}")
    return [CudaDevice(device.index or 0) for device in found]


class CudaDevice:
    """One GPU. Its copies run on its copy engine beside the kernels of the current stream."""

    locks_host = True

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]

    def lock(self, copy: HostCopy) -> None:
        """Not torch's own pinned allocator: it rounds up to a power of two, so 17 GB would hold 32 GB."""
        if copy.locked:
            return
        register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]
        error = int(register(copy.buffer.data_ptr(), copy.nbytes, _PORTABLE))
        if error:
            copy.become_private(f"its pages could not be locked where they are (CUDA error {error})")
            error = int(register(copy.buffer.data_ptr(), copy.nbytes, _PORTABLE))
        if error:
            raise MemoryFault(f"{copy.nbytes} bytes of host memory could not be pinned (CUDA error {error})")
        copy.locked = True

    def reserve(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.place)
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryFault(f"{nbytes} bytes could not be had on {self.place}") from error

    def fill(self, groups: Sequence[Sequence[Piece]]) -> list[Wait]:
        stream, waits = self._stream, list[Wait]()
        stream.wait_stream(torch.cuda.current_stream(self.place))  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            for group in groups:
                for target, source in group:
                    target.copy_(source, non_blocking=True)
                event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
                waits.append(lambda event=event: torch.cuda.current_stream(self.place).wait_event(event))  # type: ignore[misc]
        return waits

    def settle(self) -> None:
        torch.cuda.synchronize(self.place)

    def held_bytes(self, buffer: torch.Tensor | None) -> int:
        return int(torch.cuda.memory_reserved(self.place))


class ApartDevice:
    """Memory of its own on the CPU, and one thread that fills it."""

    locks_host = False

    def __init__(self) -> None:
        self.place = torch.device("cpu")
        self._filling: threading.Thread | None = None
        self._stopped = False

    def lock(self, copy: HostCopy) -> None:
        """Copies of a thread are asynchronous from any memory."""

    def reserve(self, nbytes: int) -> torch.Tensor:
        if nbytes > memory.available_bytes():
            raise MemoryFault(f"{nbytes} bytes could not be had")
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)  # unmapped with its last view

    def fill(self, groups: Sequence[Sequence[Piece]]) -> list[Wait]:
        arrivals = [_Arrival() for _ in groups]
        self._stopped = False
        self._filling = threading.Thread(target=self._fill, args=(groups, arrivals), name="copy", daemon=True)
        self._filling.start()
        return [arrival.wait for arrival in arrivals]

    def _fill(self, groups: Sequence[Sequence[Piece]], arrivals: list["_Arrival"]) -> None:
        error: Exception | None = None
        for group, arrival in zip(groups, arrivals, strict=True):
            try:
                for target, source in group:
                    if not self._stopped and error is None:
                        move(target, source)
            except Exception as raised:  # noqa: BLE001  handed to whoever waits for this group or a later one
                error = raised
            arrival.error = error
            arrival.there.set()

    def settle(self) -> None:
        self._stopped = True
        if self._filling is not None:
            self._filling.join()
            self._filling = None

    def held_bytes(self, buffer: torch.Tensor | None) -> int:
        return 0 if buffer is None else memory.resident_bytes(buffer.data_ptr(), buffer.numel())


def move(target: torch.Tensor, source: torch.Tensor) -> None:
    """One piece; the interpreter's lock is free meanwhile."""
    target.copy_(source)


class _Arrival:
    def __init__(self) -> None:
        self.there, self.error = threading.Event(), None

    there: threading.Event
    error: Exception | None

    def wait(self) -> None:
        self.there.wait()
        if self.error is not None:
            raise RuntimeError("weights did not arrive") from self.error
