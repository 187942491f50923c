"""The journal: what was acknowledged is there, after any damage the rest is, and nothing is there that was not
written.
"""

import asyncio
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.loop import on_loop
from tests.money import usage
from tidegate.domain.errors import StoreFault
from tidegate.domain.ports import Cursor, JournalPage
from tidegate.domain.usage import UsageRecord
from tidegate.stores import journal_reader
from tidegate.stores.journal import JournalLimits, SegmentJournal
from tidegate.stores.journal_format import QUARANTINE_NAME, encode_frame, segment_path
from tidegate.stores.journal_reader import SegmentJournalReader, parse_window

START = Cursor("boot-1", 1, 0)
RECORDS = [usage(f"r{index}", output_tokens=index) for index in range(5)]


@contextmanager
def journal(root: Path, limits: JournalLimits | None = None, boot: str = "boot-1") -> Iterator[SegmentJournal]:
    opened = SegmentJournal(root, boot, limits)
    try:
        yield opened
    finally:
        opened.close()


async def _append_all(opened: SegmentJournal, records: list[UsageRecord]) -> None:
    await asyncio.gather(*(opened.append(record) for record in records))


def _write(root: Path, records: list[UsageRecord]) -> bytes:
    """A finished journal of one segment; its bytes."""

    async def run() -> None:
        with journal(root) as opened:
            await _append_all(opened, records)

    asyncio.run(run())
    return segment_path(root / "boot-1", 1).read_bytes()


def _drain(root: Path, start: Cursor = START, records_max: int = 1_000) -> tuple[list[UsageRecord], str, JournalPage]:
    """Everything readable from `start`, all damage reports, and the last page."""
    reader, records, damage = SegmentJournalReader(root), [], []
    while True:
        page = reader.read(start, records_max)
        records += page.records
        damage.append(page.damage)
        if page.closed or page.next == start:
            return records, "; ".join(filter(None, damage)), page
        start = page.next


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    _write(tmp_path, RECORDS)
    assert SegmentJournalReader(tmp_path).boots() == ["boot-1"]
    assert _drain(tmp_path, records_max=2)[:2] == (RECORDS, "")


@on_loop
async def test_records_are_readable_once_acknowledged_and_the_end_is_known_when_closed(tmp_path: Path) -> None:
    with journal(tmp_path) as opened:
        await opened.append(RECORDS[0])
        records, damage, page = _drain(tmp_path)
        assert (records, damage, page.closed) == (RECORDS[:1], "", False)
        await opened.append(RECORDS[1])
        assert _drain(tmp_path, page.next)[0] == RECORDS[1:2]
    assert _drain(tmp_path, page.next)[2].closed


@on_loop
async def test_appends_share_fsyncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), real(fd)))
    many = [usage(f"r{index}") for index in range(2_000)]
    with journal(tmp_path) as opened:
        await _append_all(opened, many)
    assert _drain(tmp_path)[0] == many
    assert len(synced) < len(many) / 20


@on_loop
async def test_segments_rotate_and_are_forgotten_once_posted(tmp_path: Path) -> None:
    with journal(tmp_path, JournalLimits(segment_bytes_max=1_000)) as opened:
        for record in RECORDS * 3:
            await opened.append(record)
        records, damage, page = _drain(tmp_path)
        assert (records, damage) == (RECORDS * 3, "")
        assert page.next.segment > 3
        reader = SegmentJournalReader(tmp_path)
        reader.forget(page.next)
        assert [path.name for path in (tmp_path / "boot-1").glob("*.log")] == [f"{page.next.segment:08d}.log"]
        assert "segments 1 to" in _drain(tmp_path)[1], "a reader that comes too late is told so"
    _, _, page = _drain(tmp_path, page.next)
    reader.forget(page.next)
    assert (page.closed, reader.boots(), (tmp_path / "boot-1").exists()) == (True, [], False)
    reader.forget(page.next)


def test_a_live_journal_without_segments_is_empty_not_closed(tmp_path: Path) -> None:
    with journal(tmp_path):
        assert SegmentJournalReader(tmp_path).read(START, 10) == JournalPage((), START)
    assert SegmentJournalReader(tmp_path).read(START, 10) == JournalPage((), START, closed=True)


def test_a_boot_id_is_used_once(tmp_path: Path) -> None:
    with journal(tmp_path), pytest.raises(StoreFault):
        SegmentJournal(tmp_path, "boot-1")


def test_boots_are_listed_oldest_first(tmp_path: Path) -> None:
    for boot in ("z", "a", "m"):
        with journal(tmp_path, boot=boot):
            pass
    assert SegmentJournalReader(tmp_path).boots() == ["z", "a", "m"]


# --- damage -------------------------------------------------------------------------------------------------------


