"""Safetensors files as they lie on disk: checked, mapped, never copied on a CPU.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, raw tensors). Every
offset is checked against the file before a byte is mapped, so a truncated download is a named fault, not a SIGBUS.
"""

import json
import math
import mmap
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidegate.torch_engine import memory
from tidegate.torch_engine.faults import ModelFault

HEADER_BYTES_MAX = 100 << 20  # the format's own bound
READERS = 8  # threads that fault pages in from a cold disk: they wait for it, so more than cores (bench/weights.py)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory. ModelFault if there are none, or one named by the index is absent."""
    if not folder.is_dir():
        raise ModelFault("the model directory does not exist")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelFault("model.safetensors.index.json is damaged") from error
        missing = [name for name in names if "/" in name or not (folder / name).is_file()]
        if missing:
            raise ModelFault(f"{missing[0]} is named by the index but absent ({len(missing)} of {len(names)} missing)")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickled:
        raise ModelFault(f"only pickled weights found ({pickled[0]}): they can run code; convert them to safetensors")
    raise ModelFault("no model.safetensors in the model directory")


def read_header(path: Path) -> list[TensorSpec]:
    """Raises ModelFault for anything that is not a whole, well-formed safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ModelFault(f"{path.name} is truncated: no header")
        (length,) = struct.unpack("<Q", head)
        if length > HEADER_BYTES_MAX:
            raise ModelFault(f"{path.name} is not a safetensors file")
        if 8 + length > size:
            raise ModelFault(f"{path.name} is truncated: its header has {length} bytes, the file has {size}")
        try:
            entries = json.loads(file.read(length))
            specs = [_spec(name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFault(f"{path.name} is not a safetensors file: its header is damaged") from error
    for spec in specs:
        wanted = math.prod(spec.shape) * spec.dtype.itemsize
        if spec.end - spec.start != wanted or spec.start % spec.dtype.itemsize:
            raise ModelFault(f"{path.name} is damaged: tensor {spec.name} has impossible offsets")
        if spec.end > size:
            raise ModelFault(f"{path.name} is truncated: tensor {spec.name} ends beyond the file")
    return specs


def _spec(name: str, entry: dict[str, Any], data_start: int) -> TensorSpec:
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise ModelFault(f"tensor {name} has dtype {entry['dtype']}, which this engine does not serve")
    start, end = (int(offset) for offset in entry["data_offsets"])
    return TensorSpec(name, dtype, tuple(int(size) for size in entry["shape"]), data_start + start, data_start + end)


class WeightFile:
    """One mapped file. The mapping is private and never written; its pages are the page cache's own."""

    def __init__(self, path: Path) -> None:
        self.specs = read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        memory.prefer_huge_pages(self._map)
        self.buffer = torch.frombuffer(self._map, dtype=torch.uint8)

    @property
    def tensor_bytes(self) -> int:
        return sum(spec.end - spec.start for spec in self.specs)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of this file as views of `buffer`, uint8 [file bytes] on whichever device."""
        return {spec.name: buffer[spec.start : spec.end].view(spec.dtype).view(spec.shape) for spec in self.specs}

    def drop_pages(self) -> None:
        """Takes the pages out of this process; their contents stay in the kernel's page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def prefault(self, threads: int) -> None:
        """Maps every page now, instead of one fault at a time during the first step."""
        memory.populate(self.address, self.buffer.numel(), threads)

    @property
    def address(self) -> int:
        return self.buffer.data_ptr()


class Weights:
    """All files of one model."""

    def __init__(self, folder: Path) -> None:
        self.files = [WeightFile(path) for path in find_files(folder)]

    @property
    def tensor_bytes(self) -> int:
        return sum(file.tensor_bytes for file in self.files)

    def read_ahead(self) -> threading.Thread:
        """Maps every page in the background, reading from the disk what is not in memory yet. Join before first use."""

        def read() -> None:
            for file in self.files:
                file.prefault(READERS)

        reading = threading.Thread(target=read, name="weights", daemon=True)
        reading.start()
        return reading

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for file in self.files for name, tensor in file.views(file.buffer).items()}
