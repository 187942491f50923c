"""Usage and invoices: what the ledger says, line by line, and the same every time."""

import csv
import io
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.billing.world import CHAT, GOLD, World
from tests.loop import on_loop
from tests.money import DECEMBER_MS, HOUR_MS, NOVEMBER_MS, page, price, usage
from tidegate.billing.invoice_csv import as_csv
from tidegate.billing.invoice_page import as_html
from tidegate.billing.periods import Period, iso, parse_instant, parse_period
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import UsageGroup
from tidegate.domain.ports import Cursor
from tidegate.domain.replica import ReplicaState
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.money.prices import PriceTable

NOVEMBER = Period(NOVEMBER_MS, DECEMBER_MS)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def _mixed(world: World) -> None:
    world.facts = {"acme/chat": CHAT, "birch/x": GOLD}
    await world.write(
        usage("a", cached_tokens=4),
        usage("b", key="key-2", arrived_ms=NOVEMBER_MS + HOUR_MS),
        usage("c", outcome=Outcome.REFUSED, input_tokens=0, output_tokens=0),
        usage("d", tenant="birch", endpoint="birch/x", model="n@2", key="key-3"),
        usage("e", tenant="birch", endpoint="birch/x", model="n@2", key="key-3", mode="batch", input_tokens=3),
        usage("f", arrived_ms=DECEMBER_MS),
    )
    await world.billing.drain()


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        (UsageGroup.ENDPOINT, ["acme/chat", "birch/x"]),
        (UsageGroup.MODEL, ["m@1", "n@2"]),
        (UsageGroup.TENANT, ["acme", "birch"]),
        (UsageGroup.MODE, ["batch", "dedicated_serverless"]),
        (UsageGroup.HOUR, ["2026-11-01T00:00:00.000Z", "2026-11-01T01:00:00.000Z"]),
        (UsageGroup.KEY, ["key-1", "key-2", "key-3"]),
    ],
)
def test_usage_by_every_group_adds_up_to_the_same_total(world: World, by: UsageGroup, groups: list[str]) -> None:
    @on_loop
    async def fill() -> None:
        await _mixed(world)

    fill()
    report = world.billing.statements.usage(NOVEMBER, by, None)
    assert [row.group for row in report.rows] == groups
    total = report.total
    assert (total.requests, total.billed_requests, total.refused_requests) == (5, 4, 1)
    assert (total.input_tokens, total.cached_tokens, total.output_tokens) == (33, 4, 20)
    assert total.nano_usd == (6 * 200 + 4 * 20 + 4_000) + 6_000 + 6_000 + (600 + 4_000) // 2
    for name in ("requests", "billed_requests", "refused_requests", "input_tokens", "output_tokens", "nano_usd"):
        assert sum(getattr(row, name) for row in report.rows) == getattr(total, name), name


@on_loop
async def test_an_invoice_line_by_line(world: World) -> None:
    await _mixed(world)
    invoice = world.billing.statements.invoice("birch", NOVEMBER, NOVEMBER_MS + 10 * HOUR_MS)
    assert [(x.endpoint, x.mode, x.item, x.quantity, x.unit_usd, x.usd) for x in invoice.lines] == [
        ("birch/x", "batch", "input_tokens", 3, "0.1", "0.000000300"),
        ("birch/x", "batch", "output_tokens", 5, "0.4", "0.000002000"),
        ("birch/x", "dedicated_serverless", "input_tokens", 10, "0.2", "0.000002000"),
        ("birch/x", "dedicated_serverless", "output_tokens", 5, "0.8", "0.000004000"),
    ]
    assert (invoice.total_nano_usd, invoice.total_usd) == (8_300, "0.000008300")
    (dedicated,) = invoice.dedicated
    assert (dedicated.endpoint, dedicated.accelerator_ms) == ("birch/x", 2 * 10 * HOUR_MS)
    assert dedicated.nano_usd == invoice.dedicated_total_nano_usd == 20 * 3_600_000_000
    assert invoice.saved_nano_usd == 20 * 3_600_000_000 - 8_300
    assert (invoice.finished, invoice.as_of_ms) == (False, NOVEMBER_MS + 10 * HOUR_MS)


@on_loop
async def test_a_price_change_within_the_period_makes_two_lines_each_at_its_price(world: World) -> None:
    world.prices.add(price(effective_ms=NOVEMBER_MS + HOUR_MS, input_nano_usd=300, accelerator_hour_nano_usd=0))
    await _mixed(world)
    invoice = world.billing.statements.invoice("acme", NOVEMBER, NOVEMBER_MS + 10 * HOUR_MS)
    inputs = [(x.price_version, x.quantity, x.unit_usd) for x in invoice.lines if x.item == "input_tokens"]
    assert inputs == [(1, 6, "0.2"), (2, 10, "0.3")]
    assert [line.nano_usd for line in invoice.dedicated] == [3_600_000_000], "the dearer hour only"


