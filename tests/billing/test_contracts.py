"""Contracts on the real ledger: drawn down with the rating, once; bought, lapsed, alerted, shown, billed."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.billing.test_api import PRICE, Client
from tests.billing.world import World
from tests.loop import on_loop
from tests.money import DECEMBER_MS, HOUR_MS, NOVEMBER_MS, usage
from tidegate.billing.commitments import Alerts
from tidegate.domain.contract import Contract, Drawn
from tidegate.domain.errors import Refusal, StoreFault
from tidegate.domain.limits import Budget, Limits, Scope, Spending, Window
from tidegate.domain.ports import Cursor
from tidegate.money.drawdown import GRACE_MS, purchase
from tidegate.wire import webhooks

SECRET = "whsec_" + "c2VjcmV0IHNlY3JldCBzZWNyZXQh"
CONTRACT = Contract("c", "acme", 100, 1_000_000, NOVEMBER_MS, NOVEMBER_MS + 24 * HOUR_MS, NOVEMBER_MS,
                    alert_url="http://127.0.0.1:1/hook", alert_secret=SECRET)  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def drawn(world: World) -> Drawn:
    return dict(world.contracts.all())[CONTRACT]


@on_loop
async def test_usage_draws_down_once_whatever_is_read_twice(world: World) -> None:
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    await world.write(usage("a"), usage("b"))
    await world.billing.drain()
    await world.write(usage("b"), usage("c", input_tokens=60, output_tokens=40), boot="boot-2")
    await world.billing.drain()
    assert drawn(world) == Drawn(used=100)
    balances = world.ledger.balances()
    assert balances["commitment/c"] == 0
    assert balances["revenue/drawdown"] == -1_000_000
    assert balances["tenant/acme"] == 1_000_000 + 30 * 800, "thirty generated tokens were not covered"
    assert sum(balances.values()) == 0
    assert world.ledger.sums(0, 10**14, hourly=True) == world.ledger.fold(0, 10**14)


@on_loop
async def test_a_page_rated_on_an_older_picture_is_not_posted(world: World) -> None:
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    await world.write(usage("a"))
    await world.billing.drain()
    before = drawn(world)
    stale = {"c": (Drawn(), Drawn(used=5))}
    from tests.money import page

    with pytest.raises(StoreFault, match="another process draws"):
        world.ledger.post(replace(page(Cursor("boot-9", 1, 0), usage("z")), drawn=stale))
    assert drawn(world) == before
    assert not world.ledger.known(["z"])


@on_loop
async def test_what_is_unspent_lapses_and_late_requests_that_arrived_in_time_are_counted(world: World) -> None:
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    world.clock.at_ms = CONTRACT.expires_ms + GRACE_MS - 1
    await world.write(usage("a", arrived_ms=CONTRACT.expires_ms - 1))
    await world.billing.drain()
    assert drawn(world) == Drawn(used=15)
    world.clock.at_ms += 1
    for _ in range(2):
        await world.billing.drain()
    assert drawn(world) == Drawn(used=15, lapsed=85)
    assert world.ledger.balances()["revenue/expired_commitments"] == -850_000
    kinds = [(a.kind, a.quantity, a.nano_usd) for a in world.contracts.adjustments(0, 10**14)]
    assert kinds == [("purchase", 100, 1_000_000), ("lapse", 85, 0)]


@on_loop
async def test_budgets_count_what_is_charged_and_drawn_and_survive_a_restart(world: World) -> None:
    world.limits = (Limits(Scope.TENANT, "acme", budgets=(Budget(Window.MONTH, 10**9, NOVEMBER_MS),)),)
    of = Spending(Scope.TENANT, "acme", Window.MONTH, NOVEMBER_MS, NOVEMBER_MS)
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    await world.write(usage("a"))
    await world.billing.drain()
    await world.write(usage("b", input_tokens=90, output_tokens=0), usage("o", tenant="birch"), boot="boot-2")
    await world.billing.drain()
    assert world.billing.spent is not None
    spent = world.billing.spent.by_gateway[of]
    assert sum(spent.values()) == 1_000_000 + 5 * 200
    assert {"boot-1", "boot-2"} <= world.billing.spent.closed
    again = world.start_billing()
    assert again.spent is None
    await again.drain()
    assert again.spent is not None
    assert sum(again.spent.by_gateway[of].values()) == sum(spent.values())


@on_loop
async def test_a_minimum_is_of_whole_months_and_charged_once(world: World) -> None:
    days = 24 * HOUR_MS
    least = replace(CONTRACT, tokens=10, starts_ms=NOVEMBER_MS, expires_ms=DECEMBER_MS + 40 * days,
                    minimum_month_nano_usd=2_000_000)  # fmt: skip
    world.contracts.add(least, purchase(least))
    world.contracts.add(replace(least, id="late", starts_ms=NOVEMBER_MS + 1), purchase(replace(least, id="late")))
    await world.write(usage("a"))
    world.clock.at_ms = DECEMBER_MS + GRACE_MS - 1
    await world.billing.drain()
    for later_ms in (1, days, 60 * days):
        world.clock.at_ms += later_ms
        await world.billing.drain()
        await world.start_billing().drain()
    posted = [(a.reference, a.at_ms, a.nano_usd) for a in world.contracts.adjustments(0, 10**14) if a.kind == "minimum"]
    used = 1_000_000 + 5 * 800
    january_ms = DECEMBER_MS + 31 * days
    assert posted == [
        ("c", DECEMBER_MS, 2_000_000 - used),
        ("c", january_ms, 2_000_000),
        ("late", january_ms, 2_000_000),
    ]


class Receiver:
    """An HTTP server on loopback that answers with the next of `statuses` and keeps what it was sent."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.port = 0

    async def __aenter__(self) -> "Receiver":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = self.statuses.pop(0)
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
        writer.close()


