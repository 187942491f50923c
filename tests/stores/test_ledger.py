"""The ledger on SQLite and PostgreSQL: each record counts once, entries balance, sums are the sums of what they sum."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.exc import OperationalError

from tests import postgres
from tests.money import HOUR_MS, NOVEMBER_MS, page, price, rated, usage
from tidegate.domain.errors import StoreFault
from tidegate.domain.ledger import (
    EndpointFacts,
    ExportRow,
    FactsSpan,
    Posted,
    RatedTime,
    StateSum,
    TimeState,
    UsageKey,
    UsageSum,
)  # fmt: skip
from tidegate.domain.money_ports import LedgerPage
from tidegate.domain.ports import Cursor
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.money.hours import rate_hour
from tidegate.money.prices import PriceTable
from tidegate.stores.database import migrate, open_database
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.ledger_rows import rollup_rows
from tidegate.stores.ledger_tables import entries, ledger_state, usage_records
from tidegate.stores.schema import metadata

START = Cursor("boot-1", 1, 0)
EVER = 10**14


def _everything(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table."""
    with engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
            for table in metadata.sorted_tables
        }


def _laws(engine: Engine) -> None:
    """What holds after every commit, whatever was posted."""
    ledger = SqlLedger(engine)
    with engine.connect() as connection:
        unbalanced = connection.execute(
            select(entries.c.transaction_id).group_by(entries.c.transaction_id).having(func.sum(entries.c.amount) != 0)
        ).all()
        folded = connection.execute(select(entries.c.account, func.sum(entries.c.amount)).group_by(entries.c.account))
        accounts = {account: int(amount) for account, amount in folded}
        numbers = connection.execute(select(func.max(usage_records.c.transaction_id))).scalar_one() or 0
        following = connection.execute(select(ledger_state.c.next_transaction)).scalar_one()
    assert unbalanced == []
    assert ledger.balances() == accounts
    assert sum(accounts.values()) == 0
    assert numbers < following
    cells = ledger.sums(0, EVER, hourly=True)
    assert cells == ledger.fold(0, EVER)
    owed = sum(amount for account, amount in accounts.items() if account.startswith("tenant/"))
    time_owed = sum(time.nano_usd for time in ledger.time_sums(0, EVER))
    assert sum(cell.total_nano_usd for _, cell in cells) + time_owed == owed


