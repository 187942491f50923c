"""Reads the header of a GGUF file: what the model is and how large, without loading it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files come from outside, so every count is bounded
and every offset checked against what is really on the disk.
"""

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tidegate.domain.endpoint import ModelKind, ModelProfile
from tidegate.domain.errors import Refusal

HEADER_BYTES_MAX = 256 << 20  # vocabularies live in it
FIELDS_MAX, TENSORS_MAX, PARTS_MAX, NESTING_MAX = 4_096, 65_536, 1_000, 2
SAMPLES, SAMPLE_BYTES = 16, 64 << 10
KV_ELEMENT_BYTES = 2  # llama.cpp keeps keys and values in f16 unless told otherwise
ENCODERS = {"bert", "nomic-bert", "jina-bert-v2", "gemma-embedding", "modern-bert"}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Tensor type → (elements, bytes) of a block, as ggml defines them; 2 bits to 64 bits an element.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says: its fields (arrays of numbers or of short text only as their length), tensors, its digest."""

    fields: Mapping[str, object]
    tensor_bytes: int
    elements: int
    digest: str


def parts_of(model: Path) -> list[Path]:
    """The file itself, or every part of a split model (``name-00001-of-00003.gguf``) in order."""
    match = _PART.fullmatch(model.name)
    if match is None:
        return [model]
    count = min(int(match[3]), PARTS_MAX)
    return [model.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]


def inspect_gguf(source: str, model: Path) -> ModelProfile:
    """Refusal("invalid_configuration") with param ``model`` says what is missing, truncated or not served."""
    headers = [read_header(part) for part in parts_of(model)]
    fields = headers[0].fields
    name = str(fields.get("general.architecture", ""))
    context, layers = _count(fields, f"{name}.context_length"), _count(fields, f"{name}.block_count")
    encoder = name in ENCODERS or f"{name}.pooling_type" in fields
    return ModelProfile(
        source=source,
        digest=hashlib.sha256("".join(header.digest for header in headers).encode()).hexdigest(),
        kind=ModelKind.EMBEDDING if encoder else ModelKind.GENERATIVE,
        weight_bytes=sum(header.tensor_bytes for header in headers),
        kv_bytes_per_token=0 if encoder else layers * _kv_width(fields, name) * KV_ELEMENT_BYTES,
        context_tokens_max=context,
        params=sum(header.elements for header in headers),
    )


def read_header(path: Path) -> Header:
    """Raises Refusal for what is missing, truncated or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            reader = _Reader(file, path.name, min(size, HEADER_BYTES_MAX))
            fields, ends, elements = _read(reader)
            alignment = _number(fields, "general.alignment", 32)
            data = -(-reader.at // alignment) * alignment
            digest = hashlib.sha256()
            for offset in (0, *range(0, size, max(SAMPLE_BYTES, size // SAMPLES))):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
            file.seek(0)
            digest.update(file.read(reader.at))
    except FileNotFoundError as error:
        raise _refuse(f"{path.name} is missing") from error
    except OSError as error:
        raise _refuse(f"{path.name} cannot be read: {error.strerror}") from error
    if data + max(ends, default=0) > size:
        raise _refuse(f"{path.name} is truncated: {size} bytes on disk, its header describes more")
    digest.update(b"%d" % size)
    return Header(fields, max(ends, default=0), elements, digest.hexdigest())


class _Reader:
    """Little-endian reads that never go beyond `bytes_max`."""

    def __init__(self, file: BinaryIO, name: str, bytes_max: int) -> None:
        self._file, self._name, self._bytes_max, self.at = file, name, bytes_max, 0

    def take(self, length: int) -> bytes:
        if self.at + length > self._bytes_max:
            raise self.malformed()
        self.at += length
        return self._file.read(length)

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> object:
        if kind in _SCALARS:
            return struct.unpack("<" + _SCALARS[kind], self.take(struct.calcsize(_SCALARS[kind])))[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth >= NESTING_MAX:
            raise self.malformed()
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            raw = self.take(struct.calcsize(_SCALARS[inner]) * length)
            return struct.unpack(f"<{length}{_SCALARS[inner]}", raw) if length <= FIELDS_MAX else length
        for _ in range(length):  # texts of a vocabulary: read past, not kept; `take` bounds it
            self.value(inner, depth + 1)
        return length

    def malformed(self) -> Refusal:
        return _refuse(f"{self._name} is not a GGUF file, or it is truncated: its header is malformed")


def _read(reader: _Reader) -> tuple[dict[str, object], list[int], int]:
    """(fields, end of each tensor in the data, elements)."""
    if reader.take(4) != b"GGUF" or reader.number("I") not in (2, 3):
        raise reader.malformed()
    tensors, count = reader.number("Q"), reader.number("Q")
    if tensors > TENSORS_MAX or count > FIELDS_MAX:
        raise reader.malformed()
    fields: dict[str, object] = {}
    for _ in range(count):
        name = reader.text()
        fields[name] = reader.value(reader.number("I"))
    ends, elements = [], 0
    for _ in range(tensors):
        reader.text()
        shape = [reader.number("Q") for _ in range(min(reader.number("I"), 8))]
        kind, offset = reader.number("I"), reader.number("Q")
        if kind not in _BLOCKS:
            raise reader.malformed()
        product = 1
        for length in shape:
            product *= length
        block, block_bytes = _BLOCKS[kind]
        ends.append(offset + product // block * block_bytes)
        elements += product
    return fields, ends, elements


def _kv_width(fields: Mapping[str, object], name: str) -> int:
    """Elements of one token's keys and values in one layer; heads may differ by layer (then the mean, rounded up)."""
    heads = _count(fields, f"{name}.attention.head_count")
    given = fields.get(f"{name}.attention.head_count_kv", heads)
    kv_heads = -(-sum(given) // len(given)) if isinstance(given, tuple) and given else given
    size = max(1, _count(fields, f"{name}.embedding_length") // heads)
    keys = _number(fields, f"{name}.attention.key_length", size)
    values = _number(fields, f"{name}.attention.value_length", size)
    if not isinstance(kv_heads, int) or kv_heads < 1:
        raise _refuse(f"the file has no usable {name}.attention.head_count_kv")
    return kv_heads * (keys + values)


def _count(fields: Mapping[str, object], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, tuple) and value and isinstance(value[0], int):
        value = max(value)
    if not isinstance(value, int) or value < 1:
        raise _refuse(f"the file has no usable {name}")
    return value


def _number(fields: Mapping[str, object], name: str, default: int) -> int:
    return _count(fields, name) if name in fields else default


def _refuse(message: str) -> Refusal:
    return Refusal("invalid_configuration", f"model: {message}", param="model")
