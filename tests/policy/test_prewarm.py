"""Ahead of demand: who has a rhythm is up before its next request; who has none costs no swap; nobody pays for it."""

from random import Random

import pytest

from tests.policy.test_reconcile import FAST, kinds, seen, world
from tests.policy.world import World, deployment
from tidegate.domain import plan
from tidegate.domain.endpoint import Scaling
from tidegate.domain.fleet import Tier
from tidegate.policy.forecast import HOUR_MS, ArrivalHistory

MINUTE = 60_000


def rhythm(scene: World, rounds: int, period_ms: int = 10 * MINUTE) -> None:
    """`a` is asked every ten minutes, `b` takes its place a minute later; the last minute is left to happen."""
    for _ in range(rounds):
        scene.ask("a")
        scene.run(MINUTE)
        scene.ask("b")
        scene.run(period_ms - MINUTE)


def prewarms(scene: World, endpoint: str = "a") -> list[plan.Command]:
    up = [c for c in scene.log if isinstance(c, plan.Start | plan.Wake) and c.reason.rule == "prewarm"]
    return [c for c in up if c.replica.startswith(f"{endpoint}-")]


def test_who_is_asked_by_the_clock_is_up_before_its_request() -> None:
    scene = world("a", "b", gb=4)
    rhythm(scene, 12)
    assert seen(scene, "a").tier is Tier.ACCELERATOR, "its time has come again"
    waits = len(scene.waits["a"])
    scene.ask("a")
    scene.run(1_000)
    assert scene.waits["a"][waits:] == [0]
    reason = prewarms(scene)[-1].reason
    assert dict(reason.inputs)["likely"] >= 0.67, "and the audit log says why"


def test_it_stays_for_as_long_as_it_was_expected_whatever_its_zero_window() -> None:
    scene = world(gb=4)
    scene.apply(deployment("a", scaling=Scaling(zero_window_ms=1_000)))
    for _ in range(12):
        scene.ask("a")
        scene.run(10 * MINUTE)
    up = prewarms(scene)
    assert up
    waits = len(scene.waits["a"])
    scene.ask("a")
    scene.run(MINUTE)
    assert scene.waits["a"][waits:] == [0]
    assert seen(scene, "a").tier is Tier.HOST, "and its owner's window counts again once it was asked"


@pytest.mark.parametrize("order", ["lru", "none"])
def test_other_victim_orders_bring_nobody_up_ahead(order: str) -> None:
    scene = world("a", "b", gb=4, settings=type(FAST)(victim_order=order))
    rhythm(scene, 12)
    assert prewarms(scene) == []


def swaps(prewarm: bool, seed: int) -> int:
    dice = Random(seed)
    scene = world("a", "b", "c", gb=4, settings=type(FAST)(prewarm=prewarm))
    for _ in range(600):
        scene.run(int(dice.expovariate(1 / 20_000)) + 1)
        scene.ask(dice.choice("abc"))
    assert sum(scene.served.values()) >= 595
    return sum(isinstance(c, plan.Start | plan.Wake) for c in scene.log)


def test_arrivals_without_a_pattern_cost_no_more_swaps() -> None:
    with_it, without = (sum(swaps(prewarm, seed) for seed in range(3)) for prewarm in (True, False))
    assert with_it <= without * 1.02


def test_a_busy_or_more_regretted_replica_makes_no_room() -> None:
    scene = world("a", "b", gb=4)
    rhythm(scene, 12)
    scene.ask("b", service_ms=5 * MINUTE)
    scene.run(MINUTE)
    before = len(prewarms(scene))
    for _ in range(15):  # `b` is asked without a pause from here on, over the minute in which `a` is expected
        scene.ask("b", service_ms=2 * MINUTE)
        scene.run(MINUTE)
    assert len(prewarms(scene)) == before
    assert "evict" not in {c.reason.rule for c in scene.log[-5:] if isinstance(c, plan.Drain)}


def test_the_hour_of_the_day_is_expected_once_it_was_seen() -> None:
    history = ArrivalHistory()
    begin = 24 * HOUR_MS * 1_000
    for day in range(6):
        for minute in range(0, 120, 7):
            history.observe(begin + (24 * day + 8) * HOUR_MS + minute * MINUTE, 1)
    morning, evening = begin + (24 * 6 + 8) * HOUR_MS, begin + (24 * 6 + 20) * HOUR_MS
    assert history.needed_within(morning, HOUR_MS) > 0.7
    assert history.needed_within(evening, HOUR_MS) < 0.3
    fresh = ArrivalHistory()
    fresh.observe(begin, 1)
    assert fresh.needed_within(begin + 20 * HOUR_MS, HOUR_MS) < 0.1, "nothing is known before a day was seen"


def test_an_endpoint_put_to_sleep_by_hand_stays_asleep() -> None:
    scene = world("a", "b", gb=4)
    rhythm(scene, 12)
    scene.tell(plan.ManualAction("a", "sleep"))
    before = len(prewarms(scene))
    scene.run(30 * MINUTE)
    assert len(prewarms(scene)) == before
    assert kinds(scene, "a")[-1] == "Sleep"
