"""The master copy of a model's weights in host memory: one a model and node, whatever the number of its replicas.

Accelerators with memory of their own are filled from it at each wake; nothing is ever copied back. It lies in a memfd
that all engines of the model have from their template (`shared`). The first to come fills it, under a lock that the
kernel takes back however its holder ends, and marks it as whole last: a copy left half-way is filled anew by the next.
"""

import fcntl
import logging
import mmap
import os
from pathlib import Path

import torch

from tidegate.torch_engine import memory, shared
from tidegate.torch_engine.faults import MemoryFault
from tidegate.torch_engine.weights import Weights

FILE_ALIGNED_BYTES = 2 << 20  # each file begins on a huge page
_MARK = b"tidegate"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # whoever has mapped it relies on its size
log = logging.getLogger("tidegate.engine")


class HostCopy:
    """`files[i]` is uint8 [bytes of file i], in this process's mapping of the copy."""

    def __init__(self, folder: Path, weights: Weights, fd: int | None, *, writable: bool) -> None:
        """`fd`: the node's memfd for this model, None: one of this engine's own. `writable`: CUDA is to lock its pages,
        which it does for writing; otherwise what this process wrote would be its own. MemoryFault: no room.
        """
        self.locked = False  # by CUDA, for as long as this process lives
        sizes = [file.buffer.numel() for file in weights.files]
        starts, self.nbytes = [], 0
        for size in sizes:
            starts.append(self.nbytes)
            self.nbytes += -(-size // FILE_ALIGNED_BYTES) * FILE_ALIGNED_BYTES
        whole = _MARK + shared.identity(folder)
        file = _opened(fd, whole)
        try:
            self.filled_here = _mark_of(file) != whole
            if self.filled_here:
                self._fill(file, weights, starts, whole)
            self._places = list(zip(starts, sizes, strict=True))
            self._take(mmap.mmap(file, self.nbytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY))
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # the mapping keeps the file open, and would keep the lock
            os.close(file)

    def become_private(self, why: str) -> None:
        """Into memory of this process alone. Before anybody took views."""
        log.warning("the host copy of the weights is not shared: %s", why)
        shared_copy = self.buffer
        self._take(mmap.mmap(-1, self.nbytes))
        self.buffer.copy_(shared_copy)

    def _take(self, area: mmap.mmap) -> None:
        memory.prefer_huge_pages(area)  # fewer pages to lock and to map
        self.buffer = torch.frombuffer(area, dtype=torch.uint8)
        self.files = [self.buffer[start : start + size] for start, size in self._places]

    def _fill(self, file: int, weights: Weights, starts: list[int], mark: bytes) -> None:
        if self.nbytes > memory.available_bytes():
            raise MemoryFault(f"the host copy of the weights has {self.nbytes} bytes, host memory has less to give")
        os.ftruncate(file, self.nbytes + mmap.PAGESIZE)
        with mmap.mmap(file, self.nbytes) as area:
            memory.prefer_huge_pages(area)
            target = torch.frombuffer(area, dtype=torch.uint8)
            for start, source in zip(starts, weights.files, strict=True):
                target[start : start + source.buffer.numel()].copy_(source.buffer)
            del target  # else the mapping could not be closed
        os.pwrite(file, mark, self.nbytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)


def _opened(fd: int | None, mark: bytes) -> int:
    """The locked copy, opened anew (a lock belongs to one opening). One of our own where the node's is of other files:
    they changed on the disk between two starts.
    """
    if fd is not None:
        file = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _mark_of(file).startswith(_MARK) or _mark_of(file) == mark:
            return file
        os.close(file)
        log.warning("the weights on the disk are not those this node shares: this engine keeps a copy of its own")
    return shared.make()


def _mark_of(file: int) -> bytes:
    """What its last page begins with; anything but a mark while it is not whole."""
    size = os.fstat(file).st_size
    return os.pread(file, len(_MARK) + 32, size - mmap.PAGESIZE) if size else b""
