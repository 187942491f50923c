"""A download in ranges: several connections, resumed after any crash, nothing fetched twice that is known to be there.

Layout of its folder: ``plan`` (what is fetched, replaced whole), ``files/…`` (allocated in full before the first byte,
so that a full disk is known at once), ``journal`` (a line for each finished range, written after the range was synced).
A line that a crash tore apart fails its checksum and its range is fetched again; so is a range that has no line.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tidegate.engines.weights.faults import Corrupt, DiskFull, SourceUnavailable, Stopped
from tidegate.engines.weights.source import RemoteFile, RemoteModel, place

HASH_BYTES = 8 << 20
POLL_S = 0.02


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
    """Of `wanted` files of `model` into `folder`. One owner at a time (the caller holds the lock)."""

    def __init__(self, folder: Path, model: RemoteModel, wanted: list[RemoteFile], limits: DownloadLimits) -> None:
        self._folder, self._model, self._files, self._limits = folder, model, wanted, limits
        self._failed = threading.Event()
        self._writing = threading.Lock()
        self._syncing = threading.Lock()
        self._done_bytes = 0
        self._unsynced: list[tuple[int, int, int]] = []
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
        with _disk_faults():
            for file in self._files:
                path = place(self.files, file.name)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    if file.size and os.fstat(descriptor).st_size != file.size:
                        os.posix_fallocate(descriptor, 0, file.size)
                finally:
                    os.close(descriptor)

    def run(self, progress: Callable[[int], None], stop: threading.Event) -> None:
        """Fetches what is missing. Raises WeightFault; what was fetched stays for the next attempt."""
        done = self._journalled()
        self._done_bytes = sum(end - start for _, start, end in done)
        ranges = deque(r for r in self._ranges() if r not in done)
        progress(self._percent())
        with _disk_faults():
            descriptors = self._open_all()
            errors: list[BaseException] = []
            workers = [
                threading.Thread(target=self._work, args=(ranges, descriptors, errors, progress, stop), daemon=True)
                for _ in range(min(self._limits.connections, len(ranges)))
            ]
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                if stop.wait(POLL_S):  # one may sit in a read for a minute more: nobody waits for it, it can do no harm
                    self._sync(descriptors, 0)
                    raise Stopped("the download was stopped")
            self._sync(descriptors, 0)
            if errors:  # the others only stopped because of the first
                raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])

    def verify(self) -> dict[str, str]:
        """SHA-256 of every file. Corrupt names one that is not what the source said it would be."""
        with ThreadPoolExecutor(2) as pool:
            sums = dict(zip([f.name for f in self._files], pool.map(self._verified, self._files), strict=True))
        return sums

    # --- the parts ------------------------------------------------------------------------------------------------

    def _work(
        self,
        ranges: "deque[tuple[int, int, int]]",
        descriptors: "_Descriptors",
        errors: list[BaseException],
        progress: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        """One connection. What it writes after a stop is right all the same: true bytes at their place in this plan."""
        try:
            while ranges:
                try:
                    index, start, end = ranges.popleft()
                except IndexError:
                    return
                if stop.is_set() or self._failed.is_set():
                    raise Stopped("the download was stopped")
                body = self._read(self._files[index].name, start, end, stop)
                _pwrite(descriptors.files[index], body, start)
                self._note((index, start, end), progress)
                self._sync(descriptors, self._limits.sync_bytes)
        except BaseException as error:  # noqa: BLE001 - handed to whoever runs the download
            errors.append(error)
            self._failed.set()

    def _read(self, name: str, start: int, end: int, stop: threading.Event) -> bytes:
        wait_ms = self._limits.wait_ms_min
        for left in reversed(range(self._limits.tries_max)):
            try:
                return self._model.read(name, start, end)
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

    def _note(self, done: tuple[int, int, int], progress: Callable[[int], None]) -> None:
        with self._writing:
            self._unsynced.append(done)
            before, self._done_bytes = self._percent(), self._done_bytes + done[2] - done[1]
            if (after := self._percent()) != before:
                progress(after)

    def _sync(self, descriptors: "_Descriptors", bytes_min: int) -> None:
        """Puts finished ranges on the disk, then their lines into the journal, once there are `bytes_min` of them.

        One at a time: while the disk is slow the other connections wait, or a crash would cost what they went on with.
        """
        with self._syncing:
            with self._writing:
                if sum(end - start for _, start, end in self._unsynced) < bytes_min:
                    return
                done, self._unsynced = self._unsynced, []
            for index in {index for index, _, _ in done}:
                os.fdatasync(descriptors.files[index])
            if done:
                os.write(descriptors.journal, b"".join(_line(each) for each in done))

    def _percent(self) -> int:
        return 100 * self._done_bytes // self.total_bytes if self.total_bytes else 100

    def _ranges(self) -> list[tuple[int, int, int]]:
        step = self._limits.range_bytes
        return [
            (index, start, min(start + step, file.size))
            for index, file in enumerate(self._files)
            for start in range(0, file.size, step)
        ]

    def _journalled(self) -> set[tuple[int, int, int]]:
        path = self._folder / "journal"
        raw = path.read_bytes() if path.is_file() else b""
        lines = (line + b"\n" for line in raw.split(b"\n") if line)
        known = set(self._ranges())
        return {found for line in lines if (found := _parsed(line)) in known}

    def _open_all(self) -> "_Descriptors":
        opened = _Descriptors([self.files / file.name for file in self._files], self._folder / "journal")
        if (size := os.fstat(opened.journal).st_size) and os.pread(opened.journal, 1, size - 1) != b"\n":
            os.write(opened.journal, b"\n")  # a torn last line ends here, or the next one would be lost with it
        return opened

    def _verified(self, file: RemoteFile) -> str:
        kind, _, wanted = file.check.partition(":")
        found = sha256(self.files / file.name)
        compared = _git_sha(self.files / file.name) if kind == "git" else found
        if kind in ("sha256", "git") and compared != wanted:
            raise Corrupt(f"{file.name} does not match the checksum its source gives; it was put into quarantine")
        return found


class _Descriptors:
    """Files of the plan in its order, and the journal. Closed once the last thread that may use them let go."""

    def __init__(self, files: list[Path], journal: Path) -> None:
        self.files: list[int] = []
        self.journal = -1
        for path in files:
            self.files.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self.journal = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        for descriptor in (*self.files, self.journal):
            if descriptor >= 0:
                os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def allocated(path: Path) -> int:
    """Bytes a file takes from the disk now."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a small file: after a crash it has the old content or the new."""
    with _disk_faults():
        making = path.with_name(path.name + ".new")
        with making.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        making.rename(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_faults() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull("the disk of the weight cache is full") from error
        raise DiskFull(f"the disk of the weight cache failed: {error.strerror}") from error


def _pwrite(descriptor: int, body: bytes, at: int) -> None:
    view = memoryview(body)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _git_sha(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _line(done: tuple[int, int, int]) -> bytes:
    text = b"%d %d %d" % done
    return text + b" %08x\n" % zlib.crc32(text)


def _parsed(line: bytes) -> tuple[int, int, int] | None:
    text, _, crc = line.strip().rpartition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    index, start, end = (int(part) for part in text.split())
    return index, start, end
