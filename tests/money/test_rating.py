"""What usage costs: exact, additive, balanced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.money import HOUR_MS, NOVEMBER_MS, price, usage
from tidegate.domain.ledger import NO_PRICE, EndpointFacts, Entry, FactsSpan
from tidegate.domain.usage import Outcome
from tidegate.money.prices import PriceTable
from tidegate.money.rating import rate, reserved_pieces, token_cost_nano_usd

TOKENS = st.integers(0, 2_000_000)
UNITS = st.integers(0, 10**9)
COUNTS = st.tuples(TOKENS, TOKENS, TOKENS).map(lambda t: (t[0] + t[1], t[1], t[2]))  # input ≥ cached
PRICES = st.builds(
    price,
    input_nano_usd=UNITS,
    cached_input_nano_usd=UNITS,
    output_nano_usd=UNITS,
    batch_percent=st.integers(0, 100),
)


def _usage(counts: tuple[int, int, int], **changes: object):
    return usage("r", input_tokens=counts[0], cached_tokens=counts[1], output_tokens=counts[2], **changes)


def test_each_line_at_its_price() -> None:
    entries = rate(_usage((10, 4, 5)), price()).entries
    assert entries == (
        Entry("tenant/acme", 0, 6 * 200 + 4 * 20 + 5 * 800),
        Entry("revenue/input", 6, -1200),
        Entry("revenue/cached_input", 4, -80),
        Entry("revenue/output", 5, -4000),
    )


def test_lines_without_tokens_are_left_out() -> None:
    assert [entry.account for entry in rate(_usage((0, 0, 3)), price()).entries] == ["tenant/acme", "revenue/output"]
    assert rate(_usage((0, 0, 0)), price()).entries == ()


@pytest.mark.parametrize(
    ("amount_tokens", "percent", "expected"),
    [(1, 50, 0), (3, 50, 2), (5, 50, 2), (7, 50, 4), (100, 33, 33), (1, 100, 1), (9, 0, 0), (10, 99, 10)],
)
def test_batch_rounds_half_to_even_a_line(amount_tokens: int, percent: int, expected: int) -> None:
    cheap = price(input_nano_usd=1, batch_percent=percent)
    assert rate(_usage((amount_tokens, 0, 0), mode="batch"), cheap).entries[0].amount == expected


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.OPEN])
def test_what_is_never_billed(outcome: Outcome) -> None:
    rated = rate(_usage((10, 0, 5), outcome=outcome), price(id=7))
    assert (rated.entries, rated.price_version) == ((), 7)


@pytest.mark.parametrize("outcome", [Outcome.CLIENT_ABORTED, Outcome.ENGINE_LOST, Outcome.GATEWAY_LOST])
def test_failed_before_the_first_token_is_free_and_after_it_is_billed_as_sent(outcome: Outcome) -> None:
    assert rate(_usage((10, 0, 0), outcome=outcome), price()).entries == ()
    assert rate(_usage((10, 0, 1), outcome=outcome), price()).entries[0].amount == 10 * 200 + 800


def test_dedicated_endpoints_do_not_pay_for_tokens() -> None:
    assert rate(_usage((10, 0, 5), mode="dedicated"), price()).entries == ()


def test_no_price_in_force_is_no_charge_and_says_so() -> None:
    rated = rate(_usage((10, 0, 5)), None)
    assert (rated.entries, rated.price_version) == ((), NO_PRICE)


@given(COUNTS, PRICES, st.sampled_from(["serverless", "dedicated_serverless", "batch", "dedicated"]))
def test_entries_of_a_transaction_sum_to_zero(counts: tuple[int, int, int], a_price, mode: str) -> None:
    entries = rate(_usage(counts, mode=mode), a_price).entries
    assert sum(entry.amount for entry in entries) == 0
    assert len({entry.account for entry in entries}) == len(entries)
    assert all(entry.amount >= 0 for entry in entries[:1])


@given(COUNTS, COUNTS, PRICES)
def test_rating_is_additive(one: tuple[int, int, int], two: tuple[int, int, int], a_price) -> None:
    both = (one[0] + two[0], one[1] + two[1], one[2] + two[2])
    owed = [sum(e.amount for e in rate(_usage(counts), a_price).entries[:1]) for counts in (one, two, both)]
    assert owed[0] + owed[1] == owed[2] == token_cost_nano_usd(*both, a_price)


@given(COUNTS, PRICES)
def test_batch_is_within_half_a_nano_usd_a_line_of_its_percentage(counts: tuple[int, int, int], a_price) -> None:
    full = rate(_usage(counts), a_price).entries
    batch = rate(_usage(counts, mode="batch"), a_price).entries
    for whole, part in zip(full[1:], batch[1:], strict=True):
        assert (whole.account, whole.quantity) == (part.account, part.quantity)
        assert abs(whole.amount * a_price.batch_percent - part.amount * 100) <= 50


def test_the_version_in_force_is_the_newest_effective_by_then() -> None:
    table = PriceTable([price(id=2, effective_ms=200), price(id=1, effective_ms=100), price(id=3, plan="gold")])
    found = [table.in_force("default", at) for at in (99, 100, 199, 200, 10**15)]
    assert [v and v.id for v in found] == [None, 1, 1, 2, 2]
    assert table.in_force("gold", 5) == price(id=3, plan="gold")


def test_a_plan_without_a_price_by_then_falls_back_to_the_default_plan() -> None:
    table = PriceTable([price(id=1), price(id=2, plan="gold", effective_ms=500)])
    assert [table.in_force(plan, at).id for plan, at in (("gold", 499), ("gold", 500), ("none", 7))] == [1, 2, 1]


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["default", "gold"])), unique=True), st.integers(0, 60))
def test_in_force_agrees_with_a_plain_search(starts: list[tuple[int, str]], at_ms: int) -> None:
    versions = [price(id=i + 1, effective_ms=start, plan=plan) for i, (start, plan) in enumerate(starts)]

    def newest(plan: str):
        return max((v for v in versions if v.plan == plan and v.effective_ms <= at_ms), key=lambda v: v.effective_ms)

    plans = [plan for plan in ("gold", "default") if any(v.plan == plan and v.effective_ms <= at_ms for v in versions)]
    assert PriceTable(versions).in_force("gold", at_ms) == (newest(plans[0]) if plans else None)


FACTS = EndpointFacts(created_ms=NOVEMBER_MS, accelerators=2, price_plan="default", mode="dedicated")


def test_reserved_time_is_cut_where_the_price_changes() -> None:
    table = PriceTable([price(), price(id=2, effective_ms=NOVEMBER_MS + 900_000, accelerator_hour_nano_usd=0)])
    pieces = reserved_pieces([FactsSpan("acme/chat", 0, FACTS)], NOVEMBER_MS, NOVEMBER_MS + HOUR_MS, table)
    assert [(p.price_version, p.accelerator_ms, p.nano_usd) for p in pieces] == [
        (1, 1_800_000, 1_800_000_000),
        (2, 5_400_000, 0),
    ]


@given(st.lists(st.integers(0, 1000), max_size=6, unique=True), st.integers(0, 1000), st.integers(0, 1000))
def test_reserved_pieces_cover_the_period_once(cuts: list[int], start: int, length: int) -> None:
    table = PriceTable([price(id=i + 1, effective_ms=at) for i, at in enumerate(cuts)])
    pieces = reserved_pieces([FactsSpan("acme/chat", 100, FACTS)], start, start + length, table)
    assert sum(p.accelerator_ms for p in pieces) == 2 * max(0, start + length - max(start, 100))
