"""Usage records of a gateway on another machine: each in the platform's journals once, whatever breaks on the way."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.loop import on_loop, until
from tests.money import NOVEMBER_MS, StillClock, usage
from tidegate.billing import receiving
from tidegate.billing.receiving import Receiver
from tidegate.domain.errors import LinkFault
from tidegate.domain.ports import Cursor, Link
from tidegate.domain.usage import UsageRecord
from tidegate.gateway import shipping
from tidegate.gateway.shipping import Shipper
from tidegate.stores.journal import JournalLimits, SegmentJournal
from tidegate.stores.journal_mirror import JournalMirror
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.journal_tail import JournalTail
from tidegate.transports.local import LocalListener
from tidegate.wire.joining import JournalEnded, JournalHeld, JournalOffered, JournalPiece

BOOT, PEER = "us-gw+1-aa", "gateway/us-gw/us"
LIMITS = JournalLimits(segment_bytes_max=2_000, ballast_bytes=4_096)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "POLL_MS", 1)
    monkeypatch.setattr(shipping, "RETRY_MS_MIN", 1)
    monkeypatch.setattr(shipping, "RETRY_MS_MAX", 5)
    monkeypatch.setattr(shipping, "JOURNAL_PIECE_BYTES_MAX", 700)


class Line:
    """The cable between the two machines: each message may be the last one, before or after it has arrived."""

    def __init__(self, breaks: float = 0.0, seed: int = 0) -> None:
        self.listener = LocalListener()
        self.breaks, self._dice = breaks, random.Random(seed)

    async def connect(self) -> Link:
        return Cut(await self.listener.connect(), self)

    async def accept(self) -> Link:
        link = await self.listener.accept()
        link.peer = PEER
        return link

    async def close(self) -> None:
        return

    def broken(self) -> bool:
        return self._dice.random() < self.breaks


class Cut:
    """A link over a Line."""

    peer = "control/control"

    def __init__(self, link: Link, line: Line) -> None:
        self._link, self._line = link, line

    async def send(self, message: object) -> None:
        if self._line.broken():
            await self._fail()
        await self._link.send(message)
        if self._line.broken():
            await self._fail()

    async def receive(self) -> object:
        answer = await self._link.receive()
        if self._line.broken():
            await self._fail()
        return answer

    async def close(self) -> None:
        await self._link.close()

    async def _fail(self) -> None:
        await self._link.close()
        raise LinkFault("the cable was cut")


@contextlib.asynccontextmanager
async def running(line: Line, here: Path, there: Path) -> AsyncIterator[Shipper]:
    """A gateway's shipper and the platform's receiver, each on its own directory, until the end of the block."""
    mirror = JournalMirror(there)
    shipper = Shipper(JournalTail(here), line.connect)
    receiver = Receiver(line, mirror, StillClock(NOVEMBER_MS))
    tasks = [asyncio.create_task(shipper.run()), asyncio.create_task(receiver.run())]
    try:
        yield shipper
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        mirror.close()


def read(root: Path, boot: str = BOOT) -> tuple[list[UsageRecord], bool]:
    """All records of a journal, and whether nothing more will come."""
    reader, cursor, found = SegmentJournalReader(root), Cursor(boot, 1, 0), []
    while True:
        page = reader.read(cursor, 1_000)
        assert not page.damage, page.damage
        found += page.records
        if page.closed or page.next == cursor:
            return found, page.closed
        cursor = page.next


RECORDS = [usage(f"r{index}", output_tokens=index) for index in range(40)]


@on_loop
async def test_records_arrive_while_the_gateway_lives_and_its_end_after_the_last(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    journal = SegmentJournal(here, BOOT, LIMITS)
    async with running(Line(), here, there) as shipper:
        for record in RECORDS[:20]:
            await journal.append(record)
        await until(lambda: len(read(there)[0]) == 20 if (there / BOOT).exists() else False)
        assert read(there) == (RECORDS[:20], False), "it may write more"
        await until(lambda: len(list((here / BOOT).glob("*.log"))) == 1)  # what is over there is not kept here
        for record in RECORDS[20:]:
            await journal.append(record)
        journal.close()
        async with asyncio.timeout(20):
            await shipper.done.wait()
        assert read(there) == (RECORDS, True)


@pytest.mark.parametrize("seed", range(12))
def test_a_line_that_breaks_at_any_message_loses_nothing_and_doubles_nothing(seed: int, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()

    async def scenario() -> None:
        journal = SegmentJournal(here, BOOT, LIMITS)
        line = Line(breaks=0.15, seed=seed)
        async with running(line, here, there):
            for record in RECORDS[:25]:
                await journal.append(record)
        async with running(line, here, there):  # both sides were started again
            for record in RECORDS[25:]:
                await journal.append(record)
            journal.close()
            await until(lambda: not (here / BOOT).exists())
        found, closed = read(there)
        assert found == RECORDS
        assert closed

    asyncio.run(scenario())


@on_loop
async def test_a_gateway_whose_link_is_not_back_is_not_taken_for_gone(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    journal = SegmentJournal(here, BOOT, LIMITS)
    async with running(Line(), here, there):
        await journal.append(RECORDS[0])
        await until(lambda: (there / BOOT).exists() and read(there)[0] == RECORDS[:1])
    mirror = JournalMirror(there)  # the platform is started again, the gateway is still away
    assert read(there) == (RECORDS[:1], False)
    mirror.end(BOOT)
    assert read(there) == (RECORDS[:1], True)
    journal.close()


@on_loop
async def test_a_journal_that_was_read_and_removed_is_not_read_again(tmp_path: Path) -> None:
    """The answer to its end was lost: the gateway offers everything once more."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    journal = SegmentJournal(here, BOOT, LIMITS)
    for record in RECORDS[:10]:
        await journal.append(record)
    journal.close()
    mirror, tail = JournalMirror(there), JournalTail(here)
    await _ship_by_hand(mirror, tail)
    mirror.end(BOOT)
    reader, cursor = SegmentJournalReader(there), Cursor(BOOT, 1, 0)
    while not (page := reader.read(cursor, 1_000)).closed:
        cursor = page.next
    reader.forget(page.next)
    assert not (there / BOOT).exists()
    await _ship_by_hand(mirror, tail)
    again = reader.read(page.next, 1_000)
    assert (again.records, again.damage) == ((), ""), "the ledger's cursor is behind all of it"
    mirror.end(BOOT)
    assert reader.read(page.next, 1_000).closed


