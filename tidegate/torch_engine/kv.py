"""The KV cache: one row a sequence, and the book that keeps it under its bytes.

On a CPU the cache is one lazily backed mapping: every row has room for a whole context, but only tokens that were
written hold pages, and a released row gives its pages back. So the operating system does what paged attention does,
and attention reads plain strided views. On CUDA the rows are backed from the start, so there are fewer of them.
"""

import heapq
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tidegate.torch_engine.faults import MemoryFault

PAGE_BYTES = mmap.PAGESIZE
CONTEXT_TOKENS_MIN = 128
CONTEXT_STEP = 16
_NORESERVE = 0x4000  # MAP_NORESERVE, named in mmap only from Python 3.13 on
_NOHUGEPAGE = 15  # MADV_NOHUGEPAGE: a huge page would back 2 MiB for one token, and the book would be wrong


@dataclass(frozen=True, slots=True)
class KvShape:
    """Of one model: every layer keeps K and V of [kv_heads, head_dim] a token."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def row_bytes(self, tokens: int) -> int:
        """Bytes backed once `tokens` are written: K and V of each layer end on a page of their own."""
        one = self.kv_heads * self.head_dim * self.dtype.itemsize * tokens
        return 2 * self.layers * -(-one // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class KvPlan:
    """What fits: `rows` sequences of at most `context_tokens_max`, never more than `bytes_max` at once."""

    rows: int
    context_tokens_max: int
    bytes_max: int


def plan(shape: KvShape, *, bytes_max: int, slots: int, context_tokens_max: int, backed: bool) -> KvPlan:
    """The longest context that fits, at most `context_tokens_max`, and as many rows as that leaves, at most `slots`.

    `backed` (CUDA): rows hold their whole context from the start. MemoryFault says how much is missing.
    """
    context = context_tokens_max
    if shape.row_bytes(context) > bytes_max:
        context = bytes_max // shape.token_bytes // CONTEXT_STEP * CONTEXT_STEP
        while context > 0 and shape.row_bytes(context) > bytes_max:
            context -= CONTEXT_STEP
    least = min(CONTEXT_TOKENS_MIN, context_tokens_max)
    if context < least:
        need, left = shape.row_bytes(least), max(bytes_max, 0)
        raise MemoryFault(
            f"the model does not fit: {least} tokens of KV cache need {need} bytes, {left} are left beside the weights"
        )
    need = shape.row_bytes(context)
    rows = max(1, min(slots, bytes_max // need)) if backed else slots
    return KvPlan(rows, context, min(bytes_max, rows * need))


@dataclass(slots=True)
class KvPart:
    """K and V of `layers` (a run of them) on one device.

    `data` is [rows, layers, 2 (K, V), context, kv_heads, head_dim]: a row is one contiguous range.
    """

    device: torch.device
    layers: Sequence[int]
    data: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    map: mmap.mmap | None = None

    def allocate(self, shape: KvShape, plan: KvPlan) -> None:
        dims = (plan.rows, len(self.layers), 2, plan.context_tokens_max, shape.kv_heads, shape.head_dim)
        if self.device.type == "cpu":
            size = math.prod(dims) * shape.dtype.itemsize
            self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
            self.map.madvise(_NOHUGEPAGE)
            self.data = torch.frombuffer(self.map, dtype=shape.dtype).view(dims)
            return
        try:
            self.data = torch.zeros(dims, dtype=shape.dtype, device=self.device)  # masked garbage may not be NaN
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryFault(f"a KV cache of {math.prod(dims)} numbers could not be had on {self.device}") from error

    def free(self) -> None:
        self.data = torch.empty(0)
        self.map = None  # unmapped with its last view

    def forget_row(self, row: int) -> None:
        if self.map is None:
            return
        # Inner pages only: the first and last may be shared with a neighbour row.
        size = len(self.map) // self.data.shape[0]
        start = -(-row * size // PAGE_BYTES) * PAGE_BYTES
        end = (row + 1) * size // PAGE_BYTES * PAGE_BYTES
        if end > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)


class KvStore:
    """Rows and their backing. Owner: the step loop's thread."""

    def __init__(self, shape: KvShape, plan: KvPlan, parts: Sequence[KvPart]) -> None:
        """`parts` have all layers of `shape` between them, in order; of a model on one device there is one."""
        self.shape = shape
        self.plan = plan
        self.parts = tuple(parts)
        self.places = [(i, at) for i, part in enumerate(parts) for at in range(len(part.layers))]  # by layer
        self._free: list[int] = []
        self.used_bytes = 0
        self.allocate()

    @property
    def device(self) -> torch.device:
        """Where a forward begins."""
        return self.parts[0].device

    @property
    def allocated(self) -> bool:
        return self.parts[0].data.numel() > 0

    @property
    def free_rows(self) -> int:
        return len(self._free)

    def allocate(self) -> None:
        for part in self.parts:
            part.allocate(self.shape, self.plan)
        self._free = list(range(self.plan.rows))

    def free(self) -> None:
        """Gives the whole cache back. Only when no row is held."""
        assert len(self._free) == self.plan.rows, "a KV cache with sequences in it was freed"
        for part in self.parts:
            part.free()

    def take(self) -> int:
        """The lowest free row, so that busy rows stay together and a padded step wastes little."""
        return heapq.heappop(self._free)

    def grow(self, before: int, after: int) -> None:
        self.used_bytes += self.shape.row_bytes(after) - self.shape.row_bytes(before)

    def fits(self, extra_bytes: int) -> bool:
        return self.used_bytes + extra_bytes <= self.plan.bytes_max

    def release(self, row: int, tokens: int) -> None:
        self.used_bytes -= self.shape.row_bytes(tokens)
        heapq.heappush(self._free, row)
        for part in self.parts:
            part.forget_row(row)

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        for part in self.parts:
            part.data[target, :, :, :tokens].copy_(part.data[source, :, :, :tokens])

    @property
    def addresses(self) -> list[int]:
        return [part.data.data_ptr() for part in self.parts if part.map is not None]
