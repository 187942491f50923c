"""A period rated again through the API: dated now, once, undone once; finished invoices stay what they were."""

from pathlib import Path

import pytest

from tests.billing.test_api import PRICE, Client
from tests.billing.world import World
from tests.loop import on_loop
from tests.money import DECEMBER_MS, NOVEMBER_MS, usage

PERIOD = {"period": "2026-11"}
RETRO = PRICE | {"output_usd_per_million": "1", "effective": str(NOVEMBER_MS), "retroactive": True}


@pytest.fixture
def client(tmp_path: Path) -> Client:
    made = Client(World(tmp_path))
    made.world.clock.at_ms = DECEMBER_MS + 5
    return made


async def owed_in_november(client: Client) -> tuple[object, object]:
    """Not the lines that compare with other modes: those are by the price book as it stands."""
    invoice = (await client.get("invoices/acme", period="2026-11", as_of=str(DECEMBER_MS))).json()
    return invoice["lines"], invoice["total_nano_usd"]


@on_loop
async def test_a_rerate_is_posted_once_and_undone_once(client: Client) -> None:
    await client.world.write(usage("a"), usage("b", tenant="birch"), usage("c", outcome="refused"))
    november = await owed_in_november(client)
    assert (await client.post("prices", RETRO)).status_code == 201
    assert await owed_in_november(client) == november
    dry = (await client.post("prices/rerates", PERIOD | {"id": "r1", "dry_run": True})).json()
    assert (await client.get("prices/rerates")).json()["data"] == []
    report = (await client.post("prices/rerates", PERIOD | {"id": "r1"})).json()
    assert report == dry | {"dry_run": False}
    assert (report["requests"], report["changed"], report["difference_nano_usd"]) == (2, 2, 2 * 5 * 200)
    again = (await client.post("prices/rerates", PERIOD | {"id": "r1"})).json()
    assert again["adjustments"] == report["adjustments"]
    assert client.world.ledger.balances()["tenant/acme"] == 7_000
    client.world.clock.at_ms += 1
    invoice = (await client.get("invoices/acme", period="2026-12")).json()
    assert {line["item"]: line["nano_usd"] for line in invoice["lines"]} == {"rerate_reversal": -6_000, "rerate": 7_000}
    assert await owed_in_november(client) == november
    overlapping = await client.post("prices/rerates", {"from": str(NOVEMBER_MS + 1), "to": str(DECEMBER_MS)})
    assert (overlapping.status_code, "undo" in overlapping.json()["message"]) == (409, True)
    for _ in range(2):
        assert (await client.post("prices/rerates/r1/undo", None)).json()["undone"] is not None
    assert client.world.ledger.balances()["tenant/acme"] == 6_000
    assert sum(client.world.ledger.balances().values()) == 0
    assert (await client.post("prices/rerates", PERIOD | {"id": "r2"})).status_code == 201


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"period": "2026-12"}, 400, "to"),
        ({"period": "November"}, 400, "period"),
        ({"from": str(DECEMBER_MS), "to": str(NOVEMBER_MS)}, 400, "from"),
        ({"period": "2026-11", "why": 1}, 400, "why"),
    ],
)
@on_loop
async def test_bad_periods_are_refused(client: Client, body: dict[str, object], status: int, param: str) -> None:
    answer = await client.post("prices/rerates", body)
    assert (answer.status_code, answer.json()["param"]) == (status, param)
    assert (await client.post("prices/rerates", PERIOD, "acme")).status_code == 403
    assert (await client.post("prices/rerates/none/undo", None)).status_code == 404


@on_loop
async def test_an_id_names_one_period(client: Client) -> None:
    assert (await client.post("prices/rerates", PERIOD | {"id": "r"})).status_code == 201
    assert (await client.post("prices/rerates", {"period": "2026-10", "id": "r"})).status_code == 409