@on_loop
async def test_a_finished_invoice_is_the_same_to_the_byte_whatever_comes_later(world: World) -> None:
    await _mixed(world)

    def made() -> bytes:
        invoice = world.billing.statements.invoice("acme", NOVEMBER, world.clock.now_ms())
        assert invoice.finished
        return msgspec.json.encode(invoice)

    world.clock.at_ms = DECEMBER_MS + 1
    first = made()
    world.prices.add(price(effective_ms=DECEMBER_MS + 5, input_nano_usd=9))
    world.facts = {}
    world.clock.at_ms = DECEMBER_MS + 40 * HOUR_MS
    await world.write(usage("late", arrived_ms=DECEMBER_MS + 9), boot="boot-9")
    await world.billing.drain()
    assert made() == first


@on_loop
async def test_invoices_of_everybody_add_up_to_the_ledger(world: World) -> None:
    await _mixed(world)
    world.facts = {"acme/chat": CHAT, "birch/x": GOLD, "cedar/own": CHAT}
    world.clock.at_ms += HOUR_MS
    await world.billing.drain()
    statements = world.billing.statements
    ever = Period(0, DECEMBER_MS + HOUR_MS)
    invoices = statements.invoices(ever, ever.end_ms)
    assert [invoice.tenant for invoice in invoices] == ["acme", "birch", "cedar"]
    balances = {view.account: view.nano_usd for view in statements.balances()}
    for invoice in invoices:
        assert invoice.total_nano_usd == balances.get(f"tenant/{invoice.tenant}", 0)
        assert invoice == statements.invoice(invoice.tenant, ever, ever.end_ms)
    assert sum(balances.values()) == 0


@on_loop
async def test_dedicated_endpoints_pay_for_time_and_save_nothing(world: World) -> None:
    world.facts = {"birch/x": replace(GOLD, mode="dedicated")}
    world.node_joins(NOVEMBER_MS)
    world.replica(NOVEMBER_MS, "birch/x", "dedicated", ReplicaState.READY)
    await world.write(usage("a", tenant="birch", endpoint="birch/x", mode="dedicated"))
    await world.billing.drain()
    invoice = world.billing.statements.invoice("birch", NOVEMBER, world.clock.now_ms())
    (line,) = invoice.lines
    assert (line.item, line.quantity, line.unit_usd) == ("accelerator_hours", 2 * 10 * HOUR_MS, "3.6")
    assert invoice.total_nano_usd == invoice.dedicated_total_nano_usd == 20 * 3_600_000_000
    assert invoice.saved_nano_usd == 0


@on_loop
async def test_the_same_traffic_in_every_mode_at_the_price_that_mode_had_when_it_came(world: World) -> None:
    """Half of it before the price of `serverless` rose; the mode the endpoint is in costs what was charged."""
    world.prices.add(price(plan="", mode="serverless", effective_ms=NOVEMBER_MS + HOUR_MS + 5, output_nano_usd=1_000))
    early, late = NOVEMBER_MS + HOUR_MS + 4, NOVEMBER_MS + HOUR_MS + 5
    await world.write(
        usage("a", arrived_ms=early, cached_tokens=4), usage("b", arrived_ms=late), usage("c", outcome=Outcome.REFUSED)
    )
    await world.billing.drain()
    invoice = world.billing.statements.invoice("acme", NOVEMBER, NOVEMBER_MS + 10 * HOUR_MS)
    same = {line.mode: line.nano_usd for line in invoice.same_traffic}
    per_token = (6 + 10) * 200 + 4 * 20 + 10 * 800
    assert same["dedicated_serverless"] == per_token == invoice.total_nano_usd
    assert same["serverless"] == per_token + 5 * 200
    assert same["batch"] == per_token // 2
    assert same["dedicated"] == 10 * 3_600_000_000
    assert {line.mode: line.nano_usd for line in invoice.same_traffic_totals} == same


@on_loop
async def test_csv_and_page_show_every_line_exactly_and_the_same_bytes_each_time(world: World) -> None:
    await _mixed(world)
    world.facts = {"acme/<b>&chat": CHAT}
    await world.billing.drain()
    invoices = world.billing.statements.invoices(NOVEMBER, NOVEMBER_MS + 10 * HOUR_MS)
    text = as_csv(invoices)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for invoice in invoices:
        mine = [row for row in rows if row["tenant"] == invoice.tenant]
        charges = [Decimal(row["usd"]) for row in mine if row["section"] == "charge"]
        assert sum(charges) == Decimal(invoice.total_usd)
        priced = [row for row in mine if row["unit_quantity"]]
        assert priced
        for row in priced:
            worth = Decimal(row["quantity"]) * Decimal(row["unit_usd"]) / Decimal(row["unit_quantity"])
            assert abs(worth - Decimal(row["usd"])) < Decimal("0.00000001"), row
        assert [row["usd"] for row in mine if row["section"] == "total"] == [invoice.total_usd]
        would = {row["mode"]: row["usd"] for row in mine if row["section"] == "same_traffic_total"}
        assert would == {line.mode: line.usd for line in invoice.same_traffic_totals}
    page = as_html(invoices)
    assert "acme/&lt;b&gt;&amp;chat" in page
    assert "<b>" not in page
    assert page.count("<section>") == len(invoices) == 2
    assert not re.search(r"(src|href)=|@import|url\(", page), "self-contained"
    for invoice in invoices:
        shown = re.sub(r"</?i( class=z)?>", "", page)
        assert all(usd_text(line.usd) in shown for line in invoice.lines), "exact to the last digit"
    again = world.billing.statements.invoices(NOVEMBER, NOVEMBER_MS + 10 * HOUR_MS)
    assert (as_csv(again), as_html(again)) == (text, page)


