"""A process that fetches one model into a disk cache, for tests that kill it: ``CACHE SOURCE BUDGET PAUSE_S``.

Its source is a directory read in ranges, slowly enough to be killed half-way. Prints a line a range read, then DONE.
"""

import sys
import threading
import time
from pathlib import Path

from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import WeightFault
from tidegate.engines.inspect import FileInspector
from tidegate.engines.weights.cache import DiskCache
from tidegate.engines.weights.download import DownloadLimits
from tidegate.engines.weights.faults import SourceUnavailable
from tidegate.engines.weights.source import RemoteFile

LIMITS = DownloadLimits(
    connections=3, range_bytes=64 << 10, sync_bytes=128 << 10, tries_max=3, wait_ms_min=1, wait_ms_max=5
)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")  # one write: lines of several threads do not mix
    sys.stdout.flush()


class DirectorySource:
    """A `RemoteModel` over a directory. `pause_s` before each read; from `dies_after` reads on it is away."""

    def __init__(self, folder: Path, pause_s: float = 0.0) -> None:
        self.folder, self.pause_s = folder, pause_s
        self.source = "hf://test/model@0"
        self.dies_after: int | None = None
        self.reads: list[tuple[str, int, int]] = []
        self.files = {
            str(p.relative_to(folder)): RemoteFile(str(p.relative_to(folder)), p.stat().st_size)
            for p in folder.rglob("*")
            if p.is_file()
        }

    def read(self, name: str, start: int, end: int) -> bytes:
        time.sleep(self.pause_s)
        if self.dies_after is not None and len(self.reads) >= self.dies_after:
            raise SourceUnavailable("the source is away")
        self.reads.append((name, start, end))
        say(name, start, end)
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read(name, start, start + len(buffer))


def profile(folder: Path) -> ModelProfile:
    found = FileInspector().inspect(str(folder))
    return ModelProfile("hf://test/model@0", found.digest, found.kind, found.weight_bytes, 0, 128)


def main() -> int:
    cache, folder, budget, pause_s = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    source = DirectorySource(folder, pause_s)
    try:
        held = DiskCache(cache, budget, lambda _: source, LIMITS).hold(
            profile(folder), lambda _: None, threading.Event()
        )
    except WeightFault as fault:
        say("FAULT", type(fault).__name__, fault.reason)
        return 1
    say("DONE", held.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
