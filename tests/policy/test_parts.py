"""The small policies one by one: tables, and properties where there is a law."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.world import GB, node
from tidegate.domain.fleet import Tier
from tidegate.policy.book import Book
from tidegate.policy.costs import CostPriors, Costs
from tidegate.policy.eviction import Candidate, KeepAlive, choose
from tidegate.policy.forecast import ArrivalHistory
from tidegate.policy.placement import Offer, pick
from tidegate.policy.reconcile import CoreSettings

PLACE = ("n1", "acc-0")


def test_the_book_refuses_what_does_not_fit_and_counts_what_leaves() -> None:
    book = Book()
    book.open(node("n1", 1, gb=8))
    book.reserve("a", (PLACE,), 5 * GB)
    with pytest.raises(AssertionError, match="over-reserved"):
        book.reserve("b", (PLACE,), 4 * GB)
    book.set_releasing("a", True)
    assert (book.accounts[PLACE].free, book.accounts[PLACE].headroom) == (3 * GB, 8 * GB)
    book.pledge("plan", (PLACE,), 6 * GB)
    assert book.accounts[PLACE].headroom == 2 * GB
    assert book.release("a") == (PLACE,)
    assert book.release("a") == (), "a doubled report changes nothing"
    book.unpledge("plan")
    assert book.accounts[PLACE].free == 8 * GB
    with pytest.raises(AssertionError, match="host memory"):
        book.reserve_host("a", "n1", 100 * GB)


def test_costs_are_priors_until_measured_and_never_forget_at_once() -> None:
    costs = Costs(CostPriors(host_bytes_per_ms=1_000, wake_fixed_ms=10))
    assert costs.activation_ms("m", "n1", Tier.HOST, 5_000) == 15
    costs.observe("m", "n1", Tier.HOST, 100)
    assert costs.activation_ms("m", "n1", Tier.HOST, 5_000) == 100
    assert costs.activation_ms("m", "n2", Tier.HOST, 5_000) == 100, "another node's measurement beats a prior"
    costs.observe("m", "n1", Tier.HOST, 900)
    assert costs.activation_ms("m", "n1", Tier.HOST, 5_000) == 300
    assert costs.activation_ms("m", "n1", Tier.ACCELERATOR, 5_000) == 0


def test_the_forecast_learns_a_rhythm_and_is_honest_without_history() -> None:
    fresh = ArrivalHistory()
    assert fresh.needed_within(0, 1_000) == 0.0
    fresh.observe(0, 1)
    assert fresh.needed_within(10_000, 10_000) == pytest.approx(0.5), "quiet for as long again"
    steady = ArrivalHistory()
    for minute in range(60):
        steady.observe(minute * 60_000, 1)
    last = 59 * 60_000
    assert steady.needed_within(last + 1_000, 10_000) < 0.1
    assert steady.needed_within(last + 50_000, 30_000) > 0.9


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=80), st.integers(0, 10**9), st.integers(1, 10**7))
def test_the_forecast_is_a_probability_that_grows_with_the_horizon(gaps: list[int], quiet: int, horizon: int) -> None:
    history, now = ArrivalHistory(), 0
    for gap in gaps:
        now += gap
        history.observe(now, 1)
    near = history.needed_within(now + quiet, horizon)
    far = history.needed_within(now + quiet, 2 * horizon)
    assert 0.0 <= near <= far + 1e-9 <= 1.0 + 2e-9


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1e6)), max_size=8), st.integers(0, 150))
def test_victims_free_enough_and_none_is_superfluous(raw: list[tuple[int, float]], need: int) -> None:
    candidates = [Candidate(f"r{i}", size, regret) for i, (size, regret) in enumerate(raw)]
    victims = choose(candidates, need)
    if victims is None:
        assert sum(size for size, _ in raw) < need
        return
    freed = sum(v.nbytes for v in victims)
    assert freed >= need
    assert all(freed - v.nbytes < need for v in victims)
    alone = [c.regret_ms for c in candidates if c.nbytes >= need]
    if need > 0 and alone:
        assert sum(v.regret_ms for v in victims) <= min(alone) + 1e-6


def offer(
    place: str,
    headroom: int,
    free: int,
    *victims: Candidate,
    ready_ms: int = 500,
    crowd_ms: dict[str, float] | None = None,
) -> Offer:
    return Offer(("n", place), headroom, free, victims, ready_ms, crowd_ms or {})


@pytest.mark.parametrize(
    ("offers", "count", "places", "victims"),
    [
        ([offer("a", 10, 10), offer("b", 10, 0)], 1, ["a"], []),  # free at once beats promised
        ([offer("a", 0, 0, Candidate("v", 10, 5.0)), offer("b", 0, 0, Candidate("w", 10, 3.0))], 1, ["b"], ["w"]),
        ([offer("a", 0, 0, Candidate("v", 10, 900.0)), offer("b", 10, 10, ready_ms=700)], 1, ["b"], []),
        ([offer("a", 0, 0, Candidate("v", 9, 1.0)), offer("b", 4, 4)], 1, None, None),
        ([offer("a", 10, 10), offer("b", 0, 0, Candidate("v", 10, 1.0))], 2, ["a", "b"], ["v"]),
    ],
)
def test_placement_is_the_least_of_time_and_regret(
    offers: list[Offer], count: int, places: list[str] | None, victims: list[str] | None
) -> None:
    found = pick(offers, 10, count, drain_ms=100)
    if places is None:
        assert found is None
        return
    assert found is not None
    assert [p[1] for p in found.places] == places
    assert list(found.victims) == victims


@pytest.mark.parametrize("wrong", [{"wait_ms_max": 0}, {"victim_order": "dice"}, {"backoff_ms_first": -1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CoreSettings(**wrong)  # type: ignore[arg-type]


def test_a_victim_on_several_accelerators_is_paid_for_once_and_frees_them_all() -> None:
    wide = Candidate("wide", 10, 5.0)
    together = pick([offer("a", 0, 0, wide), offer("b", 0, 0, wide, Candidate("narrow", 10, 6.0))], 10, 2, drain_ms=100)
    assert together is not None
    assert together.victims == ("wide",)
    assert together.regret_ms == 5.0


def test_a_neighbour_on_both_accelerators_is_paid_for_once() -> None:
    """Beside the busier one twice, rather than beside each of two that would both be slowed down."""
    wide, other = {"wide": 90.0}, {"other": 80.0}
    offers = [offer(place, 10, 10, crowd_ms=crowd) for place, crowd in [("a", wide), ("b", other), ("c", wide)]]
    apart = pick(offers[:2], 10, 2, drain_ms=100)
    assert apart is not None
    assert apart.score_ms == 500 + 90 + 80
    offers[1] = offer("b", 10, 10, crowd_ms={"other": 95.0})
    together = pick(offers, 10, 2, drain_ms=100)
    assert together is not None
    assert [place for _, place in together.places] == ["a", "c"]
    assert together.score_ms == 500 + 90


def test_a_neighbour_that_leaves_for_it_draws_nobody_to_its_place() -> None:
    """It was asked much a moment ago and will be back: beside those that are quiet is better."""
    busy = offer("busy", 0, 0, Candidate("left", 10, 5.0), crowd_ms={"left": 400.0, "other": 30.0})
    quiet = offer("quiet", 0, 0, Candidate("idle", 10, 6.0), crowd_ms={"idle": 10.0, "third": 40.0})
    found = pick([busy, quiet], 10, 1, drain_ms=100)
    assert found is not None
    assert found.victims == ("idle",)


def test_how_soon_it_is_needed_grows_with_the_rate_of_arrivals() -> None:
    def every(gap_ms: int) -> float:
        history = ArrivalHistory()
        for number in range(200):
            history.observe(number * gap_ms, 1)
        return history.needed_soon(199 * gap_ms + 100, 1_000, 300_000)

    assert every(10_000) / every(100_000) == pytest.approx(10.0, rel=0.5)
    assert every(500) > every(5_000) > every(50_000)


def test_a_burst_is_what_comes_within_a_second_of_a_quiet_one() -> None:
    history = ArrivalHistory()
    for number in range(60):
        for step in range(8):
            history.observe(number * 60_000 + step * 100, 2)
        history.observe(number * 60_000 + 1_500, 5)  # later than a second: not counted
    assert history.burst == pytest.approx(16.0, rel=0.05)


def test_busy_hours_are_known_after_a_day() -> None:
    """One request a minute in the afternoon, one an hour at night, three days: at night a quiet minute means little."""
    hour, history = 3_600_000, ArrivalHistory()
    for day in range(3):
        for at in range(24):
            step = 60_000 if 12 <= at < 18 else hour
            for offset in range(0, hour, step):
                history.observe(1 + (day * 24 + at) * hour + offset, 1)

    def asked(at: int) -> float:
        history.observe((72 + at) * hour, 1)
        return history.needed_within((72 + at) * hour + 30_000, 60_000)

    night, afternoon = asked(3), asked(14)
    assert afternoon > 2.0 * night


@given(
    st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6)), max_size=60),
    st.floats(1.0, 1e5),
)
def test_keep_alive_never_costs_more_than_twice_the_clairvoyant_and_one_return(
    gaps: list[tuple[float, float]], back: float
) -> None:
    """Whatever the forecast says."""
    keep = KeepAlive()
    for gap, forecast in gaps:
        keep.ended(gap, keep.instant(forecast, back), back)
        assert keep.paid <= 2.0 * keep.best + back + 1e-6 * (1.0 + keep.best + back)


def test_keep_alive_learns_from_gaps() -> None:
    """Gaps of a minute where a return is worth ten seconds: it leaves at once, as a clairvoyant would."""
    keep, history, back = KeepAlive(), ArrivalHistory(), 10_000.0
    for number in range(200):
        if number:
            keep.ended(60_000.0, keep.instant(history.keep_ms(back), back), back)
        history.observe(number * 60_000, 1)
    assert keep.paid < 1.15 * keep.best
    assert ArrivalHistory().keep_ms(back) == back