@on_loop
async def test_alerts_are_signed_tried_again_and_sent_once(world: World) -> None:
    async with Receiver(500, 204, 204) as receiver, httpx.AsyncClient() as client:
        contract = replace(CONTRACT, alert_url=f"http://127.0.0.1:{receiver.port}/hook")
        world.contracts.add(contract, purchase(contract))
        await world.write(usage("a", input_tokens=50, output_tokens=0))
        await world.billing.drain()
        alerts = Alerts(world.contracts, world.clock)
        await alerts.deliver(client)
        await alerts.deliver(client)
        assert len(receiver.got) == 1, "not again before its time"
        world.clock.at_ms += 1_000
        await alerts.deliver(client)
        await world.write(usage("b", input_tokens=35, output_tokens=0), boot="boot-2")
        await world.billing.drain()
        await alerts.deliver(client)
        await alerts.deliver(client)
    first, second, third = (json.loads(body) for _, body in receiver.got)
    assert first == second
    assert [event["data"]["percent"] for event in (first, third)] == [50, 80]
    for headers, body in receiver.got:
        stamp = int(headers["webhook-timestamp"])
        expected = webhooks.headers(SECRET, headers["webhook-id"], stamp, body)["webhook-signature"]
        assert headers["webhook-signature"] == expected
    kept = [(a.percent, a.attempts, a.outcome, a.ended_ms is not None) for a in world.contracts.alerts("c")]
    assert kept == [(50, 2, "status 204", True), (80, 1, "status 204", True)]


@on_loop
async def test_nobody_listening_is_kept_with_its_reason(world: World) -> None:
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    world.contracts.cross("c", [50], NOVEMBER_MS)
    world.contracts.cross("c", [50], NOVEMBER_MS)
    alerts = Alerts(world.contracts, world.clock)
    async with httpx.AsyncClient() as client:
        for _ in range(13):
            await alerts.deliver(client)
            world.clock.at_ms += HOUR_MS
    (alert,) = world.contracts.alerts("c")
    assert (alert.attempts, alert.outcome, alert.ended_ms is not None) == (12, "ConnectError", True)


BODY = {"tenant": "acme", "tokens": 100, "price_usd": "0.001", "expires": str(NOVEMBER_MS + 48 * HOUR_MS), "id": "c"}


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(World(tmp_path))


