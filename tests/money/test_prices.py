"""Which price counts: the stated precedence, against a plain search."""

from hypothesis import given
from hypothesis import strategies as st

from tests.money import price
from tidegate.domain.price import PriceVersion
from tidegate.money.prices import PriceTable, Sold

SOLD = Sold("acme", "acme/chat", "m", "batch")
TERMS = ({}, {"plan": "gold"}, *(
    {name: value for name, value, on in zip(("endpoint", "tenant", "model", "mode"), values, chosen, strict=True) if on}
    for values in (("acme/chat", "acme", "m", "batch"), ("acme/other", "birch", "n", "serverless"))
    for chosen in [tuple(bool(n & bit) for bit in (8, 4, 2, 1)) for n in range(1, 16)]
))  # fmt: skip


def _version(index: int, at_ms: int, terms: dict[str, str], ends: bool) -> PriceVersion:
    plan = terms.get("plan", "" if terms else "default")
    return price(id=index, effective_ms=at_ms, ends=ends, **(terms | {"plan": plan}))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(TERMS), st.booleans()), max_size=12, unique_by=str),
    st.integers(0, 10),
)
def test_the_most_particular_terms_count(book: list[tuple[int, dict[str, str], bool]], at_ms: int) -> None:
    versions = [_version(index, at, terms, ends) for index, (at, terms, ends) in enumerate(book, 1)]
    rank = {"endpoint": 8, "tenant": 4, "model": 2, "mode": 1}

    def matches(v: PriceVersion) -> bool:
        return v.plan in ("gold", "default", "") and all(getattr(v, name) in ("", getattr(SOLD, name)) for name in rank)

    def terms(v: PriceVersion) -> tuple[int, bool]:
        return sum(weight for name, weight in rank.items() if getattr(v, name)), v.plan == "gold"

    chains: dict[tuple[int, bool], PriceVersion] = {}
    for v in sorted(versions, key=lambda v: (v.effective_ms, v.id)):
        if v.effective_ms <= at_ms and matches(v):
            chains[terms(v)] = v
    alive = {key: v for key, v in chains.items() if not v.ends}
    assert PriceTable(versions).in_force("gold", at_ms, SOLD) == (alive[max(alive)] if alive else None)


def test_what_may_change_within_a_period_is_every_version_that_could_count() -> None:
    table = PriceTable([price(id=1), price(id=2, plan="", tenant="acme", effective_ms=5), price(id=3, plan="gold")])
    assert table.changes("default", 0, 10, SOLD) == [5]
    assert table.changes("default", 0, 10, Sold("birch")) == []
