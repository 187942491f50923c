"""Sources of weights: what ``hf://org/name@revision`` and ``s3://bucket/prefix`` mean, and what each can do.

Only files an engine reads are ever asked for: safetensors, and the JSON and text that describe them. Names come from
outside, so one that would leave its directory is refused before anything is written.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from tidegate.domain.errors import Refusal
from tidegate.engines.inspect import DESCRIBING, JSON_BYTES_MAX, PICKLED
from tidegate.engines.weights.faults import SourceMissing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILES_MAX = 10_000  # of one listing
_HUB = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,128}))?")
_S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^\x00-\x1f]{1,900})")
ACCEPTED = "accepted are hf://org/name@revision, s3://bucket/prefix, file:///directory, or an absolute path"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`check` is what the source says of its contents: ``sha256:HEX``, ``git:HEX`` (a git blob's SHA-1), ``etag:…``
    (comparable with another listing's only), or empty.
    """

    name: str
    size: int
    check: str = ""


class RemoteModel(Protocol):
    """One model at one revision. `source` names that revision, so that it means the same at any later time."""

    @property
    def source(self) -> str: ...

    @property
    def files(self) -> Mapping[str, RemoteFile]: ...

    def read(self, name: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end) of a file. Blocks; called from many threads. WeightFault when it cannot."""
        ...

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As `read`, as many bytes as the buffer has: for megabytes, which cost more to allocate than to copy."""
        ...


@dataclass(frozen=True, slots=True)
class HubAddress:
    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class S3Address:
    bucket: str
    prefix: str


def parse(source: str) -> HubAddress | S3Address | None:
    """None for a local path. Refusal("invalid_configuration") says what is accepted."""
    if "://" not in source or source.startswith("file://"):
        return None
    if (hub := _HUB.fullmatch(source)) and ".." not in source:
        return HubAddress(hub[1], hub[2] or "main")
    if (s3 := _S3.fullmatch(source)) and ".." not in s3[2].split("/"):
        return S3Address(s3[1], s3[2].strip("/"))
    raise Refusal(
        "invalid_configuration", f"model: {source[:120]!r} is not a source of weights; {ACCEPTED}", param="model"
    )


def wanted(model: RemoteModel) -> list[RemoteFile]:
    """The files an engine needs, weights last. SourceMissing when the index names one that is absent."""
    names = _weight_names(model)
    if absent := [name for name in names if name not in model.files]:
        raise SourceMissing(f"{absent[0]} is named in {INDEX}, but missing at the source")
    describing = [file for file in model.files.values() if _describes(file)]
    return sorted(describing, key=lambda f: f.name) + [model.files[name] for name in names]


def pickled(model: RemoteModel) -> list[str]:
    """Names of weights in formats that can run code: never fetched, only named in a refusal."""
    return sorted(name for name in model.files if "/" not in name and name.endswith(PICKLED))


def safe(name: str) -> bool:
    """Whether a listed name stays inside the directory it is written to."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def place(folder: Path, name: str) -> Path:
    """Where a file of the model goes; its folder exists afterwards."""
    assert safe(name), name
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _describes(file: RemoteFile) -> bool:
    """The same files that `FileInspector` counts into the digest: top-level ones, and config.json one folder down."""
    folder, _, name = file.name.rpartition("/")
    own = not folder or (name == "config.json" and "/" not in folder)
    return own and file.name.endswith(DESCRIBING) and file.size <= JSON_BYTES_MAX


def _weight_names(model: RemoteModel) -> list[str]:
    index = model.files.get(INDEX)
    if index is None:
        return [SINGLE] if SINGLE in model.files else []
    try:
        names = set(json.loads(model.read(INDEX, 0, min(index.size, JSON_BYTES_MAX)))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceMissing(f"{INDEX} of the source is damaged") from error
    if not all(isinstance(name, str) and "/" not in name and safe(name) for name in names):
        raise SourceMissing(f"{INDEX} of the source names a file outside its directory")
    return sorted(names)