@on_loop
async def test_contracts_are_sold_shown_and_billed(client: Client) -> None:
    made = await client.post("contracts", BODY | {"alert_url": "https://example.test/hook"})
    assert (made.status_code, made.json()["alert_secret"][:6]) == (201, "whsec_")
    again = await client.post("contracts", BODY | {"alert_url": "https://example.test/hook"})
    assert (again.status_code, again.json()["alert_secret"]) == (201, None)
    assert (await client.post("contracts", BODY | {"tokens": 7})).status_code == 409
    at = client.world.clock.at_ms
    await client.world.write(usage("a", arrived_ms=at))
    (shown,) = (await client.get("contracts", "acme")).json()["data"]
    assert (shown["state"], shown["used_tokens"], shown["left_tokens"], shown["percent_used"]) == ("active", 15, 85, 15)
    assert shown["worth_left_usd"] == "0.000850000"
    assert (await client.get("contracts", "birch")).json()["data"] == []
    assert (await client.get("contracts/c", "birch")).status_code == 404
    assert (await client.get("contracts/c")).json()["id"] == "c"
    assert (await client.post("contracts", BODY, "acme")).status_code == 403
    credit = {"tenant": "acme", "usd": "0.0004", "id": "sorry", "note": "for the outage"}
    assert (await client.post("credits", credit)).json()["nano_usd"] == -400_000
    assert (await client.post("credits", credit)).status_code == 409
    client.world.clock.at_ms += 1
    invoice = (await client.get("invoices/acme", period="2026-11")).json()
    lines = {line["item"]: (line["quantity"], line["nano_usd"]) for line in invoice["lines"]}
    assert lines == {"committed_tokens": (15, 0), "purchase": (100, 1_000_000), "credit": (0, -400_000)}
    assert invoice["total_nano_usd"] == client.world.ledger.balances()["tenant/acme"] == 600_000


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"price_usd": "-1"}, "price_usd"),
        ({"price_usd": "NaN"}, "price_usd"),
        ({"minimum_month_usd": "-1"}, "minimum_month_usd"),
        ({"tokens": 0}, "tokens"),
        ({"tenant": "nobody"}, "tenant"),
        ({"expires": "2020-01-01"}, "expires"),
        ({"starts": "2020-01-01"}, "starts"),
        ({"rollover_percent": 5}, "rollover_days"),
        ({"overage_plan": "none"}, "overage_plan"),
        ({"alert_url": "ftp://x"}, "alert_url"),
        ({"alert_secret": SECRET}, "alert_url"),
        ({"alert_url": "http://x", "alert_secret": "short"}, "alert_secret"),
        ({"modes": ["gratis"]}, "modes[0]"),
        ({"on_exhausted": "shrug"}, "on_exhausted"),
        ({"on_exhausted": "refuse", "overage_plan": "default"}, "overage_plan"),
        ({"on_exhausted": "refuse", "rollover_percent": 5, "rollover_days": 1}, "rollover_percent"),
    ],
)
@on_loop
async def test_bad_contracts_are_refused_by_name(client: Client, change: dict[str, object], param: str) -> None:
    answer = await client.post("contracts", BODY | change)
    assert (answer.status_code in (400, 404), answer.json()["param"]) == (True, param), answer.json()


@on_loop
async def test_overage_is_charged_at_its_plan(client: Client) -> None:
    assert (await client.post("prices", PRICE | {"plan": "over", "output_usd_per_million": "5"})).status_code == 201
    small = BODY | {"tokens": 10, "overage_plan": "over"}
    assert (await client.post("contracts", small)).status_code == 201
    await client.world.write(usage("a", arrived_ms=client.world.clock.at_ms))
    total = (await client.get("usage", period="2026-11")).json()["total"]
    assert total["nano_usd"] == 5 * 5_000


def test_another_contract_with_the_same_id_is_refused(world: World) -> None:
    world.contracts.add(CONTRACT, purchase(CONTRACT))
    with pytest.raises(Refusal) as refused:
        world.contracts.add(replace(CONTRACT, tokens=7), purchase(CONTRACT))
    assert refused.value.code == "conflict"


@on_loop
async def test_contracts_for_the_same_requests_agree_on_what_comes_when_they_are_used_up(client: Client) -> None:
    refusing = BODY | {"on_exhausted": "refuse"}
    made = await client.post("contracts", refusing)
    assert made.json()["contract"]["on_exhausted"] == "refuse"
    assert (await client.post("contracts", refusing)).status_code == 201, "the same call again"
    other = await client.post("contracts", BODY | {"id": "d"})
    assert (other.status_code, other.json()["param"]) == (409, "on_exhausted"), other.json()
    assert (await client.post("contracts", refusing | {"id": "e"})).status_code == 201, "more of the same"
    later = {"starts": BODY["expires"], "expires": str(NOVEMBER_MS + 96 * HOUR_MS)}
    assert (await client.post("contracts", BODY | later | {"id": "f"})).status_code == 201


@on_loop
async def test_what_refusing_contracts_have_left_is_told_by_gateway_until_they_are_over(world: World) -> None:
    contract = replace(CONTRACT, refuses=True)
    of = Spending(Scope.CONTRACT, "c", Window.TOTAL, contract.starts_ms, 0)
    world.contracts.add(contract, purchase(contract))
    await world.write(usage("a"))
    await world.billing.drain()
    assert world.billing.refusing == (contract,)
    await world.write(usage("b", gateway="boot-2"), usage("elsewhere", tenant="birch"), boot="boot-2")
    await world.billing.drain()
    spent = world.billing.spent
    assert spent is not None
    assert sum(spent.by_gateway[of].values()) == 30
    assert spent.by_gateway[of]["boot-2"] == 15
    assert world.ledger.spent(of, 10**14, ["boot-1", "boot-2"]) == {"boot-1": 15, "boot-2": 15, "": 0}
    world.clock.at_ms = contract.expires_ms
    await world.billing.drain()
    assert world.billing.refusing == ()