@contextmanager
def _held_open(root: Path) -> Iterator[None]:
    """Makes the boot look alive, as its writer would."""
    with (root / "boot-1" / "lock").open("rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _whole_frames(cut: int) -> tuple[int, int]:
    """How many of RECORDS fit in `cut` bytes whole, and their size."""
    size = count = 0
    for record in RECORDS:
        length = len(encode_frame(record))
        if size + length > cut:
            break
        size, count = size + length, count + 1
    return count, size


def test_truncated_at_every_byte_the_whole_records_are_read() -> None:
    data = b"".join(map(encode_frame, RECORDS))
    for cut in range(len(data)):
        count, size = _whole_frames(cut)
        dead = parse_window(data[:cut], 1_000, whole=True, final=True)
        torn = [(size, cut)] if cut > size else []
        assert (dead.records, dead.end, dead.damage) == (RECORDS[:count], cut, torn), cut
        alive = parse_window(data[:cut], 1_000, whole=True, final=False)
        assert (alive.records, alive.end, alive.damage) == (RECORDS[:count], size, []), cut


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_flipped_in_any_byte_costs_that_record_and_is_reported(bit: int) -> None:
    data = b"".join(map(encode_frame, RECORDS))
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        hit, start = _whole_frames(at)
        dead = parse_window(bytes(flipped), 1_000, whole=True, final=True)
        span = (start, start + len(encode_frame(RECORDS[hit])))
        assert (dead.records, dead.damage) == (RECORDS[:hit] + RECORDS[hit + 1 :], [span]), at
        alive = parse_window(bytes(flipped), 1_000, whole=True, final=False)
        assert alive.records == dead.records, at
        assert alive.damage == ([span] if hit < len(RECORDS) - 1 else []), "the last may still be being written"


@pytest.mark.parametrize("cut", [1, 11, 13, 450, 700, 1_300, 2_000])
def test_a_torn_tail_is_waited_for_while_the_writer_lives_and_reported_when_it_is_dead(
    tmp_path: Path, cut: int
) -> None:
    data = _write(tmp_path, RECORDS)
    segment_path(tmp_path / "boot-1", 1).write_bytes(data[:cut])
    count, size = _whole_frames(cut)
    with _held_open(tmp_path):
        assert _drain(tmp_path) == (RECORDS[:count], "", JournalPage((), Cursor("boot-1", 1, size)))
    records, damage, page = _drain(tmp_path)
    assert (records, page.closed) == (RECORDS[:count], True)
    assert f"{cut - size} damaged bytes at {size}" in damage


def test_damaged_bytes_are_kept_for_inspection(tmp_path: Path) -> None:
    data = bytearray(_write(tmp_path, RECORDS))
    size = len(encode_frame(RECORDS[0]))
    data[size + 20] ^= 0xFF
    segment_path(tmp_path / "boot-1", 1).write_bytes(data)
    _drain(tmp_path)
    _drain(tmp_path)
    (kept,) = (tmp_path / QUARANTINE_NAME).iterdir()
    assert kept.read_bytes() == bytes(data[size : size + len(encode_frame(RECORDS[1]))])
    assert SegmentJournalReader(tmp_path).boots() == ["boot-1"]


@pytest.mark.parametrize("seed", range(40))
def test_any_mangling_yields_only_written_records_in_order(tmp_path: Path, seed: int) -> None:
    dice = Random(seed)
    many = [usage(f"r{index}") for index in range(60)]
    data = bytearray(_write(tmp_path, many))
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(data))
        match dice.randrange(3):
            case 0:
                data[at : at + dice.randint(1, 2_000)] = dice.randbytes(dice.randint(0, 2_000))
            case 1:
                data[at : at + dice.randint(1, 4_096)] = bytes(dice.randint(0, 4_096))
            case _:
                del data[at : at + dice.randint(1, 3_000)]
        if not data:
            break
    segment_path(tmp_path / "boot-1", 1).write_bytes(data)
    records, damage, page = _drain(tmp_path, records_max=7)
    ids = [record.id for record in records]
    assert set(records) <= set(many)
    assert ids == sorted(ids, key=lambda name: int(name[1:])), "order is kept"
    assert page.closed
    assert len(records) == len(many) or damage or not data


