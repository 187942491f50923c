"""Journal to ledger: every record once, at the price of its arrival, whatever dies in between."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests import postgres
from tests.billing.world import CHAT, GOLD, NODE, World
from tests.loop import on_loop
from tests.money import HOUR_MS, NOVEMBER_MS, price, usage
from tidegate.billing import ingest
from tidegate.billing.periods import Period
from tidegate.domain.errors import StoreFault
from tidegate.domain.ledger import Posted, UsageGroup
from tidegate.domain.money_ports import LedgerPage
from tidegate.domain.plan import NodeJoined, ReplicaStatus
from tidegate.domain.replica import ReplicaState
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.stores.journal_format import segment_path
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger

EVER = 10**14


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def _owed(world: World, tenant: str = "acme") -> int:
    return world.ledger.balances().get(f"tenant/{tenant}", 0)


@on_loop
async def test_records_are_posted_while_the_gateway_lives_and_its_journal_goes_when_it_is_dead(world: World) -> None:
    gateway = world.gateway()
    await gateway.append(usage("a"))
    assert await world.billing.drain() == 1
    await gateway.append(usage("b"))
    assert await world.billing.drain() == 1
    assert await world.billing.drain() == 0
    gateway.close()
    assert await world.billing.drain() == 0
    assert _owed(world) == 12_000
    assert SegmentJournalReader(world.journals).boots() == []


@on_loop
async def test_finished_segments_are_removed_as_they_are_posted(world: World) -> None:
    gateway = world.gateway(segment_bytes_max=1_000)
    for number in range(12):
        await gateway.append(usage(f"r{number}"))
    await world.billing.drain()
    assert len(list(world.journals.glob("*/*.log"))) == 1
    gateway.close()
    assert _owed(world) == 12 * 6_000


@on_loop
async def test_the_same_request_in_two_journals_is_billed_once(world: World) -> None:
    await world.write(usage("a"), usage("a"), boot="boot-1")
    await world.write(usage("a", gateway="boot-2"), boot="boot-2")
    await world.billing.drain()
    assert _owed(world) == 6_000


@on_loop
async def test_streams_of_a_gateway_that_died_are_billed_to_their_last_checkpoint(world: World) -> None:
    def open_at(name: str, tokens: int) -> UsageRecord:
        return usage(name, outcome=Outcome.OPEN, output_tokens=tokens)

    gateway = world.gateway()
    for record in (open_at("a", 1), open_at("b", 0), open_at("c", 2), open_at("a", 4), usage("c", output_tokens=3)):
        await gateway.append(record)
    await world.billing.drain()
    assert _owed(world) == 2_000 + 3 * 800, "a stream still running is not billed"
    await gateway.append(open_at("a", 9))
    gateway.close()
    await world.billing.drain()
    assert _owed(world) == 2_000 + 3 * 800 + 2_000 + 9 * 800, "`b` had sent nothing: free"
    assert world.ledger.open_records("boot-1") == []
    (_, cell) = world.ledger.sums(0, EVER)[0]
    assert (cell.requests, cell.billed_requests, cell.output_tokens) == (3, 2, 12)


@on_loop
async def test_the_price_of_the_instant_of_arrival_counts_also_when_rated_late(world: World) -> None:
    change_ms = NOVEMBER_MS + 5 * HOUR_MS + 1
    world.prices.add(price(effective_ms=change_ms, output_nano_usd=1_000_000))
    await world.write(usage("a", arrived_ms=change_ms - 1, ended_ms=change_ms + 50), usage("b", arrived_ms=change_ms))
    await world.billing.drain()
    assert _owed(world) == 6_000 + 2_000 + 5_000_000
    world.prices.add(price(effective_ms=change_ms - 10, output_nano_usd=0))
    await world.billing.drain()
    assert _owed(world) == 6_000 + 2_000 + 5_000_000, "what was rated stays as it was rated"


@on_loop
async def test_the_plan_of_the_endpoint_at_arrival_counts(world: World) -> None:
    world.prices.add(price(plan="gold", effective_ms=0, input_nano_usd=0, output_nano_usd=1))
    await world.billing.drain()
    world.facts = {"acme/chat": replace(CHAT, price_plan="gold")}
    world.clock.at_ms += HOUR_MS
    await world.billing.drain()
    world.facts = {}
    world.clock.at_ms += HOUR_MS
    before, after, deleted = (NOVEMBER_MS + hour * HOUR_MS for hour in (9, 11, 13))
    await world.write(usage("a", arrived_ms=before), usage("b", arrived_ms=after), usage("c", arrived_ms=deleted))
    await world.billing.drain()
    assert _owed(world) == 6_000 + 5 + 5


@on_loop
async def test_endpoints_not_known_yet_are_not_taken_for_deleted(world: World) -> None:
    await world.billing.drain()
    world.facts = None
    restarted = world.start_billing()
    await restarted.drain()
    assert [span.facts for span in world.ledger.spans()] == [CHAT]


@on_loop
async def test_dedicated_endpoints_pay_for_every_finished_hour_in_which_they_stood_ready(world: World) -> None:
    world.facts = {"acme/own": replace(GOLD, mode="dedicated"), "acme/chat": CHAT}
    world.node_joins(NOVEMBER_MS)
    world.replica(NOVEMBER_MS, "acme/own", "dedicated", ReplicaState.STARTING)
    world.replica(NOVEMBER_MS + HOUR_MS // 2, "acme/own", "dedicated", ReplicaState.READY)
    world.clock.at_ms = NOVEMBER_MS + 3 * HOUR_MS + 1
    await world.billing.drain()
    assert _owed(world) == 2 * 3_600_000_000 * 5 // 2, "two accelerators, two and a half hours; its start was free"
    await world.start_billing().drain()
    world.clock.at_ms += HOUR_MS
    await world.billing.drain()
    assert _owed(world) == 2 * 3_600_000_000 * 7 // 2
    assert sum(world.ledger.balances().values()) == 0
    assert world.ledger.balances()["platform/boot"] == 2 * 3_600_000_000 // 2


@on_loop
async def test_nobody_pays_while_the_node_is_down(world: World) -> None:
    world.facts = {"acme/own": replace(GOLD, mode="dedicated")}
    world.node_joins(NOVEMBER_MS)
    world.replica(NOVEMBER_MS, "acme/own", "dedicated", ReplicaState.READY)
    world.node_is_lost(NOVEMBER_MS + HOUR_MS // 4)
    world.clock.at_ms = NOVEMBER_MS + 2 * HOUR_MS
    await world.billing.drain()
    assert _owed(world) == 2 * 3_600_000_000 // 4
    world.node_joins(world.clock.at_ms)
    world.clock.at_ms += HOUR_MS
    await world.billing.drain()
    unreported = [found.share_us for found in world.ledger.state_sums(0, EVER) if found.state == "unreported"]
    assert sum(unreported) == 2 * HOUR_MS * 1_000 * 7 // 4
    assert _owed(world) == 2 * 3_600_000_000 // 4


@on_loop
async def test_an_hour_is_charged_only_once_nothing_more_of_it_can_be_reported(world: World) -> None:
    """The node was out of sight over the end of the hour, and says on its return that all went well."""
    world.facts = {"acme/own": replace(GOLD, mode="dedicated")}
    world.node_joins(NOVEMBER_MS)
    world.replica(NOVEMBER_MS, "acme/own", "dedicated", ReplicaState.READY)
    world.node_is_lost(NOVEMBER_MS + HOUR_MS - 5_000)
    world.clock.at_ms = NOVEMBER_MS + HOUR_MS + 10_000
    await world.billing.drain()
    assert _owed(world) == 0
    status = ReplicaStatus(
        "acme/own-1",
        "acme/own",
        "n1",
        1,
        ReplicaState.READY,
        ("gpu-0", "gpu-1"),
        since_ms=NOVEMBER_MS,
    )
    world.time.event(NodeJoined(NODE, (status,)), world.clock.at_ms + 1)
    world.clock.at_ms += 20_000
    await world.billing.drain()
    assert _owed(world) == 2 * 3_600_000_000


@on_loop
async def test_time_offered_twice_is_added_once(world: World) -> None:
    """The commit went through and its answer was lost: the page comes again, also after a restart."""
    world.node_joins(NOVEMBER_MS)
    (page,) = world.time.report(NOVEMBER_MS + HOUR_MS).pages
    for _ in range(2):
        world.ledger.add_time(page)
    assert sum(found.share_us for found in world.ledger.state_sums(0, EVER)) == 2 * HOUR_MS * 1_000
    assert world.ledger.time_marks() == {"n1": NOVEMBER_MS + HOUR_MS}
    with pytest.raises(StoreFault, match="another process"):
        world.ledger.add_time(replace(page, until_ms=page.until_ms + 1))


@on_loop
async def test_damage_is_counted_and_the_rest_is_billed(world: World) -> None:
    await world.write(usage("a"), usage("b"), usage("c"))
    segment = segment_path(world.journals / "boot-1", 1)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    assert await world.billing.drain() == 2
    assert world.metric("tidegate_journal_damage_total") == 1
    assert world.metric("tidegate_ledger_records_total") == 2
    assert _owed(world) == 12_000


@on_loop
async def test_a_long_backlog_is_posted_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "PAGE_RECORDS_MAX", 3)
    monkeypatch.setattr(ingest, "TURN_PAGES_MAX", 2)
    for boot in ("boot-1", "boot-2"):
        await world.write(*(usage(f"{boot}-{n}", gateway=boot) for n in range(20)), boot=boot)
    assert await world.billing.drain() == 40
    assert _owed(world) == 40 * 6_000


class _Away(SqlLedger):
    """A ledger whose database can be taken away."""

    away = False

    def post(self, page: LedgerPage) -> Posted:
        if self.away:
            raise StoreFault("the ledger cannot be written")
        return super().post(page)


@on_loop
async def test_a_database_server_that_was_dead_for_an_hour_gets_all_of_it(tmp_path: Path) -> None:
    """A real one, killed and started again; the hour is the clock's, and its records are in the journal meanwhile."""
    pg_ctl = postgres.find_pg_ctl()
    if pg_ctl is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres.server(pg_ctl) as server:
        world = World(tmp_path, postgres.new_database(server))
        gateway = world.gateway()
        await gateway.append(usage("before"))
        await world.billing.drain()
        server.kill()
        for minute in range(60):
            world.clock.at_ms += HOUR_MS // 60
            at_ms = world.clock.at_ms
            await asyncio.gather(*(gateway.append(usage(f"r{minute}-{n}", arrived_ms=at_ms)) for n in range(50)))
        with pytest.raises(StoreFault):
            await world.billing.drain()
        assert world.metric("tidegate_ledger_lag_seconds") == 3_600
        assert gateway.healthy, "it serves on"
        server.start()
        assert await world.billing.drain() == 3_000
        assert world.metric("tidegate_ledger_lag_seconds") == 0
        assert _owed(world) == 3_001 * 6_000
        assert world.ledger.sums(0, 10**14, hourly=True) == world.ledger.fold(0, 10**14)
        gateway.close()
        world.ledger._engine.dispose()


