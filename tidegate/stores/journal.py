"""The gateway's write-ahead log of usage records: append-only segments, one writer thread, group fsync.

`append` returns at once with a future that resolves when the record is on disk. While the thread waits for one fsync,
the records that arrive gather and share the next one; when one fsync follows another they gather for `gather_ms` more.
So a lone record waits for one fsync, one in a crowd for two and `gather_ms`, and the number of fsyncs (each costs CPU,
and two hand-overs between threads) is bounded by time, not by the traffic. Futures of a batch are resolved by one
callback on the event loop.

When the disk is full, the ballast (space reserved beforehand) is given up so that requests already running can still
be recorded, and `healthy` turns False so that new ones are refused. It turns True again once ballast could be
reserved anew. After a failed write or fsync the segment is cut back to its last durable byte and never written again:
a page cache whose fsync failed once cannot be trusted (https://lwn.net/Articles/752063/).
"""

import asyncio
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from tidegate.domain.errors import StoreFault
from tidegate.domain.usage import UsageRecord
from tidegate.stores.journal_format import BALLAST_NAME, LOCK_NAME, encode_frame, segment_path, sync_directory

log = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """Bounds of one journal. `pending_records_max` is how many may wait for the disk before `append` fails at once."""

    gather_ms: float = 1.0
    segment_bytes_max: int = 16 << 20
    ballast_bytes: int = 1 << 20
    pending_records_max: int = 65_536
    probe_ms: int = 250


Pending = tuple[bytes, "asyncio.Future[None]"]


class SegmentJournal:
    """Implements `ports.Journal`. Made and used on one event loop; `boot` must be new at each start of the gateway."""

    def __init__(self, root: Path, boot: str, limits: JournalLimits | None = None) -> None:
        """Creates `<root>/<boot>` and locks it. StoreFault when the directory cannot be made or the boot id was used
        before.
        """
        self._limits = limits or JournalLimits()
        self._directory = root / boot
        try:
            self._lock_fd = _create_locked(root, boot)
        except OSError as error:
            raise StoreFault(f"the journal directory cannot be created: {error.strerror}") from error
        self._pending: list[Pending] = []
        self._changed = threading.Condition()
        self._waiting = False
        self._closing = False
        self._healthy = True
        self._has_ballast = False
        self._segment: _Segment | None = None
        self._next_number = 1
        self._synced_s = 0.0
        try:
            self._reserve()
        except OSError as error:
            os.close(self._lock_fd)
            raise StoreFault(f"the journal cannot be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._write_loop, name="journal", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False while the disk refuses writes or has no reserve left: refuse new work."""
        return self._healthy

    def append(self, record: UsageRecord) -> "asyncio.Future[None]":
        """Resolves once `record` is on disk; StoreFault when it cannot be."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        frame = encode_frame(record)
        with self._changed:
            if self._closing:
                future.set_exception(StoreFault("the journal is closed"))
            elif len(self._pending) >= self._limits.pending_records_max:
                future.set_exception(StoreFault("the journal's disk is too slow: too many records wait for it"))
            else:
                self._pending.append((frame, future))
                if self._waiting:
                    self._changed.notify()
        return future

    def close(self) -> None:
        """Writes what is pending, ends the thread and releases the lock: readers then know that nothing more will
        come.
        """
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._segment is not None:
            self._segment.close()
        (self._directory / BALLAST_NAME).unlink(missing_ok=True)
        os.close(self._lock_fd)

    # --- the writer thread; everything below runs on it (or before it starts) -------------------------------------

    def _write_loop(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            if batch:
                _resolve_on_loop(batch, self._commit([frame for frame, _ in batch]))
            if not self._healthy:
                self._probe()

    def _next_batch(self) -> list[Pending] | None:
        """Everything pending. Waits for something; empty when it is time to probe a disk that failed; None to end."""
        gather_s = self._limits.gather_ms / 1000
        if monotonic() - self._synced_s < gather_s:
            sleep(gather_s)  # records come faster than this: the next fsync is for all that come meanwhile
        with self._changed:
            if not self._pending and not self._closing:
                self._waiting = True
                self._changed.wait(None if self._healthy else self._limits.probe_ms / 1000)
                self._waiting = False
            if not self._pending and self._closing:
                return None
            batch, self._pending = self._pending, []
            return batch

    def _commit(self, frames: Sequence[bytes]) -> StoreFault | None:
        """Makes a batch durable, giving up the ballast when the disk is full."""
        data = b"".join(frames)
        for _attempt in range(2):
            try:
                self._writable_segment().write_durably(data)
                self._synced_s = monotonic()
                return None
            except OSError as error:
                self._healthy = False
                self._abandon_segment()
                log.error("journal write failed: %s", error.strerror)
                fault = StoreFault(f"the journal cannot be written: {error.strerror}")
                fault.__cause__ = error
                if not (error.errno in _FULL and self._has_ballast):
                    return fault
                (self._directory / BALLAST_NAME).unlink(missing_ok=True)
                self._has_ballast = False
        return fault

    def _writable_segment(self) -> "_Segment":
        segment = self._segment
        if segment is not None and segment.durable_bytes >= self._limits.segment_bytes_max:
            segment.close()
            segment = self._segment = None
        if segment is None:
            path = segment_path(self._directory, self._next_number)
            segment = self._segment = _Segment(path)
            self._next_number += 1
            sync_directory(self._directory)
        return segment

    def _abandon_segment(self) -> None:
        if self._segment is None:
            return
        try:
            self._segment.cut()
        except OSError as error:
            log.error("a failed journal segment could not be cut back: %s", error.strerror)
        finally:
            self._segment.close()
            self._segment = None

    def _probe(self) -> None:
        """Healthy again when the reserve can be had and a segment can be opened."""
        try:
            self._reserve()
            self._writable_segment()
        except OSError:
            return
        self._healthy = True
        log.warning("the journal can be written again")

    def _reserve(self) -> None:
        if self._has_ballast:
            return
        ballast = self._directory / BALLAST_NAME
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._limits.ballast_bytes)
            os.fsync(fd)
        except OSError:
            ballast.unlink()  # what was got of it is space that records need more
            raise
        finally:
            os.close(fd)
        self._has_ballast = True


class _Segment:
    """One file being appended to. `durable_bytes` is how much of it has been synced."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.durable_bytes = 0

    def write_durably(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        os.fdatasync(self._fd)
        self.durable_bytes += len(data)

    def cut(self) -> None:
        os.ftruncate(self._fd, self.durable_bytes)
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _create_locked(root: Path, boot: str) -> int:
    """Makes the directory of a boot and its lock. It appears under its name only once locked: a reader never sees it
    dead.
    """
    assert boot == Path(boot).name, "boot id must be a plain file name"
    assert not boot.startswith("."), "hidden directories are ones still being made"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden = root / f".{boot}"
    hidden.mkdir(mode=0o700)
    fd = os.open(hidden / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(root / boot)
        sync_directory(root)
    except OSError:
        os.close(fd)
        raise
    return fd


def _resolve_on_loop(batch: list[Pending], fault: StoreFault | None) -> None:
    """Hands a whole batch back to the event loop in one callback."""
    loop = batch[0][1].get_loop()
    try:
        loop.call_soon_threadsafe(_resolve, batch, fault)
    except RuntimeError:
        # The loop is closed: nobody waits for these futures any more; the records are on disk all the same.
        log.debug("event loop closed before %d journal futures resolved", len(batch))


def _resolve(batch: list[Pending], fault: StoreFault | None) -> None:
    for _, future in batch:
        if future.done():
            continue
        if fault is None:
            future.set_result(None)
        else:
            future.set_exception(fault)
