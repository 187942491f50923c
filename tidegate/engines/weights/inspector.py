"""Inspecting a model that is not here: its describing files, and of its weights no more than the headers and samples.

What was read is laid out as the directory would be, the weights as sparse files with holes where nothing was read. So
one inspector judges every model, and the digest of a remote one is the digest it will have once it is here.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import Refusal, WeightFault
from tidegate.engines.inspect import HEADER_BYTES_MAX, SAMPLE_BYTES, FileInspector, sample_offsets
from tidegate.engines.weights.access import Access, open_remote
from tidegate.engines.weights.faults import SourceUnavailable
from tidegate.engines.weights.source import RemoteFile, RemoteModel, parse, pickled, place, wanted

CONNECTIONS = 16
RETRY_AFTER_MS = 5_000


class SourceInspector:
    """Implements `ModelInspector` for local and remote sources; `scratch` is a directory on a local file system."""

    def __init__(self, access: Access, scratch: Path) -> None:
        self._access, self._scratch = access, scratch
        self._files = FileInspector()

    def inspect(self, source: str) -> ModelProfile:
        """As `FileInspector.inspect`; a remote profile's source names the revision that was read."""
        if parse(source) is None:
            return self._files.inspect(source)
        try:
            return self._remote(source)
        except SourceUnavailable as fault:
            raise Refusal(
                "source_unavailable",
                f"model: {fault.reason}; try again",
                param="model",
                retry_after_ms=max(fault.retry_after_ms, RETRY_AFTER_MS),
            ) from fault
        except WeightFault as fault:
            raise Refusal("invalid_configuration", f"model: {fault.reason}", param="model") from fault

    def _remote(self, source: str) -> ModelProfile:
        model = open_remote(source, self._access)
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="inspect-") as folder:
            lay_out(model, Path(folder))
            profile = self._files.inspect(folder)
        return replace(profile, source=model.source)


def lay_out(model: RemoteModel, folder: Path) -> None:
    """Writes what inspection reads into `folder`. Raises WeightFault."""
    for name in pickled(model):
        place(folder, name).touch()  # so that the refusal names it
    with ThreadPoolExecutor(CONNECTIONS, "inspect") as pool:
        reads = []
        for file in wanted(model):
            if file.name.endswith(".safetensors"):
                reads += [(file, *span) for span in _spans(model, file)]
            else:
                reads.append((file, 0, file.size))
        for _ in pool.map(lambda read: _copy(model, folder, *read), reads):
            pass


def _spans(model: RemoteModel, file: RemoteFile) -> list[tuple[int, int]]:
    """Header and samples of one weight file, as byte ranges."""
    length = int.from_bytes(model.read(file.name, 0, min(8, file.size)), "little")
    header_end = min(8 + min(length, HEADER_BYTES_MAX), file.size)
    return [(0, header_end)] + [(at, min(at + SAMPLE_BYTES, file.size)) for at in sample_offsets(file.size)]


def _copy(model: RemoteModel, folder: Path, file: RemoteFile, start: int, end: int) -> None:
    descriptor = os.open(place(folder, file.name), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, file.size)
        os.pwrite(descriptor, model.read(file.name, start, end), start)
    finally:
        os.close(descriptor)
