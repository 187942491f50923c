"""Where and how often a replica is started: never twice for one that is wanted, and not again where it just failed."""

from dataclasses import replace

import pytest

from tests.policy.world import World, deployment, node
from tidegate.domain import plan
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.reconcile import CoreSettings

QUICK = replace(CoreSettings(), residency_ms_min=0, wait_ms_max=60_000, first_load=False)


def starts(scene: World, endpoint: str) -> list[plan.Start]:
    return [c for c in scene.log if isinstance(c, plan.Start) and c.deployment.endpoint == endpoint]


def test_a_sleeper_without_room_beside_a_start_under_way_asks_for_no_second_start() -> None:
    """It once did: `supply` leaves the start out, so that a wake may overtake it, and no wake had room."""
    scene = World(QUICK)
    scene.add_gateway("gw")
    scene.join(node("home", 1, 8, region="local"))
    scene.apply(deployment("a", 8, regions=("local", "next")))
    scene.apply(deployment("b", 8))
    scene.ask("a")
    scene.run(2_000)
    scene.ask("b", service_ms=120_000)  # a falls asleep for it, and has no room at home for long
    scene.run(2_000)
    assert [r.state for r in scene.truth.values() if r.endpoint == "a"] == [S.ASLEEP]
    scene.join(node("away-1", 1, 8, region="next"), node("away-2", 1, 8, region="next"))
    scene.log.clear()
    scene.ask("a")
    scene.run(10)
    for _ in range(5):  # more demand while it starts: each report steers the endpoint again
        scene.ask("a")
        scene.run(60)
    scene.run(5_000)
    assert len(starts(scene, "a")) == 1
    assert scene.served["a"] == 7


def test_a_replica_on_its_way_in_another_region_is_not_replaced_at_home_before_it_serves() -> None:
    scene = World(QUICK)
    scene.add_gateway("gw")
    scene.join(node("home", 1, 8, region="local"), node("away", 1, 8, region="next"))
    scene.apply(deployment("b", 8))
    scene.ask("b", service_ms=120_000)
    scene.run(2_000)
    scene.apply(deployment("a", 8, regions=("local", "next")))
    scene.ask("a", service_ms=2_000)
    scene.run(135)
    scene.crash(next(t.id for t in scene.truth.values() if t.endpoint == "b"))  # there is room at home now
    scene.tell(plan.EndpointRemoved("b"))
    scene.run(30)
    scene.ask("a")
    scene.run(60)
    assert [start.node for start in starts(scene, "a")] == ["away"]
    scene.run(20_000)
    assert [start.node for start in starts(scene, "a")] == ["away", "home"], "once it serves, it comes home"
    assert scene.served["a"] == 2


@pytest.mark.parametrize("regions", [("local",), ("local", "next")])
def test_a_start_that_failed_is_tried_next_where_it_did_not(regions: tuple[str, ...]) -> None:
    scene = World(QUICK)
    scene.add_gateway("gw")
    scene.join(node("one", 1, 8), node("two", 1, 8, region=regions[-1]))
    scene.apply(deployment("a", regions=regions))
    scene.faults["start"] = 1.0
    scene.ask("a")
    scene.run(900)
    (first,) = starts(scene, "a")
    scene.faults["start"] = 0.0
    scene.run(5_000)
    second = starts(scene, "a")[1]
    assert second.node != first.node
    assert scene.served == {"a": 1}


def test_with_room_nowhere_else_it_is_tried_there_again() -> None:
    scene = World(QUICK)
    scene.add_gateway("gw")
    scene.join(node("one", 1, 8))
    scene.apply(deployment("a"))
    scene.faults["start"] = 1.0
    scene.ask("a")
    scene.run(900)
    scene.faults["start"] = 0.0
    scene.run(5_000)
    assert [start.node for start in starts(scene, "a")] == ["one", "one"]
    assert scene.served == {"a": 1}
