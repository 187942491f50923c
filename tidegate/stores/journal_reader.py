"""Reads journals of usage records while they are written, after their writer died, and after damage.

* a frame cut short at the end of a live journal is being written: the reader waits for it
* the same at the end of a dead journal or a finished segment is a torn tail: reported and skipped
* damage before an intact frame is quarantined: its bytes are kept under ``<root>/quarantine``, reported, and reading
  goes on

Nothing is ever billed twice through this: a cursor moves only together with the ledger, and ids are unique there.
"""

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tidegate.domain.errors import StoreFault
from tidegate.domain.ports import Cursor, JournalPage
from tidegate.domain.usage import UsageRecord
from tidegate.stores.journal_format import (
    HEADER,
    LOCK_NAME,
    QUARANTINE_NAME,
    RECORD_BYTES_MAX,
    Cut,
    Frame,
    frame_at,
    intact_run,
    next_frame,
    segment_numbers,
    segment_path,
)

WINDOW_BYTES = 4 << 20
QUARANTINE_FILES_MAX = 1_000

assert 2 * (RECORD_BYTES_MAX + HEADER.size) < WINDOW_BYTES, "a window must hold a frame, or reading could stand still"


@dataclass(slots=True)
class Parsed:
    """Records of one window; `end` is where reading goes on; `damage` lists (start, end) ranges of the window."""

    records: list[UsageRecord]
    end: int
    damage: list[tuple[int, int]]


class SegmentJournalReader:
    """Implements `ports.JournalReader` over a directory of boots. Any number of readers may exist; none writes a
    journal.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def boots(self) -> list[str]:
        """Boot ids of every journal present, oldest first."""
        try:
            found = [(lock.stat().st_mtime_ns, lock.parent.name) for lock in self._root.glob(f"*/{LOCK_NAME}")]
        except OSError as error:
            raise StoreFault(f"journals cannot be listed: {error.strerror}") from error
        return [boot for _, boot in sorted(found) if not boot.startswith(".")]

    def read(self, cursor: Cursor, records_max: int) -> JournalPage:
        """Up to `records_max` records after `cursor`. A page without records may still move the cursor."""
        try:
            return self._read(cursor, records_max)
        except OSError as error:
            raise StoreFault(f"the journal cannot be read: {error.strerror}") from error

    def forget(self, cursor: Cursor) -> None:
        """Delete segments wholly before `cursor`; with the last one of a dead writer, the whole boot."""
        directory = self._root / cursor.boot
        try:
            dead = self.is_dead(cursor.boot)
            numbers = segment_numbers(directory)
            if dead and all(number < cursor.segment for number in numbers):
                shutil.rmtree(directory, ignore_errors=False)
                return
            for number in numbers:
                if number < cursor.segment:
                    segment_path(directory, number).unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreFault(f"journal segments cannot be removed: {error.strerror}") from error

    def _read(self, cursor: Cursor, records_max: int) -> JournalPage:
        # The order matters: what is read after the writer was seen dead, or after the next segment was seen, is
        # final.
        dead = self.is_dead(cursor.boot)
        numbers = segment_numbers(self._root / cursor.boot)
        segment = cursor.segment
        if segment not in numbers:
            later = next((number for number in numbers if number > segment), None)
            if later is None:
                return JournalPage((), cursor, closed=dead)
            missing = f"journal {cursor.boot}: segments {segment} to {later - 1} are missing"
            return JournalPage((), Cursor(cursor.boot, later, 0), damage=missing)
        final = dead or segment != numbers[-1]
        with segment_path(self._root / cursor.boot, segment).open("rb") as file:
            file.seek(cursor.offset)
            window = file.read(WINDOW_BYTES + 1)
        whole = len(window) <= WINDOW_BYTES
        parsed = parse_window(window[:WINDOW_BYTES], records_max, whole=whole, final=final)
        damage = [self._quarantine(cursor, window, found) for found in parsed.damage]
        finished = final and whole and parsed.end >= len(window)
        following = (
            Cursor(cursor.boot, segment + 1, 0)
            if finished
            else Cursor(cursor.boot, segment, cursor.offset + parsed.end)
        )
        closed = finished and dead and segment == numbers[-1]
        return JournalPage(tuple(parsed.records), following, closed=closed, damage="; ".join(damage))

    def is_dead(self, boot: str) -> bool:
        """Whether nobody holds the lock of this boot: its gateway is gone and nothing more will be appended."""
        try:
            fd = os.open(self._root / boot / LOCK_NAME, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _quarantine(self, cursor: Cursor, window: bytes, found: tuple[int, int]) -> str:
        """Keeps damaged bytes for whoever wants to look; they hold counts and ids, never text."""
        start, end = found
        kept = self._root / QUARANTINE_NAME
        kept.mkdir(mode=0o700, exist_ok=True)
        if len(os.listdir(kept)) < QUARANTINE_FILES_MAX:
            (kept / f"{cursor.boot}.{cursor.segment:08d}.{cursor.offset + start}").write_bytes(window[start:end])
        where = f"journal {cursor.boot} segment {cursor.segment}"
        return f"{where}: {end - start} damaged bytes at {cursor.offset + start} set aside"


def parse_window(window: bytes, records_max: int, *, whole: bool, final: bool) -> Parsed:
    """Frames of a window that begins at a frame boundary. `whole`: the window reaches the end of its segment."""
    parsed = Parsed([], 0, [])
    while parsed.end < len(window) and len(parsed.records) < records_max:
        records, parsed.end = intact_run(window, parsed.end, records_max - len(parsed.records))
        parsed.records += records
        if parsed.end >= len(window) or len(parsed.records) >= records_max:
            break
        found = frame_at(window, parsed.end)
        if isinstance(found, Frame):  # intact, but no record that can be posted
            parsed.damage.append((parsed.end, found.end))
            parsed.end = found.end
            continue
        if isinstance(found, Cut) and not whole:
            return parsed
        following = next_frame(window, parsed.end, whole=whole)
        if whole and not final and following == len(window):
            return parsed
        parsed.damage.append((parsed.end, following))
        parsed.end = following
    return parsed
