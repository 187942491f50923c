"""Contracts, adjustments and alerts on SQLite and PostgreSQL, and limits in desired state."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from tests.money import NOVEMBER_MS, page, price, usage
from tests.stores.test_ledger import empty
from tidegate.domain.contract import Alert, Contract, Drawn
from tidegate.domain.errors import StoreFault
from tidegate.domain.ledger import Adjustment, Entry
from tidegate.domain.limits import Budget, Limits, Scope, Spending, Window
from tidegate.domain.ports import Change, Cursor
from tidegate.money.drawdown import Commitments, purchase, with_drawdown, worth
from tidegate.money.rating import rate
from tidegate.stores.contracts import SqlContracts
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.state import SqlStateStore

CONTRACT = Contract("c", "acme", 100, 999, NOVEMBER_MS, NOVEMBER_MS + 1_000, NOVEMBER_MS, models=("m@1",))
START = Cursor("boot-1", 1, 0)


def test_contracts_are_kept_whole_and_bought_once(sql_engine: Engine) -> None:
    store = SqlContracts(sql_engine)
    for _ in range(2):
        store.add(CONTRACT, purchase(CONTRACT))
    assert store.all() == [(CONTRACT, Drawn())]
    assert SqlLedger(sql_engine).balances() == {"tenant/acme": 999, "commitment/c": -999}


def test_a_page_moves_usage_and_commitment_together_or_not_at_all(sql_engine: Engine) -> None:
    store, ledger = SqlContracts(sql_engine), SqlLedger(sql_engine)
    store.add(CONTRACT, purchase(CONTRACT))
    commitments = Commitments(store.all())
    record = usage("a")
    rated = with_drawdown(record, commitments.cover(record, commitments.concern(record)), price())
    drawing = replace(page(START, record), final=(rated,), drawn=commitments.changes())
    ledger.post(drawing)
    assert store.all() == [(CONTRACT, Drawn(used=15))]
    again = replace(drawing, start=drawing.next, next=Cursor("boot-1", 1, 9))
    with pytest.raises(StoreFault, match="another process"):
        ledger.post(again)
    fresh = replace(page(drawing.next, usage("b")), drawn={"c": (Drawn(), Drawn(used=9))})
    with pytest.raises(StoreFault, match="another process draws"):
        ledger.post(fresh)
    assert (ledger.known(["a", "b"]), store.all()) == ({"a"}, [(CONTRACT, Drawn(used=15))])
    assert ledger.cursor("boot-1") == drawing.next
    assert ledger.sums(0, 10**14, hourly=True) == ledger.fold(0, 10**14)
    assert sum(ledger.balances().values()) == 0


def test_adjustments_are_posted_once_and_read_back(sql_engine: Engine) -> None:
    store = SqlContracts(sql_engine)
    credit = Adjustment("credit/1", "credit", "", "acme", 5, (Entry("credits", 0, 7), Entry("tenant/acme", 0, -7)))
    other = replace(credit, id="credit/2", at_ms=6, note="again")
    assert [store.adjust([credit]), store.adjust([credit, other]), store.adjust([])] == [1, 1, 0]
    assert store.adjustments(0, 10) == [credit, other]
    assert store.adjustments(6, 10, "acme") == [other]
    assert store.adjustments(0, 10, "birch") == []


def test_alerts_are_made_once_and_end(sql_engine: Engine) -> None:
    store = SqlContracts(sql_engine)
    store.cross("c", [50], 3)
    store.cross("c", [50, 80], 4)
    fifty, eighty = store.alerts()
    assert (fifty, eighty) == (Alert("c", 50, 3, 0, 3), Alert("c", 80, 4, 0, 4))
    store.alerted(replace(fifty, attempts=1, ended_ms=9, outcome="status 200"))
    assert store.alerts() == [eighty]
    assert [alert.percent for alert in store.alerts("c")] == [50, 80]


def test_what_was_spent_is_split_by_gateway_and_instant(sql_engine: Engine) -> None:
    ledger = SqlLedger(sql_engine)
    since = NOVEMBER_MS + 10
    ledger.post(page(START, usage("a"), usage("b", arrived_ms=since), usage("c", arrived_ms=since, gateway="boot-2")))
    ledger.post(page(Cursor("x", 1, 0), usage("d", arrived_ms=since, tenant="birch")))
    of = Spending(Scope.TENANT, "acme", Window.MONTH, since, NOVEMBER_MS)
    assert ledger.spent(of, NOVEMBER_MS + 10**9, ["boot-1"]) == {"boot-1": 6_000, "": 12_000}
    assert ledger.spent(of, NOVEMBER_MS + 10**9, []) == {"": 18_000}
    assert ledger.spent(of._replace(scope=Scope.KEY, subject="key-1"), NOVEMBER_MS + 10**9, []) == {"": 24_000}
    assert ledger.spent(of._replace(scope=Scope.ENDPOINT, subject="acme/none"), NOVEMBER_MS + 10**9, []) == {"": 0}


def test_limits_are_desired_state(sql_engine: Engine) -> None:
    store = SqlStateStore(sql_engine)
    rule = Limits(Scope.KEY, "key-1", requests_per_minute=3, budgets=(Budget(Window.DAY, 7, 5),))
    version = store.load().version
    state = store.commit(version, Change(put=(rule,)))
    assert state.limits == (rule,) == SqlStateStore(sql_engine).load().limits
    other = replace(rule, concurrency=9)
    assert store.commit(state.version, Change(put=(other,))).limits == (other,) == store.load().limits
    gone = store.commit(state.version + 1, Change(remove_limits=((Scope.KEY, "key-1"),)))
    assert gone.limits == () == SqlStateStore(sql_engine).load().limits


_REQUEST = st.tuples(st.integers(0, 30), st.integers(10, 60), st.integers(0, 40), st.sampled_from(["acme", "birch"]))
_USED = st.lists(_REQUEST, max_size=40)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_USED, st.integers(1, 9), st.integers(0, 10**9))
def test_commitments_in_the_ledger_are_what_adding_up_by_hand_gives(
    sql_engine: Engine, used: list[tuple[int, int, int, str]], page_records: int, price_nano_usd: int
) -> None:
    empty(sql_engine)
    store, ledger, cursor = SqlContracts(sql_engine), SqlLedger(sql_engine), START
    bought = [
        replace(CONTRACT, id=f"c{n}", tokens=tokens, price_nano_usd=price_nano_usd, models=(), expires_ms=10**14)
        for n, tokens in enumerate((7, 300, 400))
    ]
    for contract in bought:
        store.add(contract, purchase(contract))
    everything: dict[str, int] = {}
    for at in range(0, len(used), page_records):
        records = {
            f"r{n}": usage(f"r{n}", input_tokens=i, output_tokens=o, tenant=tenant)
            for n, i, o, tenant in used[at : at + page_records]
        }
        commitments, rated = Commitments(store.all()), []
        known = set(ledger.known(records))
        for record in records.values():
            concerned = [] if record.id in known else commitments.concern(record)
            taken = commitments.cover(record, concerned)
            rated.append(with_drawdown(record, taken, price()) if taken else rate(record, price()))
            if record.id not in known and record.tenant == "acme":
                everything[record.id] = record.input_tokens + record.output_tokens
        step = replace(page(cursor, *records.values()), final=tuple(rated), drawn=commitments.changes())
        ledger.post(step)
        cursor = step.next
    drawn = {contract.id: state for contract, state in store.all()}
    assert sum(state.used for state in drawn.values()) == min(707, sum(everything.values()))
    balances = ledger.balances()
    assert sum(balances.values()) == 0
    for contract in bought:
        left = contract.price_nano_usd - worth(contract, drawn[contract.id].used)
        assert balances.get(f"commitment/{contract.id}", 0) == -left
    cells = ledger.sums(0, 10**14, hourly=True)
    assert cells == ledger.fold(0, 10**14)
    assert sum(cell.drawn_tokens for _, cell in cells) == sum(state.used for state in drawn.values())
    assert sum(cell.drawn_nano_usd for _, cell in cells) == -balances.get("revenue/drawdown", 0)
