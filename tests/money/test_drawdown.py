"""Commitments: which pays, to the token and to the nano-USD; nothing evaporates."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.money import HOUR_MS, NOVEMBER_MS, price, usage
from tidegate.domain.contract import Contract, Drawn
from tidegate.domain.ledger import Adjustment, Entry, RatedUsage, commitment_account
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.money.drawdown import (
    GRACE_MS,
    Commitments,
    crossed,
    lapse,
    overage_plan,
    purchase,
    spendable,
    with_drawdown,
    worth,
)
from tidegate.money.rating import rate

DAY_MS = 24 * HOUR_MS
ENDS_MS = NOVEMBER_MS + 30 * DAY_MS


def contract(name: str = "c", **changes: object) -> Contract:
    made = Contract(name, "acme", 1_000, 10_007, NOVEMBER_MS, ENDS_MS, NOVEMBER_MS)
    return replace(made, **changes)  # type: ignore[arg-type]


def draw(commitments: Commitments, record: UsageRecord) -> RatedUsage:
    taken = commitments.cover(record, commitments.concern(record))
    return with_drawdown(record, taken, price()) if taken else rate(record, price())


def paid_by(commitments: Commitments, record: UsageRecord) -> list[tuple[str, int]]:
    return [(t.contract.id, t.tokens) for t in commitments.cover(record, commitments.concern(record))]


def test_a_covered_request_costs_its_tenant_nothing_more() -> None:
    rated = draw(Commitments([(contract(), Drawn())]), usage("a", input_tokens=600, output_tokens=100))
    assert rated.entries == (Entry("commitment/c", 700, 7_004), Entry("revenue/drawdown", 700, -7_004))
    assert rated.price_version == 1


def test_what_is_not_covered_is_charged_generated_tokens_first() -> None:
    record = usage("a", input_tokens=900, cached_tokens=300, output_tokens=500)
    rated = draw(Commitments([(contract(), Drawn())]), record)
    assert rated.entries == (
        Entry("tenant/acme", 0, 400 * 800),
        Entry("revenue/output", 400, -400 * 800),
        Entry("commitment/c", 1_000, 10_007),
        Entry("revenue/drawdown", 1_000, -10_007),
    )
    assert rated.record == record


def test_priority_then_expiry_then_age_decides_and_a_request_may_take_from_several() -> None:
    late, soon = contract("late", expires_ms=ENDS_MS + 1), contract("soon", tokens=4)
    first, old = contract("first", tokens=3, priority=1), contract("old", tokens=5, created_ms=0)
    commitments = Commitments([(c, Drawn()) for c in (late, soon, first, old)])
    assert paid_by(commitments, usage("a", input_tokens=10, output_tokens=5)) == [
        ("first", 3), ("old", 5), ("soon", 4), ("late", 3),
    ]  # fmt: skip
    assert commitments.changes()["late"] == (Drawn(), Drawn(used=3))
    assert commitments.changes() == {}


def test_the_instant_of_arrival_decides() -> None:
    commitments = Commitments([(contract(), Drawn())])
    before = usage("a", arrived_ms=ENDS_MS - 1, ended_ms=ENDS_MS + HOUR_MS)
    assert paid_by(commitments, before) == [("c", 15)]
    assert paid_by(commitments, usage("b", arrived_ms=ENDS_MS)) == []
    assert paid_by(commitments, usage("c", arrived_ms=NOVEMBER_MS - 1)) == []


def test_a_commitment_may_be_for_some_models_and_modes_and_is_never_anothers() -> None:
    commitments = Commitments([(contract(models=("m@1",), modes=("batch",)), Drawn())])
    assert paid_by(commitments, usage("a")) == []
    assert paid_by(commitments, usage("a", mode="batch", model="other")) == []
    assert paid_by(commitments, usage("a", mode="batch", tenant="birch")) == []
    assert paid_by(commitments, usage("a", mode="batch", outcome=Outcome.REFUSED)) == []
    assert paid_by(commitments, usage("a", mode="batch")) == [("c", 15)]


def test_overage_is_the_last_ones_plan() -> None:
    assert overage_plan([contract(), contract(overage_plan="gold"), contract()]) == "gold"
    assert overage_plan([contract()]) == ""


def test_unspent_tokens_lapse_by_an_entry_an_hour_after_expiry() -> None:
    assert lapse(contract(), Drawn(used=400), ENDS_MS + GRACE_MS - 1) is None
    due = lapse(contract(), Drawn(used=400), ENDS_MS + GRACE_MS)
    assert due is not None
    adjustment, after = due
    assert after == Drawn(used=400, lapsed=600)
    assert adjustment.entries == (
        Entry("commitment/c", 600, 6_005), Entry("revenue/expired_commitments", 600, -6_005),
    )  # fmt: skip
    assert adjustment.nano_usd == 0
    assert lapse(contract(), after, ENDS_MS + 10 * GRACE_MS) is None


def test_a_rollover_keeps_its_part_spendable_for_its_time() -> None:
    rolling = contract(rollover_percent=50, rollover_ms=DAY_MS)
    commitments = Commitments([(rolling, Drawn(used=400))])
    assert paid_by(commitments, usage("a", arrived_ms=ENDS_MS, input_tokens=290)) == [("c", 295)]
    assert paid_by(commitments, usage("b", arrived_ms=ENDS_MS + 1)) == [("c", 5)]
    assert paid_by(commitments, usage("c", arrived_ms=ENDS_MS - 1)) == [("c", 15)], "the other half, in time"
    assert paid_by(commitments, usage("d", arrived_ms=ENDS_MS + DAY_MS)) == []
    (_, first) = lapse(rolling, Drawn(used=400, rolled=100), ENDS_MS + GRACE_MS) or (None, None)
    assert first == Drawn(used=400, rolled=100, lapsed=300)
    (_, last) = lapse(rolling, first, ENDS_MS + DAY_MS + GRACE_MS) or (None, None)
    assert last == Drawn(used=400, rolled=100, lapsed=500)


def test_alerts_are_at_fifty_eighty_and_a_hundred_percent() -> None:
    used = [499, 500, 799, 800, 999, 1_000]
    assert [crossed(contract(), Drawn(used=n)) for n in used] == [[], [50], [50], [50, 80], [50, 80], [50, 80, 100]]


RECORDS = st.lists(
    st.builds(
        usage,
        st.uuids().map(str),
        input_tokens=st.integers(100, 400),
        cached_tokens=st.integers(0, 100),
        output_tokens=st.integers(0, 400),
        arrived_ms=st.integers(NOVEMBER_MS - 5, ENDS_MS + 2 * DAY_MS),
        mode=st.sampled_from(["serverless", "batch", "dedicated"]),
        outcome=st.sampled_from(list(Outcome)),
    ),
    max_size=25,
)
CONTRACTS = st.lists(
    st.builds(
        contract,
        st.integers(0, 999).map(lambda n: f"c{n}"),
        tokens=st.integers(1, 3_000),
        price_nano_usd=st.integers(0, 10**12),
        priority=st.integers(0, 2),
        rollover_percent=st.integers(0, 100),
        rollover_ms=st.sampled_from([0, DAY_MS]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda c: c.id,
)


@given(CONTRACTS, RECORDS)
def test_books_balance_and_every_token_bought_is_used_left_or_lapsed(
    contracts: list[Contract], records: list[UsageRecord]
) -> None:
    commitments = Commitments([(c, Drawn()) for c in contracts])
    rated = [draw(commitments, record) for record in records]
    adjustments: list[Adjustment] = [purchase(c) for c in contracts]
    final = {c.id: (c, drawn) for c, drawn in commitments.all()}
    for c, drawn in list(final.values()):
        assert drawn.total <= c.tokens
        assert spendable(c, drawn, late=True) <= spendable(c, drawn, late=False)
        if (due := lapse(c, drawn, ENDS_MS + 10 * DAY_MS)) is not None:
            adjustments.append(due[0])
            final[c.id] = (c, due[1])
    for transaction in [r.entries for r in rated] + [a.entries for a in adjustments]:
        assert sum(entry.amount for entry in transaction) == 0
        assert len({entry.account for entry in transaction}) == len(transaction)
    for record, r in zip(records, rated, strict=True):
        sold = sum(entry.quantity for entry in r.entries if entry.account.startswith("revenue/"))
        whole = record.input_tokens + record.output_tokens
        assert sold == (whole if record.billable and record.mode != "dedicated" else 0)
    for c, drawn in final.values():
        mine = [e for t in (*rated, *adjustments) for e in t.entries if e.account == commitment_account(c.id)]
        assert sum(entry.quantity for entry in mine) == drawn.total == c.tokens
        assert sum(entry.amount for entry in mine) == 0, "what was bought is used up or lapsed, to the nano-USD"
        assert worth(c, c.tokens) == c.price_nano_usd
