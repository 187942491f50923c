"""Who had the accelerators and what it brought in, worked out by hand; and what a tenant is shown of it."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from tests.billing.world import CHAT, GOLD, World
from tests.loop import on_loop
from tests.money import HOUR_MS, NOVEMBER_MS, price, usage
from tidegate.billing.periods import Period
from tidegate.billing.statements import Statements
from tidegate.domain.replica import ReplicaState as S
from tidegate.money.economics import MachineCost
from tidegate.wire.accelerator_time import TimeView

DAY = Period(NOVEMBER_MS, NOVEMBER_MS + 24 * HOUR_MS)
HOUR_NANO_USD = 3_600_000_000


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def _day(world: World) -> TimeView:
    """Two accelerators, four hours: chat loads for half an hour, is ready for one and a half (busy for half an hour),
    sleeps; own (dedicated) has its room for the two hours left.
    """
    world.facts = {"acme/chat": replace(CHAT, accelerators=2), "birch/own": replace(GOLD, mode="dedicated")}
    world.clock.at_ms = NOVEMBER_MS + 4 * HOUR_MS

    def at(hours: float) -> int:
        return NOVEMBER_MS + int(hours * HOUR_MS)

    world.node_joins(at(0))
    world.replica(at(0), "acme/chat", "dedicated_serverless", S.STARTING)
    world.replica(at(0.5), "acme/chat", "dedicated_serverless", S.READY)
    world.in_flight(at(1), "acme/chat", 3)
    world.in_flight(at(1.5), "acme/chat", 0)
    world.replica(at(2), "acme/chat", "dedicated_serverless", S.ASLEEP)
    world.replica(at(2), "birch/own", "dedicated", S.READY)
    await world.write(usage("a", arrived_ms=at(1), output_tokens=10_000_000))
    await world.billing.drain(checkpoint=True)
    return world.billing.statements.time(DAY, world.clock.now_ms(), None)


@on_loop
async def test_every_hour_has_an_owner_and_every_amount_its_source(world: World) -> None:
    view = await _day(world)
    chat, own = view.endpoints
    assert chat.states_ms == {
        "activating": HOUR_MS, "idle": 2 * HOUR_MS, "busy": HOUR_MS, "asleep": 4 * HOUR_MS
    }  # fmt: skip
    assert (chat.ready_ms, chat.lent_ms, chat.borrowed_ms) == (3 * HOUR_MS, 4 * HOUR_MS, 0)
    assert (own.states_ms, own.borrowed_ms) == ({"idle": 4 * HOUR_MS}, 4 * HOUR_MS)
    assert [(one.lender, one.borrower, one.duration_ms) for one in view.lent] == [
        ("acme/chat", "birch/own", 4 * HOUR_MS)
    ]
    tokens = Decimal(10 * 200 + 10_000_000 * 800) / 10**9
    assert (Decimal(chat.tokens_usd), Decimal(chat.worth_usd)) == (tokens, Decimal("3.6") * 4)
    assert Decimal(chat.margin_usd) == tokens - Decimal("3.6") * 4
    assert Decimal(chat.dedicated_usd) == Decimal("3.6") * 2 * 4
    assert (own.time_usd, own.worth_usd, own.margin_usd) == ("14.400000000", "14.400000000", "0.000000000")
    assert view.platform is not None
    assert Decimal(view.platform.brought_in_usd) == tokens + Decimal("14.4")
    assert Decimal(view.platform.worth_usd) == Decimal("3.6") * 8
    assert (view.platform.boot_usd, view.platform.idle_usd) == ("3.600000000", "7.200000000")


@on_loop
async def test_the_states_of_each_accelerator_sum_to_wall_time(world: World) -> None:
    view = await _day(world)
    assert [(one.node, one.accelerator, one.kind) for one in view.accelerators] == [
        ("n1", "gpu-0", "h200"), ("n1", "gpu-1", "h200")
    ]  # fmt: skip
    for one in view.accelerators:
        assert sum(one.states_ms.values()) == one.wall_ms == 4 * HOUR_MS
    balances = world.ledger.balances()
    booked = {name: amount for name, amount in balances.items() if name.startswith("platform/")}
    assert booked == {
        "platform/capacity": -8 * HOUR_NANO_USD, "platform/boot": HOUR_NANO_USD, "platform/idle": 2 * HOUR_NANO_USD,
        "platform/serving": HOUR_NANO_USD, "platform/lent": 4 * HOUR_NANO_USD,
    }  # fmt: skip
    assert sum(balances.values()) == 0


@on_loop
async def test_a_tenant_is_told_of_its_own_endpoints_only(world: World) -> None:
    await _day(world)
    view = world.billing.statements.time(DAY, world.clock.now_ms(), "acme")
    assert [one.endpoint for one in view.endpoints] == ["acme/chat"]
    assert (view.lent, view.accelerators, view.platform) == ([], [], None)
    assert view.endpoints[0].lent_ms == 4 * HOUR_MS, "how much it lent, but not to whom"


@on_loop
async def test_a_restart_goes_on_where_the_ledger_is(world: World, tmp_path: Path) -> None:
    before = await _day(world)
    again = World(tmp_path)
    again.clock.at_ms = world.clock.at_ms + HOUR_MS
    again.node_joins(again.clock.at_ms)
    await again.billing.drain(checkpoint=True)
    after = again.billing.statements.time(DAY, again.clock.now_ms(), None)
    assert before.platform is not None
    assert after.platform is not None
    grown = dict(before.platform.states_ms) | {"unreported": 2 * HOUR_MS}
    assert after.platform.states_ms == grown
    assert [one.time_usd for one in after.endpoints] == [one.time_usd for one in before.endpoints]


@on_loop
async def test_a_dedicated_endpoints_canary_pays_the_plan_of_its_endpoint(world: World) -> None:
    world.prices.add(price(plan="gold", accelerator_hour_nano_usd=7 * HOUR_NANO_USD))
    world.facts = {"birch/own": replace(GOLD, mode="dedicated", price_plan="gold")}
    world.clock.at_ms = NOVEMBER_MS + 2 * HOUR_MS
    world.node_joins(NOVEMBER_MS)
    world.replica(NOVEMBER_MS, "birch/own:canary", "dedicated", S.READY)
    await world.billing.drain(checkpoint=True)
    (line,) = world.billing.statements.invoice("birch", DAY, world.clock.now_ms()).lines
    assert (line.endpoint, line.item) == ("birch/own:canary", "accelerator_hours")
    assert line.unit_usd == "25.2"


@on_loop
async def test_with_what_machines_cost_it_says_what_is_left(world: World) -> None:
    view = await _day(world)
    assert view.platform is not None
    assert (view.platform.machines_usd, view.platform.profit_usd, view.platform.profit_nano_usd) == (None, None, None)
    machines = MachineCost(10**9, {"h200": 2 * 10**9})
    said = Statements(world.ledger, world.prices, machines=machines).time(DAY, world.clock.now_ms(), None).platform
    assert said is not None
    assert said.machines_usd == "16.000000000", "two accelerators for four hours, whatever they did"
    assert Decimal(said.profit_usd or "") == Decimal(said.brought_in_usd) - 16
    assert MachineCost(10**9, {}).of({"h200": 5_400_000_000}) == 1_500_000_000


@on_loop
async def test_kinds_at_prices_of_their_own_have_no_unit_price_together(world: World) -> None:
    world.prices.add(price(plan="gold", effective_ms=NOVEMBER_MS, accelerator_kinds=(("h200", 2 * HOUR_NANO_USD),)))
    await _day(world)
    (line,) = world.billing.statements.invoice("birch", DAY, world.clock.now_ms()).lines
    assert (line.item, line.nano_usd, line.unit_usd) == ("accelerator_hours", 4 * 2 * HOUR_NANO_USD, "0")
