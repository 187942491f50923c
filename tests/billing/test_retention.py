"""Old usage records go, and every sum, entry, balance and invoice stays what it was."""

from pathlib import Path

import msgspec
import pytest

from tests.billing.world import World
from tests.loop import on_loop
from tests.money import DECEMBER_MS, HOUR_MS, NOVEMBER_MS, price, usage
from tidegate.billing import retention
from tidegate.billing.periods import Period
from tidegate.billing.retention import purge
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import UsageGroup
from tidegate.domain.units import MS_PER_DAY

NOVEMBER = Period(NOVEMBER_MS, DECEMBER_MS)
DAYS = 5
NOW_MS = NOVEMBER_MS + 10 * MS_PER_DAY + 12_345


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def _ten_days(world: World) -> None:
    await world.write(*(usage(f"r{n}", arrived_ms=NOVEMBER_MS + n * MS_PER_DAY // 4 + n) for n in range(40)))
    await world.billing.drain()


def _kept(world: World) -> list[str]:
    return [row.record.id for row in world.ledger.records_after(0, 1_000)]


@on_loop
async def test_records_go_and_what_they_came_to_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_A_TURN_MAX", 7)
    world.prices.add(price(effective_ms=NOVEMBER_MS + 2 * MS_PER_DAY + HOUR_MS, input_nano_usd=300))
    await _ten_days(world)
    statements = world.billing.statements

    def shown() -> bytes:
        invoice = statements.invoice("acme", NOVEMBER, DECEMBER_MS)
        reports = [statements.usage(NOVEMBER, by, None) for by in UsageGroup]
        return msgspec.json.encode((invoice, reports, world.ledger.balances()))

    before = shown()
    turns = 0
    while purge(world.ledger, NOW_MS, DAYS, []):
        turns += 1
    assert turns == 3
    assert _kept(world) == [f"r{n}" for n in range(20, 40)]
    assert world.ledger.records_from_ms() == NOVEMBER_MS + 5 * MS_PER_DAY
    assert shown() == before
    assert await world.billing.drain() == 0


@on_loop
async def test_a_part_of_an_hour_that_is_gone_is_refused_and_whole_hours_are_not(world: World) -> None:
    await _ten_days(world)
    purge(world.ledger, NOW_MS, DAYS, [])
    for start_ms, end_ms in ((1, HOUR_MS), (0, HOUR_MS + 1), (1, 2)):
        with pytest.raises(Refusal, match="whole hours"):
            world.ledger.sums(NOVEMBER_MS + start_ms, NOVEMBER_MS + end_ms)
    assert world.ledger.sums(NOVEMBER_MS, NOVEMBER_MS + HOUR_MS)[0][1].requests == 1
    assert world.ledger.sums(NOVEMBER_MS + 6 * MS_PER_DAY - 5, NOW_MS) != []


@on_loop
async def test_what_a_collector_has_not_taken_is_kept(world: World) -> None:
    await _ten_days(world)
    world.ledger.set_delivered("meter", 3)
    world.ledger.set_delivered("other", 20)
    assert purge(world.ledger, NOW_MS, DAYS, ["meter", "other"]) == 3
    assert _kept(world)[0] == "r3"
    assert purge(world.ledger, NOW_MS, DAYS, ["never heard of"]) == 0


@on_loop
async def test_a_record_that_comes_again_while_it_is_kept_counts_once(world: World) -> None:
    await _ten_days(world)
    purge(world.ledger, NOW_MS, DAYS, [])
    await world.write(usage("r39", arrived_ms=NOVEMBER_MS + 9 * MS_PER_DAY), boot="boot-2")
    assert await world.billing.drain() == 0
