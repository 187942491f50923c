"""Rating again: what is posted is exactly the difference between the two ratings, and undoing it leaves nothing."""

from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from tests.money import price, usage
from tidegate.domain.contract import Contract, Drawn
from tidegate.domain.ledger import Charged, Entry, RatedUsage
from tidegate.domain.usage import Outcome
from tidegate.money.drawdown import Commitments, with_drawdown
from tidegate.money.prices import PriceTable
from tidegate.money.rating import rate
from tidegate.money.rerate import Rerating, undone

AMOUNTS = st.integers(0, 10**6)
PRICES = st.builds(
    price, input_nano_usd=AMOUNTS, cached_input_nano_usd=AMOUNTS, output_nano_usd=AMOUNTS,
    minimum_nano_usd=st.sampled_from([0, 10**7]), batch_percent=st.integers(0, 100),
)  # fmt: skip
RECORDS = st.lists(
    st.builds(
        usage,
        st.uuids().map(str),
        tenant=st.sampled_from(["acme", "birch"]),
        mode=st.sampled_from(["serverless", "batch", "dedicated"]),
        input_tokens=st.integers(10, 90),
        cached_tokens=st.integers(0, 10),
        output_tokens=st.integers(0, 90),
        outcome=st.sampled_from([Outcome.COMPLETED, Outcome.CLIENT_ABORTED, Outcome.REFUSED]),
    ),
    max_size=20,
)


def accounts(transactions: Iterable[Iterable[Entry]]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for entries in transactions:
        for account, quantity, amount in entries:
            sums[account] += amount
            sums[account + "#"] += quantity
    return Counter({account: amount for account, amount in sums.items() if amount})


def rerated(rated: list[RatedUsage], table: PriceTable) -> Rerating:
    rerating = Rerating(table)
    for number, r in enumerate(rated):
        nano_usd = sum(e.amount for e in r.entries if e.account.startswith("tenant/"))
        rerating.add(Charged(number, r.record, r.price_version, nano_usd), r.entries, "default")
    return rerating


@given(RECORDS, st.none() | PRICES, PRICES)
def test_the_adjustments_are_the_difference(records, before, after) -> None:
    rated = [rate(record, before) for record in records]
    adjustments = rerated(rated, PriceTable([after])).adjustments("r", 5)
    posted = [a.entries for a in adjustments]
    assert all(sum(entry.amount for entry in entries) == 0 for entries in posted)
    assert accounts([*(r.entries for r in rated), *posted]) == accounts(rate(r, after).entries for r in records)
    assert accounts([*posted, *(undone(a, 6).entries for a in adjustments)]) == {}
    assert len({a.id for a in adjustments}) == len(adjustments)


def test_the_same_prices_post_nothing() -> None:
    rated = [rate(usage("a"), price())]
    rerating = rerated(rated, PriceTable([price()]))
    assert (rerating.requests, rerating.changed, rerating.adjustments("r", 5)) == (1, 0, [])


def test_what_a_commitment_paid_stays_paid_and_overage_stays_at_its_plan() -> None:
    record = usage("a", input_tokens=10, output_tokens=5)
    commitments = Commitments([(Contract("c", "acme", 12, 99, 0, 10**15), Drawn())])
    taken = commitments.cover(record, commitments.concern(record))
    was, now = price(id=7, plan="over"), price(id=8, plan="over", effective_ms=1, output_nano_usd=5)
    rated = with_drawdown(record, taken, was)
    cheaper = PriceTable([price(), was, now])
    (reversal, again) = rerated([rated], cheaper).adjustments("r", 5)
    assert (reversal.nano_usd, again.nano_usd) == (-3 * 800, 3 * 5)
    whole = with_drawdown(usage("b", input_tokens=7, output_tokens=5), taken, was)
    assert rerated([whole], cheaper).adjustments("r", 5) == []