def test_damage_longer_than_a_window_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_reader, "WINDOW_BYTES", 4_096)
    data = _write(tmp_path, RECORDS)
    noise = Random(1).randbytes(50_000)
    segment_path(tmp_path / "boot-1", 1).write_bytes(data + noise + data)
    records, damage, _ = _drain(tmp_path)
    assert records == RECORDS * 2
    assert sum(int(part.split(":")[1].split()[0]) for part in damage.split("; ")) == len(noise)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_tokens": -1},
        {"cached_tokens": 11},
        {"output_tokens": 10**30},
        {"arrived_ms": -5},
        {"queue_ms": 2**63},
        {"model": "a\0b"},
    ],
)
def test_a_record_no_ledger_could_take_is_set_aside_and_stops_nothing(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    _write(tmp_path, [RECORDS[0], usage("bad", **changes), RECORDS[1]])
    records, damage, _ = _drain(tmp_path)
    assert (records, "damaged bytes" in damage) == (RECORDS[:2], True)


def test_a_clock_set_back_costs_no_record(tmp_path: Path) -> None:
    odd = usage("odd", first_token_ms=5, ended_ms=4, queue_ms=-3_600_000)
    _write(tmp_path, [odd])
    assert _drain(tmp_path)[:2] == ([odd], "")


# --- disks that fail ----------------------------------------------------------------------------------------------


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the writer thread has no loop to set an event on
            await asyncio.sleep(0.01)


class _FullDisk:
    """No byte fits while `full`, except into the space that giving up the ballast frees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ballast: Path) -> None:
        self.full = False
        self.broken = False
        self._ballast = ballast
        self._write, self._allocate, self._sync = os.write, os.posix_fallocate, os.fdatasync
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "posix_fallocate", self.allocate)
        monkeypatch.setattr(os, "fdatasync", self.sync)

    def write(self, fd: int, data: memoryview) -> int:
        if self.full and self._ballast.exists():
            if len(data) < 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._write(fd, data[: len(data) // 2])  # as a real disk does: what fits is written
        return self._write(fd, data)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._allocate(fd, offset, length)

    def sync(self, fd: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        self._sync(fd)


@on_loop
async def test_full_disk_running_requests_are_still_recorded_and_new_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = _FullDisk(monkeypatch, tmp_path / "boot-1" / "ballast")
    with journal(tmp_path, JournalLimits(probe_ms=10)) as opened:
        await opened.append(RECORDS[0])
        assert opened.healthy
        disk.full = True
        await opened.append(RECORDS[1])
        assert not opened.healthy
        await opened.append(RECORDS[2])
        assert not opened.healthy
        disk.full = False
        await _until(lambda: opened.healthy)
        await opened.append(RECORDS[3])
    assert _drain(tmp_path)[:2] == (RECORDS[:4], ""), "nothing lost, nothing twice, no torn bytes left"


@on_loop
async def test_failed_fsync_fails_the_append_and_the_journal_recovers_in_a_new_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = _FullDisk(monkeypatch, tmp_path / "boot-1" / "ballast")
    with journal(tmp_path, JournalLimits(probe_ms=10)) as opened:
        await opened.append(RECORDS[0])
        disk.broken = True
        with pytest.raises(StoreFault, match="Input/output error"):
            await opened.append(RECORDS[1])
        assert not opened.healthy
        disk.broken = False
        await _until(lambda: opened.healthy)
        await opened.append(RECORDS[2])
        records, damage, page = _drain(tmp_path)
        assert (records, damage) == ([RECORDS[0], RECORDS[2]], "")
        assert page.next.segment > 1


@on_loop
async def test_too_many_waiting_records_fail_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (gate.wait(20), real(fd)))
    with journal(tmp_path, JournalLimits(pending_records_max=3)) as opened:
        first = opened.append(RECORDS[0])
        await _until(lambda: not opened._pending)
        waiting = [opened.append(record) for record in RECORDS[1:4]]
        with pytest.raises(StoreFault, match="too slow"):
            await opened.append(RECORDS[4])
        gate.set()
        await asyncio.gather(first, *waiting)


@on_loop
async def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    with journal(tmp_path) as opened:
        last = opened.append(RECORDS[0])
    await last
    with pytest.raises(StoreFault):
        await opened.append(RECORDS[1])
    assert _drain(tmp_path)[0] == RECORDS[:1]


@on_loop
async def test_an_abandoned_future_harms_nobody(tmp_path: Path) -> None:
    with journal(tmp_path) as opened:
        opened.append(RECORDS[0]).cancel()
        await opened.append(RECORDS[1])
    assert _drain(tmp_path)[0] == RECORDS[:2]


# --- real processes -----------------------------------------------------------------------------------------------

_WRITER = """
import asyncio, sys
from pathlib import Path
from tests.money import usage
from tidegate.stores.journal import JournalLimits, SegmentJournal

async def stream(journal, name):
    for index in range(10**9):
        await journal.append(usage(f"{name}-{index}"))
        sys.stdout.write(f"{name}-{index}\\n")
        sys.stdout.flush()

async def main():
    journal = SegmentJournal(Path(sys.argv[1]), "boot-1", JournalLimits(segment_bytes_max=20_000))
    await asyncio.gather(*(stream(journal, name) for name in "abcdefgh"))

asyncio.run(main())
"""


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_instant_every_acknowledged_record_is_there(tmp_path: Path, seed: int) -> None:
    lines_seen = Random(seed).randint(1, 3_000)
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().strip() for _ in range(lines_seen)]
        assert not SegmentJournalReader(tmp_path).read(START, 1).closed
        writer.kill()
        rest = writer.stdout.read().split("\n")
    acknowledged += rest[:-1]  # the last line may be cut by the kill
    records, damage, page = _drain(tmp_path)
    ids = [record.id for record in records]
    assert set(acknowledged) <= set(ids)
    assert len(ids) == len(set(ids))
    assert page.closed
    assert damage.count("damaged bytes") <= 1, "at most a torn tail"


def test_the_gateway_pays_for_nothing_but_the_standard_library_and_msgspec() -> None:
    heavy = ("sqlalchemy", "alembic", "pydantic", "starlette", "torch", "uvicorn", "typer")
    code = f"import sys, tidegate.stores.journal as j; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