@on_loop
async def test_the_ledger_catches_up_after_its_database_was_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.billing.service.POLL_MS", 5)
    ledger = world.ledger = _Away(world.ledger._engine)
    world.billing = world.start_billing()
    running = asyncio.create_task(world.billing.run())
    gateway = world.gateway()
    ledger.away = True
    for number in range(30):
        await gateway.append(usage(f"r{number}"))
    world.clock.at_ms += HOUR_MS
    await asyncio.sleep(0.05)
    assert _owed(world) == 0
    with pytest.raises(StoreFault):
        await world.billing.drain()
    assert world.metric("tidegate_ledger_lag_seconds") == 3_600
    ledger.away = False
    async with asyncio.timeout(30):
        while _owed(world) < 30 * 6_000:  # noqa: ASYNC110  the ledger is a file, it has no event to wait for
            await asyncio.sleep(0.01)
    running.cancel()
    gateway.close()
    await world.billing.drain()
    assert world.metric("tidegate_ledger_lag_seconds") == 0
    assert _owed(world) == 30 * 6_000


# --- real processes -----------------------------------------------------------------------------------------------

_GATEWAY = """
import asyncio, sys, time
from pathlib import Path
from random import Random
from tests.money import NOVEMBER_MS, usage
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.stores.journal import JournalLimits, SegmentJournal

boot, dice = sys.argv[2], Random(sys.argv[2])
journal = SegmentJournal(Path(sys.argv[1]), boot, JournalLimits(segment_bytes_max=30_000))

async def stream(number):
    for request in range(10**6):
        name, tokens = f"{boot}-{number}-{request}", 0
        for _ in range(dice.randrange(4)):
            tokens += dice.randrange(1, 50)
            await journal.append(usage(name, gateway=boot, outcome=Outcome.OPEN, output_tokens=tokens))
            print("open", name, tokens, flush=True)
        tokens += dice.randrange(50)
        await journal.append(usage(name, gateway=boot, output_tokens=tokens))
        print("done", name, tokens, flush=True)

async def main():
    await asyncio.gather(*(stream(number) for number in range(6)))

asyncio.run(main())
"""