def usd_text(usd: str) -> str:
    """``0.001234500`` → ``0.0012345``: what of it a page must show."""
    whole, _, fraction = usd.partition(".")
    return f"{int(whole):,}.{fraction.rstrip('0').ljust(2, '0')}"


_SOME = st.builds(
    usage,
    st.integers(0, 10**6).map(str),
    endpoint=st.sampled_from(["acme/chat", "acme/two"]),
    mode=st.sampled_from(["serverless", "batch", "dedicated_serverless"]),
    input_tokens=st.integers(2, 500),
    cached_tokens=st.integers(0, 2),
    output_tokens=st.integers(0, 500),
    arrived_ms=st.integers(NOVEMBER_MS, NOVEMBER_MS + 3 * HOUR_MS),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_SOME, max_size=12, unique_by=lambda record: record.id))
def test_invoice_lines_total_the_entries(tmp_path_factory: pytest.TempPathFactory, records: list[UsageRecord]) -> None:
    world = World(tmp_path_factory.mktemp("invoice"))
    world.prices.add(price(effective_ms=NOVEMBER_MS + 5_000_000, input_nano_usd=7, batch_percent=33))
    prices = PriceTable(world.prices.versions())
    world.ledger.post(page(Cursor("boot-1", 1, 0), *records, prices=prices))
    invoice = world.billing.statements.invoice("acme", NOVEMBER, DECEMBER_MS)
    assert invoice.total_nano_usd == sum(line.nano_usd for line in invoice.lines)
    assert invoice.total_nano_usd == world.ledger.balances().get("tenant/acme", 0)
    batch_as_such = {line.endpoint: line.nano_usd for line in invoice.same_traffic if line.mode == "batch"}
    assert set(batch_as_such) == {record.endpoint for record in records}
    for line in invoice.lines:
        if line.mode != "batch":
            assert line.nano_usd * 10**6 == line.quantity * round(float(line.unit_usd) * 10**9)
    usage_total = world.billing.statements.usage(NOVEMBER, UsageGroup.KEY, "acme").total
    assert usage_total.nano_usd == invoice.total_nano_usd
    assert usage_total.requests == len(records)


# --- periods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("month", "start", "end", "expected"),
    [
        ("2026-11", None, None, NOVEMBER),
        (None, None, None, NOVEMBER),
        ("2026-12", None, None, Period(DECEMBER_MS, DECEMBER_MS + 31 * 24 * HOUR_MS)),
        (None, "2026-11-01", "2026-12-01", NOVEMBER),
        (None, "2026-11-01T00:00:00Z", "2026-12-01T01:00:00+01:00", NOVEMBER),
        (None, str(NOVEMBER_MS), str(DECEMBER_MS), NOVEMBER),
        (None, "2026-11-01", None, Period(NOVEMBER_MS, NOVEMBER_MS + 5)),
    ],
)
def test_periods(month: str | None, start: str | None, end: str | None, expected: Period) -> None:
    assert parse_period(month, start, end, NOVEMBER_MS + 5) == expected


@pytest.mark.parametrize(
    ("month", "start", "end", "param"),
    [
        ("2026-13", None, None, "period"),
        ("november", None, None, "period"),
        ("9999-12", None, None, "period"),
        ("2026-11", "2026-11-01", None, "period"),
        (None, None, "2026-11-01", "from"),
        (None, "2026-12-01", "2026-11-01", "from"),
        (None, "2026-11-01", "2026-11-01", "from"),
        (None, "yesterday", None, "from"),
        (None, "2026-02-30", None, "from"),
        (None, "1e12", None, "from"),
        (None, "NaN", None, "from"),
        (None, "9" * 400, None, "from"),
        (None, "2026-11-01", "-5", "to"),
        (None, "1960-01-01", None, "from"),
    ],
)
def test_periods_that_are_none_are_refused_by_name(
    month: str | None, start: str | None, end: str | None, param: str
) -> None:
    with pytest.raises(Refusal) as refused:
        parse_period(month, start, end, NOVEMBER_MS)
    assert (refused.value.code, refused.value.param) == ("invalid_request", param)


@given(st.integers(0, 253_402_300_799_000))
def test_instants_are_shown_as_they_are_read(at_ms: int) -> None:
    assert parse_instant("from", iso(at_ms)) == at_ms
