"""A download in ranges: several connections, resumed after any crash, nothing fetched twice that is known to be there.

Layout of its folder: ``plan`` (what is fetched, replaced whole), ``files/…`` (allocated in full before the first byte,
so that a full disk is known at once), ``journal`` (a line for each finished range, written after the range was synced).
A line that a crash tore apart fails its checksum and its range is fetched again; so is a range that has no line.
"""

import json
import os
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tidegate.engines.weights.disk import Sink, allocated, disk_faults, git_sha, sha256, staging, write_whole
from tidegate.engines.weights.faults import Corrupt, SourceUnavailable, Stopped
from tidegate.engines.weights.source import RemoteFile, RemoteModel, place
from tidegate.engines.weights.sums import Sums, threads_for

POLL_S = 0.02

Range = tuple[int, int, int]  # which file, from, to


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """`tries_max` for each range; between two tries at least `wait_ms_min`, doubled up to `wait_ms_max`. What a crash
    may cost is `sync_bytes` and the ranges under way: syncing costs the same for much as for little.
    """

    connections: int = 8
    range_bytes: int = 8 << 20
    sync_bytes: int = 128 << 20
    tries_max: int = 6
    wait_ms_min: int = 250
    wait_ms_max: int = 15_000


class Download:
    """Of `wanted` files of `model` into `folder`. One owner at a time (the caller holds the lock). `fetched_bytes`
    counts what this attempt got.
    """

    def __init__(self, folder: Path, model: RemoteModel, wanted: list[RemoteFile], limits: DownloadLimits) -> None:
        self._folder, self._model, self._files, self._limits = folder, model, wanted, limits
        self._failed = threading.Event()
        self._writing = threading.Lock()
        self._syncing = threading.Lock()
        self._done_bytes = 0
        self.fetched_bytes = 0
        self._unsynced: list[Range] = []
        self._sums: list[str] | None = None
        self.total_bytes = sum(file.size for file in wanted)

    @property
    def files(self) -> Path:
        return self._folder / "files"

    def prepare(self) -> None:
        """Makes the folder fit the plan; what an earlier attempt at another plan left is removed."""
        plan = json.dumps({"source": self._model.source, "files": [asdict(f) for f in self._files]}).encode()
        path = self._folder / "plan"
        if not path.is_file() or path.read_bytes() != plan:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_whole(path, plan)

    def missing_bytes(self) -> int:
        """What `allocate` will take from the disk."""
        return sum(max(0, file.size - allocated(self.files / file.name)) for file in self._files)

    def allocate(self) -> None:
        """Takes the room of every file. DiskFull when it is not there."""
        with disk_faults():
            for file in self._files:
                Sink(place(self.files, file.name)).allocate(file.size)

    def run(self, progress: Callable[[int], None], stop: threading.Event) -> None:
        """Fetches what is missing, and hashes what is there meanwhile. Raises WeightFault; what was fetched stays for
        the next attempt.
        """
        done = self._journalled()
        self._done_bytes = sum(end - start for _, start, end in done)
        ranges = deque(r for r in self._ranges() if r not in done)
        progress(self._percent())
        with disk_faults():
            sinks = _Sinks([self.files / file.name for file in self._files], self._folder / "journal")
            sums = Sums(sinks.files, [file.size for file in self._files])
            for each in done:
                sums.arrived(*each)
            sums.start()
            try:
                self._fetch(ranges, sinks, sums, progress, stop)
                self._sums = sums.finish(stop)
            finally:
                sums.give_up()
        if self._sums is None:
            raise Stopped("the download was stopped")

    def verify(self) -> dict[str, str]:
        """SHA-256 of every file, once `run` is through. Corrupt names one that is not what the source said it is."""
        found = self._sums or [sha256(self.files / file.name) for file in self._files]
        for file, digest in zip(self._files, found, strict=True):
            kind, _, wanted = file.check.partition(":")
            compared = git_sha(self.files / file.name) if kind == "git" else digest
            if kind in ("sha256", "git") and compared != wanted:
                raise Corrupt(f"{file.name} does not match the checksum its source gives; it was put into quarantine")
        return dict(zip([file.name for file in self._files], found, strict=True))

    # --- the parts ------------------------------------------------------------------------------------------------

    def _fetch(
        self, ranges: "deque[Range]", sinks: "_Sinks", sums: Sums, progress: Callable[[int], None],
        stop: threading.Event,
    ) -> None:  # fmt: skip
        errors: list[BaseException] = []

        def work() -> None:
            """One connection. What it writes after a stop is right all the same: true bytes at their place."""
            try:
                own = staging(self._limits.range_bytes)
                while (wanted := _next(ranges)) is not None:
                    self._one(wanted, sinks, own, sums, progress, stop)
            except BaseException as error:  # noqa: BLE001 - handed to whoever runs the download
                errors.append(error)
                self._failed.set()

        count = min(self._limits.connections, len(ranges))
        workers = [threading.Thread(target=work, name="download", daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            if stop.wait(POLL_S):  # one may sit in a read for a minute more: nobody waits for it, it can do no harm
                self._sync(sinks, 0)
                raise Stopped("the download was stopped")
        self._sync(sinks, 0)
        if errors:  # the others only stopped because of the first
            raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])

    def _one(
        self, wanted: Range, sinks: "_Sinks", own: memoryview, sums: Sums, progress: Callable[[int], None],
        stop: threading.Event,
    ) -> None:  # fmt: skip
        index, start, end = wanted
        if stop.is_set() or self._failed.is_set():
            raise Stopped("the download was stopped")
        body = own[: end - start]
        self._read(self._files[index].name, start, body, stop)
        sinks.files[index].write(body, start)
        sums.arrived(index, start, end)
        self._note(wanted, progress)
        self._sync(sinks, self._limits.sync_bytes)

    def _read(self, name: str, start: int, body: memoryview, stop: threading.Event) -> None:
        wait_ms = self._limits.wait_ms_min
        for left in reversed(range(self._limits.tries_max)):
            try:
                return self._model.read_into(name, start, body)
            except SourceUnavailable as fault:
                if left == 0:
                    raise
                self._pause(min(max(wait_ms, fault.retry_after_ms), self._limits.wait_ms_max), stop)
                wait_ms *= 2
        raise AssertionError("unreachable: the last try returns or raises")

    def _pause(self, wait_ms: int, stop: threading.Event) -> None:
        until = time.monotonic() + wait_ms / 1000
        while (left_s := until - time.monotonic()) > 0:
            if stop.wait(min(left_s, 0.05)) or self._failed.is_set():
                raise Stopped("the download was stopped")

    def _note(self, done: Range, progress: Callable[[int], None]) -> None:
        with self._writing:
            self._unsynced.append(done)
            self.fetched_bytes += done[2] - done[1]
            before, self._done_bytes = self._percent(), self._done_bytes + done[2] - done[1]
            if (after := self._percent()) != before:
                progress(after)

    def _sync(self, sinks: "_Sinks", bytes_min: int) -> None:
        """Puts finished ranges on the disk, then their lines into the journal, once there are `bytes_min` of them.

        One at a time: while the disk is slow the other connections wait, or a crash would cost what they went on with.
        """
        with self._syncing:
            with self._writing:
                if sum(end - start for _, start, end in self._unsynced) < bytes_min:
                    return
                done, self._unsynced = self._unsynced, []
            for index in {index for index, _, _ in done}:
                sinks.files[index].sync()
            if done:
                os.write(sinks.journal, b"".join(_line(each) for each in done))

    def _percent(self) -> int:
        return 100 * self._done_bytes // self.total_bytes if self.total_bytes else 100

    def _ranges(self) -> list[Range]:
        """In the order they are fetched: as many files side by side as are hashed at once."""
        step, beside = self._limits.range_bytes, threads_for(len(self._files))
        every = [
            (index, start, min(start + step, file.size))
            for index, file in enumerate(self._files)
            for start in range(0, file.size, step)
        ]
        return sorted(every, key=lambda each: (each[0] // beside, each[1], each[0]))

    def _journalled(self) -> set[Range]:
        path = self._folder / "journal"
        raw = path.read_bytes() if path.is_file() else b""
        lines = (line + b"\n" for line in raw.split(b"\n") if line)
        known = set(self._ranges())
        return {found for line in lines if (found := _parsed(line)) in known}


def _next(ranges: "deque[Range]") -> Range | None:
    """Asked by several threads: whether there is one and taking it must be one step."""
    try:
        return ranges.popleft()
    except IndexError:
        return None


class _Sinks:
    """Files of the plan in its order, and the journal. Closed once the last thread that may use them let go."""

    def __init__(self, files: list[Path], journal: Path) -> None:
        self.journal = -1
        self.files = [Sink(path) for path in files]
        self.journal = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if (size := os.fstat(self.journal).st_size) and os.pread(self.journal, 1, size - 1) != b"\n":
            os.write(self.journal, b"\n")  # a torn last line ends here, or the next one would be lost with it

    def __del__(self) -> None:
        if self.journal >= 0:
            os.close(self.journal)


def _line(done: Range) -> bytes:
    text = b"%d %d %d" % done
    return text + b" %08x\n" % zlib.crc32(text)


def _parsed(line: bytes) -> Range | None:
    text, _, crc = line.strip().rpartition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    index, start, end = (int(part) for part in text.split())
    return index, start, end