_INGEST = """
import asyncio, sys
from pathlib import Path
from tests.billing.world import World

async def main():
    billing = World(Path(sys.argv[1])).billing
    while True:
        print(await billing.drain(), flush=True)

asyncio.run(main())
"""


@contextmanager
def _child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _read_all(process: subprocess.Popen[str], into: list[str]) -> threading.Thread:
    assert process.stdout is not None
    thread = threading.Thread(target=lambda: into.extend(process.stdout or ()))
    thread.start()
    return thread


def _delivered(lines: Sequence[str]) -> dict[str, int]:
    """Output tokens of each request by what its gateway last reported of it; a line cut by the kill does not count."""
    reports = [line.split() for line in lines if line.endswith("\n")]
    return {name: int(tokens) for _, name, tokens in reports}


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(3))
def test_gateways_and_ingest_killed_at_random_the_ledger_is_exact(tmp_path: Path, seed: int) -> None:
    dice = Random(seed)
    World(tmp_path)  # makes the database and the price
    reports: list[str] = []
    posted_alive = 0
    for life in range(2):
        with _child(_GATEWAY, str(tmp_path / "journal"), f"boot-{seed}-{life}") as gateway:
            reading = _read_all(gateway, reports)
            for _ in range(2):
                with _child(_INGEST, str(tmp_path)) as poster:
                    assert poster.stdout is not None
                    posted_alive += sum(int(poster.stdout.readline()) for _ in range(dice.randint(1, 8)))
            gateway.kill()
            reading.join()
    assert posted_alive > 100, "ingest must have been at work when it was killed"
    world = World(tmp_path)
    asyncio.run(world.billing.drain())
    delivered = _delivered(reports)
    report = world.billing.statements.usage(Period(0, EVER), UsageGroup.ENDPOINT, None).total
    with world.ledger._engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT id, output_tokens FROM usage_records").all()
    posted = {row[0]: row[1] for row in rows}
    assert [name for name in delivered if posted.get(name, -1) < delivered[name]] == []
    assert report.requests == len(posted) >= len(delivered)
    unreported = [name for name, tokens in posted.items() if delivered.get(name) != tokens]
    assert len(unreported) <= 6 * 2, "at most the one record each stream had on its way when its gateway was killed"
    assert sum(amount for amount in world.ledger.balances().values()) == 0
    assert world.ledger.sums(0, EVER, hourly=True) == world.ledger.fold(0, EVER)
