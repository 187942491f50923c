"""Limits through the admin API, and two real gateway loops that share what control leases them."""

import asyncio
from pathlib import Path

from tests.control.world import World, running
from tests.loop import on_loop, until
from tests.money import price, usage
from tidegate.control.budgets import LEASE_MS
from tidegate.domain.endpoint import Tenant
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Spending
from tidegate.domain.ports import Change
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.loop import GatewayLoop
from tidegate.gateway.metrics import Metrics
from tidegate.quota.gate import Demand, Gate, Hold
from tidegate.quota.treasury import Spent, spendings

TENANT = {"scope": "tenant", "subject": "acme"}


async def put(world: World, **limits: object) -> int:
    return (await world.http.put("/api/v1/limits", json=TENANT | limits)).status_code


@on_loop
async def test_limits_are_set_shown_and_removed(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        key, mine = await world.tenant_key("acme")
        _, other = await world.tenant_key("birch")
        assert await put(world, requests_per_minute=60, budget_day_usd="1.5") == 200
        assert await put(world, scope="key", subject=key.id, concurrency=2) == 200
        (of_key, of_tenant) = (await world.http.get("/api/v1/limits", headers=mine)).json()["data"]
        assert (of_key["subject"], of_key["concurrency"], of_key["budgets"]) == (key.id, 2, [])
        (budget,) = of_tenant["budgets"]
        assert (budget["window"], budget["usd"], budget["spent_usd"]) == ("day", "1.500000000", None)
        assert (await world.http.get("/api/v1/limits", headers=other)).json()["data"] == []
        not_mine = await world.http.put("/api/v1/limits", json=TENANT | {"concurrency": 1}, headers=mine)
        assert not_mine.status_code == 403
        since = world.control.desired.state.limits[1].budgets[0].since_ms
        world.clock.ahead_ms += 1_000
        assert await put(world, budget_day_usd="9", budget_total_usd="20") == 200
        day, total = world.control.desired.state.limits[1].budgets
        assert (day.nano_usd, day.since_ms, total.nano_usd) == (9_000_000_000, since, 20_000_000_000)
        assert total.since_ms >= since + 1_000, "a budget that stays keeps its beginning, a new one has its own"
        assert (await world.http.delete("/api/v1/limits", params=TENANT)).status_code == 200
        assert (await world.http.delete("/api/v1/limits", params=TENANT)).status_code == 404
        assert (await world.http.delete("/api/v1/tenants/acme")).status_code == 200
        assert world.control.desired.state.limits == (), "a tenant's keys go with it, and their limits"


@on_loop
async def test_bad_limits_are_refused_by_name(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.tenant_key("acme")
        for body, status, param in (
            ({"subject": "nobody", "concurrency": 1}, 404, "subject"),
            ({"scope": "galaxy"}, 400, "scope"),
            ({"scope": "key", "subject": world.admin_key.id, "concurrency": 1}, 404, "subject"),
            ({"concurrency": 0}, 400, "concurrency"),
            ({"tokens_per_minute": -1}, 400, "tokens_per_minute"),
            ({"budget_day_usd": "-1"}, 400, "budget_day_usd"),
            ({"budget_month_usd": "NaN"}, 400, "budget_month_usd"),
            ({"budget_total_usd": "0.0000000001"}, 400, "budget_total_usd"),
            ({}, 400, "requests_per_minute"),
        ):
            answer = await world.http.put("/api/v1/limits", json=TENANT | body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.json()
        assert (await world.http.delete("/api/v1/limits", params={"scope": "x", "subject": "y"})).status_code == 400


class Ledger:
    """What billing would say: what was settled, by gateway, of every budget there is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.by_gateway: dict[str, int] = {}
        self.closed: set[str] = set()

    def spent(self) -> Spent:
        wanted = spendings(self.world.control.desired.state.limits, self.world.clock.now_ms())
        known: dict[Spending, dict[str, int]] = {of: dict(self.by_gateway) for of in wanted}
        return Spent(known, frozenset(self.closed), frozenset({"g1", "g2"} - self.closed))


async def gateway(world: World, name: str) -> tuple[GatewayLoop, "asyncio.Task[None]"]:
    loop = GatewayLoop(name, "local", world.listener.connect, world.clock, GatewayLimits(), Metrics())
    running_ = asyncio.create_task(loop.run())
    await until(lambda: loop.informed, "the catalog")
    return loop, running_


def left(loop: GatewayLoop) -> int | None:
    leases = loop.limiter.gate.leases()
    return sum(lease.cap_nano_usd - lease.used_nano_usd for lease in leases) if leases else None


def take(gate: Gate, cost: int, now_ms: int) -> Hold | None:
    try:
        return gate.admit(gate.chain("k", "acme", "acme/chat"), Demand(1, 1, cost), now_ms)
    except Refusal as refusal:
        if refusal.code != "insufficient_quota":
            raise
        return None


@on_loop
async def test_two_gateways_spend_a_budget_to_its_end_and_not_beyond(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        ledger = Ledger(world)
        world.control.budgets.spent = ledger.spent
        await world.control.budgets.priced([price(input_nano_usd=1)])
        await world.control.desired.change(lambda _: Change(put=(Tenant("acme", 1),)))
        loops = [await gateway(world, name) for name in ("g1", "g2")]
        (one, _), (two, ending) = loops
        assert await put(world, budget_total_usd="0.000001") == 200
        await until(lambda: (left(one), left(two)) == (500, 500), "equal parts")
        now_ms = world.clock.now_ms()

        holds = [take(loop.limiter.gate, 30, now_ms) for loop in (one, two) for _ in range(40)]
        granted = [hold for hold in holds if hold is not None]
        assert len(granted) == 2 * (500 // 30), "as many as fit into what each was leased"
        for loop, hold in zip([one] * 16 + [two] * 16, granted, strict=True):
            loop.settled(hold, usage("r", input_tokens=10, output_tokens=0, arrived_ms=now_ms))
        await until(lambda: (left(one) or 0) + (left(two) or 0) == 1_000 - 320, "what was not used is free again")

        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        await until(lambda: world.control.loop.gateways == ("g1",), "one gateway")
        assert left(one) == 340, "what the dead one held is not leased again yet"
        ledger.by_gateway["g2"], ledger.closed = 160, {"g2"}
        await until(lambda: left(one) == 1_000 - 320, "its journal is in the ledger: the rest is free")
        assert take(one.limiter.gate, 681, now_ms) is None
        assert take(one.limiter.gate, 680, now_ms) is not None
        assert LEASE_MS >= 60_000
        loops[0][1].cancel()
        await asyncio.gather(loops[0][1], return_exceptions=True)