async def _ship_by_hand(mirror: JournalMirror, tail: JournalTail) -> None:
    held = mirror.begin(BOOT)
    while data := (piece := tail.read(BOOT, held.segment, held.offset, 500)).data:
        held = mirror.write(BOOT, piece.segment, piece.offset, data)


def test_pieces_may_overlap_or_come_late_and_a_gap_is_not_taken(tmp_path: Path) -> None:
    mirror = JournalMirror(tmp_path)
    assert mirror.begin(BOOT).segment == 0
    assert mirror.write(BOOT, 1, 0, b"abcdef").offset == 6
    assert mirror.write(BOOT, 1, 3, b"defghi").offset == 9
    assert mirror.write(BOOT, 1, 0, b"abc").offset == 9
    assert mirror.write(BOOT, 1, 20, b"x").offset == 9
    assert (tmp_path / BOOT / "00000001.log").read_bytes() == b"abcdefghi"
    assert mirror.write(BOOT, 3, 0, b"zz").segment == 3
    assert mirror.write(BOOT, 1, 9, b"late").segment == 3
    assert (tmp_path / BOOT / "00000001.log").read_bytes() == b"abcdefghi"
    mirror.close()


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ("gateway/other/us", JournalOffered(BOOT)),
        ("gateway/us/us", JournalOffered(BOOT)),
        ("node/us-gw/us", JournalOffered(BOOT)),
        ("", JournalOffered(BOOT)),
        (PEER, JournalOffered("us-gw+/../x")),
        (PEER, JournalHeld(BOOT, 1, 0)),
        (PEER, JournalPiece(BOOT, 0, 0, b"x")),
        (PEER, JournalPiece(BOOT, 1, -1, b"x")),
        (PEER, JournalPiece(BOOT, 1, 0, b"")),
        (PEER, JournalPiece(BOOT, 1, 0, b"x" * ((256 << 10) + 1))),
        ("gateway/other/us", JournalEnded(BOOT)),
    ],
)
def test_a_gateway_ships_its_own_journals_and_nothing_else(peer: str, message: object, tmp_path: Path) -> None:
    async def scenario() -> None:
        receiver = Receiver(LocalListener(), JournalMirror(tmp_path), StillClock(NOVEMBER_MS))
        with pytest.raises(LinkFault):
            await receiver._answer(peer, message)

    asyncio.run(scenario())
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".log"] == []


@on_loop
async def test_a_gateway_unheard_of_for_days_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "SWEEP_S", 0.001)
    mirror, clock = JournalMirror(tmp_path), StillClock(NOVEMBER_MS)
    mirror.begin(BOOT)
    receiver = Receiver(LocalListener(), mirror, clock)
    sweeping = asyncio.create_task(receiver._sweep())
    await asyncio.sleep(0.02)
    assert mirror.boots() == [BOOT]
    clock.at_ms += 90_000
    registry = CollectorRegistry()
    registry.register(receiver)
    assert registry.get_sample_value("tidegate_journal_silence_seconds", {"gateway": "us-gw"}) == 90
    clock.at_ms += receiving.GONE_MS_MAX + 1
    await until(lambda: not mirror.boots())
    sweeping.cancel()
