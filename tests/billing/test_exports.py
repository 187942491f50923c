"""Exports: every amount of the ledger is in them, exactly, and never as nothing."""

import csv
import io
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from tests.billing.world import World
from tests.loop import on_loop
from tests.money import DECEMBER_MS, HOUR_MS, NOVEMBER_MS, page, usage
from tidegate.billing import exports
from tidegate.billing.exports import ExportFormat, export
from tidegate.billing.focus import COLUMNS
from tidegate.billing.invoice_page import as_html
from tidegate.billing.periods import Period
from tidegate.domain.contract import Contract
from tidegate.domain.ledger import CREDITS, Adjustment, Entry, tenant_account
from tidegate.domain.ports import Cursor
from tidegate.domain.replica import ReplicaState
from tidegate.domain.usage import Outcome
from tidegate.money.drawdown import purchase
from tidegate.money.prices import PriceTable

MONTH = Period(NOVEMBER_MS, DECEMBER_MS)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def _traffic(world: World) -> None:
    world.node_joins(NOVEMBER_MS)
    world.replica(NOVEMBER_MS, "birch/own", "dedicated", ReplicaState.READY)
    await world.write(
        usage("a", arrived_ms=NOVEMBER_MS + 1_234, cached_tokens=4),
        usage("b", arrived_ms=NOVEMBER_MS + HOUR_MS, mode="batch", model='m"1'),
        usage("c", tenant="birch", key="key-2", endpoint="birch/own", mode="dedicated", arrived_ms=NOVEMBER_MS + 5),
        usage("d", outcome=Outcome.REFUSED, arrived_ms=NOVEMBER_MS + 6),
        usage("e", outcome=Outcome.CLIENT_ABORTED, output_tokens=0, arrived_ms=NOVEMBER_MS + 7),
    )
    await world.billing.drain()


def _text(world: World, form: ExportFormat, tenant: str | None = None) -> str:
    return "".join(export(world.ledger, form, MONTH, tenant))


@on_loop
async def test_focus_has_every_column_no_null_cost_and_adds_up_to_the_invoices(world: World) -> None:
    await _traffic(world)
    rows = list(csv.DictReader(io.StringIO(_text(world, ExportFormat.FOCUS), newline="")))
    assert tuple(rows[0]) == COLUMNS
    assert len(COLUMNS) == 43
    owed = {name: amount for name, amount in world.ledger.balances().items() if name.startswith("tenant/")}
    for tenant in ("acme", "birch"):
        mine = [row for row in rows if row["BillingAccountId"] == tenant]
        assert sum(Decimal(row["BilledCost"]) for row in mine) * 10**9 == owed[f"tenant/{tenant}"]
    for row in rows:
        for name in ("BilledCost", "EffectiveCost", "ListCost", "ContractedCost", "ConsumedQuantity", "ListUnitPrice"):
            assert Decimal(row[name]) >= 0
        assert row["ChargePeriodStart"] < row["ChargePeriodEnd"]
        assert Decimal(row["ListUnitPrice"]) * Decimal(row["PricingQuantity"]) == Decimal(row["ListCost"])
        assert json.loads(row["Tags"])["mode"] in row["SkuId"]
    assert {row["SkuId"] for row in rows if row["ResourceId"] == "birch/own"} == {"dedicated/accelerator_hours"}


@on_loop
async def test_what_had_no_price_is_a_row_that_costs_nothing(world: World) -> None:
    world.ledger.post(page(Cursor("boot-1", 1, 0), usage("a"), prices=PriceTable([])))
    (row,) = csv.DictReader(io.StringIO(_text(world, ExportFormat.FOCUS), newline=""))
    assert (row["BilledCost"], row["ConsumedQuantity"], row["SkuPriceId"]) == ("0.000000000", "15", "unpriced")
    (event,) = map(json.loads, _text(world, ExportFormat.CLOUDEVENTS).splitlines())
    assert event["data"]["cost_usd"] == "0.000000000"


@on_loop
async def test_events_name_each_request_once_with_its_exact_cost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "PAGE_ROWS_MAX", 2)
    await _traffic(world)
    events = [json.loads(line) for line in _text(world, ExportFormat.CLOUDEVENTS).splitlines()]
    assert [event["id"] for event in events] == ["c", "e", "a", "b"], "by arrival; a refusal is no usage"
    assert {(event["specversion"], event["source"], event["type"]) for event in events} == {
        ("1.0", "tidegate", "tidegate.request")
    }
    first = events[2]
    assert (first["subject"], first["time"]) == ("acme", "2026-11-01T00:00:01.234Z")
    assert first["data"] == {
        "endpoint": "acme/chat", "model": "m@1", "mode": "dedicated_serverless", "region": "local", "key": "key-1",
        "api": "chat", "outcome": "completed", "input_tokens": 10, "cached_tokens": 4, "output_tokens": 5,
        "total_tokens": 15, "duration_ms": 0, "price_version": 1, "cost_usd": "0.000005280", "currency": "USD",
    }  # fmt: skip
    assert [event["data"]["cost_usd"] for event in events] == [
        "0.000000000", "0.000000000", "0.000005280", "0.000003000"
    ]  # fmt: skip
    lago = [json.loads(line) for line in _text(world, ExportFormat.LAGO, "acme").splitlines()]
    assert [(one["transaction_id"], one["external_subscription_id"]) for one in lago] == [
        ("e", "acme"), ("a", "acme"), ("b", "acme")
    ]  # fmt: skip
    assert (lago[1]["timestamp"], lago[1]["precise_total_amount_cents"]) == ("1793491201.234", "0.0005280")


@on_loop
async def test_the_trace_is_what_simulate_reads(world: World) -> None:
    await _traffic(world)
    assert _text(world, ExportFormat.CSV, "acme") == (
        "t_s,endpoint,input_tokens,output_tokens\n0.007,acme/chat,10,0\n1.234,acme/chat,10,5\n3600.000,acme/chat,10,5\n"
    )


@on_loop
async def test_focus_and_the_printed_invoice_have_purchases_credits_and_what_was_drawn(world: World) -> None:
    contract = Contract("c", "acme", 12, 600_000, NOVEMBER_MS, DECEMBER_MS, NOVEMBER_MS)
    world.contracts.add(contract, purchase(contract))
    owed, credit = Entry(tenant_account("acme"), 0, -1_000), Entry(CREDITS, 0, 1_000)
    world.contracts.adjust([Adjustment("k", "credit", "sorry", "acme", NOVEMBER_MS + 5, (owed, credit))])
    await _traffic(world)
    statements = world.billing.statements
    text = "".join(export(world.ledger, ExportFormat.FOCUS, MONTH, "acme", statements.adjustments(MONTH, "acme")))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    billed = sum(Decimal(row["BilledCost"]) for row in rows)
    assert billed * 10**9 == world.ledger.balances()["tenant/acme"]
    categories = {row["ChargeCategory"]: Decimal(row["BilledCost"]) for row in rows if row["ChargeCategory"] != "Usage"}
    assert categories == {"Purchase": Decimal("0.0006"), "Credit": Decimal("-0.000001")}
    (drawn,) = [row for row in rows if row["PricingCategory"] == "Committed"]
    assert (drawn["BilledCost"], drawn["EffectiveCost"]) == ("0.000000000", "0.000600000")
    invoice = statements.invoice("acme", MONTH, DECEMBER_MS)
    assert invoice.total_nano_usd == world.ledger.balances()["tenant/acme"]
    page = as_html([invoice])
    assert "tokens bought in advance" in page
    assert "tokens of a commitment" in page
    assert "0.0006" in re.sub("<.?i>", "", page)
