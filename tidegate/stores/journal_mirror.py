"""Journals of gateways on other machines, byte for byte as they are there, beside those of this machine's own.

Who reads them need not know the difference: the lock that a living gateway holds on its own journal is held here for
it, until it is said that it is gone and that everything it wrote has arrived. What is on disk here is what decides how
far a journal was shipped, so a piece that comes twice, or an answer that is lost, changes nothing.
"""

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.domain.errors import StoreFault
from tidegate.stores.journal_format import LOCK_NAME, segment_numbers, segment_path, sync_directory

MARK_NAME = "mirrored"
BOOTS_MAX = 1_024


@dataclass(frozen=True, slots=True)
class Held:
    """Everything before `offset` of `segment` is on disk; segment 0: nothing is."""

    segment: int
    offset: int


@dataclass(slots=True)
class JournalMirror:
    """Implements `billing.receiving.Mirror`. Blocks on a disk; used by one thread at a time.

    Made before anybody reads the journals: a gateway whose link is not back yet is not taken for gone.
    """

    root: Path
    _locks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mark in sorted(self.root.glob(f"*/{MARK_NAME}")):
            self._lock(mark.parent.name)

    def boots(self) -> list[str]:
        """Gateways elsewhere that are not known to be gone."""
        return sorted(self._locks)

    def begin(self, boot: str) -> Held:
        """How far this journal is here; its place is made if it is new. Raises StoreFault."""
        try:
            if boot not in self._locks:
                if len(self._locks) >= BOOTS_MAX:
                    raise StoreFault(f"the journals of {BOOTS_MAX} gateways elsewhere are open")
                self._make(boot)
            numbers = segment_numbers(self.root / boot)
            return Held(numbers[-1], self._path(boot, numbers[-1]).stat().st_size) if numbers else Held(0, 0)
        except OSError as error:
            raise StoreFault(f"a shipped journal cannot be kept: {error.strerror}") from error

    def write(self, boot: str, segment: int, offset: int, data: bytes) -> Held:
        """Makes a piece durable and says how far the journal is then. What is here already is left as it is.

        Raises StoreFault.
        """
        held = self.begin(boot)
        end = held.offset if segment == held.segment else 0
        if segment < held.segment or offset > end:
            return held
        if rest := data[end - offset :]:
            try:
                self._append(self._path(boot, segment), end, rest, new=segment != held.segment)
            except OSError as error:
                raise StoreFault(f"a shipped journal cannot be written: {error.strerror}") from error
        return self.begin(boot)

    def end(self, boot: str) -> None:
        """The gateway is gone and everything is here: readers may finish this journal, and remove it."""
        (self.root / boot / MARK_NAME).unlink(missing_ok=True)
        if (lock := self._locks.pop(boot, None)) is not None:
            os.close(lock)

    def close(self) -> None:
        """Lets go of every lock, as the end of the process would."""
        while self._locks:
            os.close(self._locks.popitem()[1])

    def _make(self, boot: str) -> None:
        (self.root / boot).mkdir(mode=0o700, exist_ok=True)
        # In this order: once it is marked as a mirror it is locked again after a restart.
        for name in (MARK_NAME, LOCK_NAME):
            os.close(os.open(self.root / boot / name, os.O_WRONLY | os.O_CREAT, 0o600))
            if name == MARK_NAME:
                self._lock(boot)
        sync_directory(self.root)

    def _lock(self, boot: str) -> None:
        lock = os.open(self.root / boot / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._locks[boot] = lock

    def _path(self, boot: str, segment: int) -> Path:
        return segment_path(self.root / boot, segment)

    def _append(self, path: Path, offset: int, data: bytes, *, new: bool) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_directory(path.parent)