def test_the_migrated_schema_is_what_the_tables_say(sql_engine: Engine) -> None:
    with sql_engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_page_is_posted_with_its_cursor(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    assert ledger.cursor("boot-1") == START
    first = page(START, usage("a"), usage("b", tenant="birch", endpoint="birch/x", outcome=Outcome.REFUSED))
    assert ledger.post(first) == Posted(records=2, duplicates=0, unrated=0)
    assert ledger.cursor("boot-1") == first.next
    assert ledger.cursor("boot-2") == Cursor("boot-2", 1, 0)
    assert ledger.balances() == {"tenant/acme": 6_000, "revenue/input": -2_000, "revenue/output": -4_000}
    (_, refused) = ledger.sums(0, EVER)[1]
    assert refused == UsageSum(requests=1, refused_requests=1, input_tokens=10, output_tokens=5)
    _laws(sql_engine)


def test_known_ids_are_ignored_wherever_they_come_from(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    first = page(START, usage("a"), usage("b"))
    ledger.post(first)
    again = page(first.next, usage("b", output_tokens=999), usage("c"))
    assert ledger.post(again) == Posted(records=1, duplicates=1, unrated=0)
    other = page(Cursor("boot-2", 1, 0), usage("a"), usage("c"))
    assert ledger.post(other) == Posted(records=0, duplicates=2, unrated=0)
    assert ledger.balances()["tenant/acme"] == 18_000
    _laws(sql_engine)


def test_a_page_read_from_elsewhere_than_the_cursor_is_not_posted(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    first = page(START, usage("a"))
    ledger.post(first)
    before = _everything(sql_engine)
    with pytest.raises(StoreFault, match="another process"):
        ledger.post(page(START, usage("b")))
    assert _everything(sql_engine) == before


def test_what_another_endpoint_served_is_summed_by_why_and_what_it_cost(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    away = {"endpoint": "acme/pool", "overflow_from": "acme/chat", "overflow_reason": "concurrency"}
    ledger.post(page(START, usage("a"), usage("b", **away), usage("c", **away), usage("d", arrived_ms=5, **away)))
    (found,) = ledger.overflow_sums(6, EVER, "acme")
    assert (found.called, found.endpoint, found.reason) == ("acme/chat", "acme/pool", "concurrency")
    assert (found.requests, found.nano_usd) == (2, 12_000)
    assert ledger.overflow_sums(0, EVER)[0].requests == 3
    assert ledger.overflow_sums(0, EVER, "birch") == []


def test_usage_without_a_price_is_kept_and_counted(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    posted = ledger.post(page(START, usage("a"), usage("b", outcome=Outcome.REFUSED), prices=PriceTable([])))
    assert posted == Posted(records=2, duplicates=0, unrated=1)
    (key, cell), *_ = ledger.sums(0, EVER)
    assert (key.price_version, cell.requests, cell.billed_requests, cell.input_tokens) == (0, 2, 0, 20)
    _laws(sql_engine)


def test_checkpoints_are_kept_until_the_end_is_known(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    a1, b1, a2 = (usage(name, outcome=Outcome.OPEN, output_tokens=n) for name, n in (("a", 1), ("b", 1), ("a", 7)))
    first = page(START, checkpoints=(a1, b1))
    ledger.post(first)
    second = page(first.next, checkpoints=(a2,))
    ledger.post(second)
    assert ledger.open_records("boot-1") == [a2, b1]
    assert ledger.open_records("boot-2") == []
    third = page(second.next, usage("a", output_tokens=9))
    ledger.post(third)
    assert ledger.open_records("boot-1") == [b1]
    ledger.post(LedgerPage(third.next, third.next, rated(usage("b", outcome=Outcome.GATEWAY_LOST, output_tokens=1))))
    late = page(third.next, checkpoints=(a1,))
    ledger.post(late)
    assert ledger.open_records("boot-1") == []
    assert ledger.balances()["revenue/output"] == -(9 + 1) * 800
    _laws(sql_engine)


class _Crash(Exception):
    """The process is gone: nothing of ours runs after it."""


@contextmanager
def _dies_at(engine: Engine, statement: int) -> Iterator[list[int]]:
    seen = [0]

    def count(*_: object) -> None:
        if seen[0] == statement:
            raise _Crash
        seen[0] += 1

    event.listen(engine, "before_cursor_execute", count)
    event.listen(engine, "commit", count)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", count)
        event.remove(engine, "commit", count)


def test_dying_between_any_two_statements_changes_nothing_and_the_page_is_posted_once(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    first = page(START, usage("a"), checkpoints=(usage("c", outcome=Outcome.OPEN),))
    ledger.post(first)
    second = page(
        first.next, usage("a"), usage("b"), usage("c", tenant="birch"), checkpoints=(usage("d", outcome=Outcome.OPEN),)
    )
    before = _everything(sql_engine)
    statement = 0
    while True:
        with _dies_at(sql_engine, statement) as seen:
            try:
                ledger.post(second)
            except _Crash:
                assert seen[0] == statement
            else:
                break
        assert _everything(sql_engine) == before, f"statement {statement} left something behind"
        statement += 1
    assert statement >= 10, "the fault must really have been injected all along the way"
    assert ledger.balances()["tenant/acme"] == 12_000
    assert ledger.cursor("boot-1") == second.next
    _laws(sql_engine)


def test_a_database_that_fails_is_a_store_fault_and_changes_nothing(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    before = _everything(sql_engine)

    def away(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "INSERT INTO balances" in statement:  # when records and entries are in
            raise OperationalError(statement, {}, OSError("connection reset"))

    event.listen(sql_engine, "before_cursor_execute", away)
    with pytest.raises(StoreFault, match="the ledger cannot be written"):
        ledger.post(page(START, usage("a")))
    event.remove(sql_engine, "before_cursor_execute", away)
    assert _everything(sql_engine) == before
    ledger.post(page(START, usage("a")))


# --- sums ---------------------------------------------------------------------------------------------------------

_RECORDS = st.builds(
    usage,
    st.integers(0, 30).map(lambda n: f"id-{n}"),
    tenant=st.sampled_from(["acme", "birch"]),
    endpoint=st.sampled_from(["acme/chat", "birch/x"]),
    key=st.sampled_from(["key-1", "key-2"]),
    mode=st.sampled_from(["serverless", "dedicated_serverless", "dedicated", "batch"]),
    outcome=st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.OPEN]),
    input_tokens=st.integers(3, 1_000),
    cached_tokens=st.integers(0, 3),
    output_tokens=st.integers(0, 1_000),
    arrived_ms=st.integers(NOVEMBER_MS, NOVEMBER_MS + 4 * HOUR_MS),
)
_LATER = price(id=2, effective_ms=NOVEMBER_MS + HOUR_MS * 3 // 2, output_nano_usd=3, minimum_nano_usd=50_000)
_PRICES = PriceTable([price(), _LATER])
_PERIODS = st.tuples(st.integers(-1, 4 * HOUR_MS), st.integers(0, 4 * HOUR_MS))


def empty(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            if table.name != "state_version":
                connection.execute(table.delete())
        connection.execute(ledger_state.insert(), {"id": 1, "next_transaction": 1})


def _by_hand(records: list[UsageRecord], start_ms: int, end_ms: int) -> dict[tuple[object, ...], list[int]]:
    """Sums by tenant and price version over the records themselves: no SQL, no rollup, no ledger."""
    sums: dict[tuple[object, ...], list[int]] = {}
    for one in rated(*records, prices=_PRICES):
        if start_ms <= one.record.arrived_ms < end_ms:
            cell = sums.setdefault((one.record.tenant, one.price_version), [0, 0, 0, 0])
            owed = sum(entry.amount for entry in one.entries[:1])
            for index, value in enumerate((1, one.record.input_tokens, one.record.output_tokens, owed)):
                cell[index] += value
    return sums


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(_RECORDS, max_size=8), max_size=5), _PERIODS)
def test_sums_over_any_period_are_what_adding_up_by_hand_gives(
    sql_engine: Engine, pages: list[list[UsageRecord]], offsets: tuple[int, int]
) -> None:
    empty(sql_engine)
    ledger, cursor = SqlLedger(sql_engine), START
    posted: dict[str, UsageRecord] = {}
    for records in pages:
        unique = list({record.id: record for record in reversed(records)}.values())
        for record in unique:
            posted.setdefault(record.id, record)
        step = page(cursor, *unique, prices=_PRICES)
        ledger.post(step)
        cursor = step.next
    _laws(sql_engine)
    start_ms, end_ms = NOVEMBER_MS + offsets[0], NOVEMBER_MS + sum(offsets)
    sums: dict[tuple[object, ...], list[int]] = {}
    for key, cell in ledger.sums(start_ms, end_ms):
        assert key.hour_ms == start_ms
        found = sums.setdefault((key.tenant, key.price_version), [0, 0, 0, 0])
        for index, value in enumerate((cell.requests, cell.input_tokens, cell.output_tokens, cell.total_nano_usd)):
            found[index] += value
    assert sums == _by_hand(list(posted.values()), start_ms, end_ms)
    for tenant in ("acme", "birch"):
        alone = ledger.sums(start_ms, end_ms, tenant)
        assert alone == [found for found in ledger.sums(start_ms, end_ms) if found[0].tenant == tenant]


def test_rollup_rows_name_their_columns_in_order() -> None:
    row = rollup_rows(rated(usage("a", input_tokens=10, cached_tokens=4, output_tokens=5)))[0]
    key, cell = UsageKey(*row[:7]), UsageSum(*row[7:])
    assert key == UsageKey(NOVEMBER_MS, "acme", "key-1", "acme/chat", "m@1", "dedicated_serverless", 1)
    assert cell == UsageSum(1, 1, 0, 10, 4, 5, 6, 4, 5, 1_200, 80, 4_000)


def test_export_pages_hold_every_answered_request_once_in_order_of_arrival(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    dice = Random(7)
    records = [usage(f"r{n}", arrived_ms=NOVEMBER_MS + dice.randrange(20)) for n in range(50)]
    ledger.post(page(START, *records, usage("x", outcome=Outcome.REFUSED), usage("y", tenant="birch")))
    rows: list[ExportRow] = []
    after = (-1, 0)
    while found := ledger.export(NOVEMBER_MS, NOVEMBER_MS + 10, "acme", after, 7):
        rows += found
        after = (found[-1].arrived_ms, found[-1].number)
    expected = sorted(record.arrived_ms for record in records if record.arrived_ms < NOVEMBER_MS + 10)
    assert [row.arrived_ms for row in rows] == expected
    assert len({row.number for row in rows}) == len(rows)


# --- endpoints and accelerator time -------------------------------------------------------------------------------

FACTS = EndpointFacts(created_ms=NOVEMBER_MS, accelerators=2, price_plan="default", mode="dedicated")


def test_what_was_true_of_an_endpoint_is_remembered(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    cheap = EndpointFacts(NOVEMBER_MS, 2, "gold", "dedicated_serverless")
    for at_ms, facts in ((500, FACTS), (600, FACTS), (700, cheap), (800, None), (900, FACTS)):
        ledger.observe(NOVEMBER_MS + at_ms, {"acme/chat": facts} if facts else {})
    assert ledger.spans() == [
        FactsSpan("acme/chat", NOVEMBER_MS, FACTS),
        FactsSpan("acme/chat", NOVEMBER_MS + 700, cheap),
        FactsSpan("acme/chat", NOVEMBER_MS + 800, None),
        FactsSpan("acme/chat", NOVEMBER_MS + 900, FACTS),
    ]


def test_a_clock_that_goes_backwards_rewrites_no_history(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    ledger.observe(NOVEMBER_MS + 500, {"acme/chat": FACTS})
    ledger.observe(NOVEMBER_MS + 900, {})
    ledger.observe(NOVEMBER_MS + 100, {"acme/chat": FACTS})
    assert ledger.spans() == [
        FactsSpan("acme/chat", NOVEMBER_MS, FACTS),
        FactsSpan("acme/chat", NOVEMBER_MS + 900, FACTS),
    ]


def _dedicated_hour(hour_ms: int) -> list[RatedTime]:
    """Two accelerators that stood ready for one dedicated endpoint."""
    us = 2 * HOUR_MS * 1_000
    ready = StateSum(hour_ms, "cpu", "acme/chat", "dedicated", TimeState.IDLE, "", us, 0)
    return rate_hour(hour_ms, [ready], lambda _endpoint, _at_ms: "default", PriceTable([price()]))


def test_accelerator_time_of_an_hour_is_posted_once(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    first, second = (_dedicated_hour(NOVEMBER_MS + hour * HOUR_MS) for hour in (0, 1))
    assert (ledger.post_time(first), ledger.post_time(first + second), ledger.post_time([])) == (1, 1, 0)
    assert ledger.balances() == {"tenant/acme": 14_400_000_000, "revenue/accelerator_time": -14_400_000_000}
    assert ledger.time_posted_until() == NOVEMBER_MS + 2 * HOUR_MS
    assert [time.duration_ms for time in ledger.time_sums(NOVEMBER_MS, NOVEMBER_MS + HOUR_MS)] == [2 * HOUR_MS]
    assert ledger.time_sums(0, EVER, "birch") == []
    ledger.post(page(START, usage("a")))
    _laws(sql_engine)


# --- real processes -----------------------------------------------------------------------------------------------

_POSTER = """
import sys
from tests.money import page, usage
from tidegate.stores.database import open_database
from tidegate.stores.ledger import SqlLedger

ledger = SqlLedger(open_database(sys.argv[1]))
cursor = ledger.cursor("boot-1")
while True:
    step = page(cursor, *(usage(f"r{cursor.offset + n}") for n in range(40)))
    ledger.post(step)
    cursor = step.next
    print(cursor.offset, flush=True)
"""


@pytest.mark.e2e
def test_killed_while_posting_the_ledger_is_whole(sql_engine: Engine) -> None:
    url = sql_engine.url.render_as_string(hide_password=False)
    dice = Random(3)
    acknowledged = 0
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", _POSTER, url], stdout=subprocess.PIPE, text=True) as poster:
            assert poster.stdout is not None
            for _ in range(dice.randint(1, 12)):
                acknowledged = int(poster.stdout.readline())
            os.kill(poster.pid, signal.SIGKILL)
            poster.stdout.read()
        _wait_for_rollback(sql_engine)
        posted = SqlLedger(sql_engine).cursor("boot-1").offset
        assert posted >= acknowledged
        with sql_engine.connect() as connection:
            assert connection.execute(select(func.count()).select_from(usage_records)).scalar_one() == posted
        _laws(sql_engine)


def _wait_for_rollback(engine: Engine) -> None:
    """PostgreSQL ends the session of a killed client by itself; taking the writer's row lock waits for that."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("SELECT next_transaction FROM ledger_state FOR UPDATE"))


def test_two_writers_on_one_database_take_turns(sql_engine: Engine, tmp_path: Path) -> None:
    def post(boot: str) -> None:
        ledger, cursor = SqlLedger(sql_engine), Cursor(boot, 1, 0)
        for number in range(10):
            step = page(cursor, usage(f"{boot}-{number}"), usage(f"both-{number}"))
            ledger.post(step)
            cursor = step.next

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(post, ["a", "b", "c", "d"]))
    assert SqlLedger(sql_engine).balances()["tenant/acme"] == 50 * 6_000
    _laws(sql_engine)


@pytest.mark.e2e
def test_postgresql_crashing_while_records_are_posted_loses_and_doubles_nothing(
    postgres_server: postgres.Server,
) -> None:
    engine = open_database(postgres.new_database(postgres_server))
    migrate(engine)
    ledger, ends = SqlLedger(engine), 600

    def post_all() -> int:
        """Posts `ends` records in pages, reading where it is from the ledger again after every fault."""
        faults = 0
        while True:
            try:
                cursor = ledger.cursor("boot-1")
                while cursor.offset < ends:
                    step = page(cursor, *(usage(f"r{cursor.offset + n}") for n in range(3)))
                    ledger.post(step)
                    cursor = step.next
                return faults
            except StoreFault:
                faults += 1

    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(post_all)
        crashes = 0
        while not posting.done() and crashes < 3:
            postgres_server.crash()
            crashes += 1
        assert posting.result(timeout=120) >= 1, "a crash must have hit the posting"
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(usage_records)).scalar_one() == ends
    assert ledger.balances()["tenant/acme"] == ends * 6_000
    _laws(engine)
    engine.dispose()
