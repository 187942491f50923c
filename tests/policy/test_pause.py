"""Batch computes beside nobody who works: it stands still meanwhile, keeps its memory, and is never forgotten so."""

from dataclasses import replace

import pytest

from tests.policy.test_reconcile import FAST, kinds
from tests.policy.world import World, deployment, node
from tidegate.domain import plan
from tidegate.domain.endpoint import Mode
from tidegate.domain.fleet import Tier
from tidegate.policy.reconcile import FleetCore

SETTINGS = replace(FAST, pause_ms_max=5_000)


def beside(gb: int = 8) -> World:
    """Batch computes on the accelerator of `a`, which is idle; both fit."""
    scene = World(SETTINGS)
    scene.add_gateway("gw")
    scene.join(node("n1", 1, gb))
    scene.apply(deployment("a"))
    scene.run(5_000)
    scene.apply(deployment("bulk", mode=Mode.BATCH))
    scene.ask("bulk", service_ms=60_000)
    scene.run(1_500)
    assert kinds(scene, "bulk") == ["Start"], "its owner is idle, and its memory is not asked for"
    return scene


def orders(scene: World) -> list[bool]:
    return [command.on for command in scene.log if isinstance(command, plan.Pause)]


def stands_still(scene: World) -> bool:
    (engine,) = (engine for engine in scene.truth.values() if engine.endpoint == "bulk")
    return engine.paused


def test_it_stands_still_while_a_neighbour_works_and_goes_on() -> None:
    scene = beside()
    for turn in range(1, 4):
        scene.ask("a", service_ms=500)
        scene.run(100)
        assert stands_still(scene)
        scene.run(600)
        assert not stands_still(scene)
        assert orders(scene) == [True, False] * turn
    assert kinds(scene, "bulk") == ["Start"] + ["Pause"] * 6, "it kept its place"
    assert scene.served["a"] == 3
    rule = next(command.reason for command in scene.log if isinstance(command, plan.Pause))
    assert str(rule) == "neighbour_works for=a"


def test_who_works_elsewhere_is_no_neighbour() -> None:
    scene = beside()
    scene.join(node("n2", 1, 4))
    scene.apply(deployment("b", regions=("local",)))
    scene.run(3_000)
    scene.ask("b", service_ms=500)
    scene.run(100)
    assert orders(scene) == []


def test_who_is_woken_beside_it_makes_it_stand_still_too() -> None:
    """The request was there before the replica was."""
    scene = beside()
    scene.tell(plan.ManualAction("a", "sleep"))
    scene.run(1_000)
    scene.ask("a", service_ms=500)
    scene.run(300)
    assert stands_still(scene)
    scene.run(1_000)
    assert orders(scene) == [True, False]


def test_it_starts_beside_nobody_who_works() -> None:
    scene = World(SETTINGS)
    scene.add_gateway("gw")
    scene.join(node("n1", 1, 8))
    scene.apply(deployment("a"))
    scene.run(5_000)
    scene.ask("a", service_ms=3_000)
    scene.run(100)
    scene.apply(deployment("bulk", mode=Mode.BATCH))
    scene.ask("bulk")
    scene.run(2_500)
    assert kinds(scene, "bulk") == []
    scene.run(12_000)
    assert kinds(scene, "bulk")[:1] == ["Start"]
    assert scene.served["bulk"] == 1


def test_memory_is_still_taken_at_once_from_what_stands_still() -> None:
    scene = beside()
    scene.ask("a", service_ms=3_000)
    scene.run(100)
    assert stands_still(scene)
    scene.apply(deployment("b"))
    scene.ask("b")
    scene.run(1_500)
    assert kinds(scene, "bulk")[-2:] == ["Drain", "Sleep"]
    assert scene.served["b"] == 1


def test_it_ends_when_it_stands_still_for_long() -> None:
    """Its memory is of no use there, and engines have watchdogs."""
    scene = beside()
    scene.ask("a", service_ms=30_000)
    scene.run(SETTINGS.pause_ms_max - 200)
    assert stands_still(scene)
    scene.run(400)
    assert kinds(scene, "bulk") == ["Start", "Pause", "Drain", "Sleep"]
    scene.run(40_000)
    assert kinds(scene, "bulk")[4:5] == ["Wake"], "and comes back once the neighbour is idle"


@pytest.mark.parametrize("works", [True, False])
def test_what_a_node_says_when_it_comes_back_is_heard(works: bool) -> None:
    """The link broke while it stood still: it goes on as soon as nobody works, whoever ordered it to stand still."""
    scene = beside()
    scene.ask("a", service_ms=2_000)
    scene.run(100)
    assert stands_still(scene)
    scene.core.handle(plan.NodeLost("n1"), scene.now)  # its commands meet nobody
    if not works:
        scene.now += 2_000
    scene.join(scene.nodes["n1"])
    scene.run(100)
    assert stands_still(scene) is works
    scene.run(2_500)
    assert not stands_still(scene)


def test_a_new_core_does_not_forget_it() -> None:
    """It stood still when the control plane ended, and meanwhile the neighbour has become idle."""
    scene = beside()
    (engine,) = (engine for engine in scene.truth.values() if engine.endpoint == "bulk")
    engine.paused = True
    scene.core = FleetCore(SETTINGS)
    scene.tell(plan.GatewayJoined("gw", "local"))
    for wanted in list(scene.deployments.values()):
        scene.apply(wanted)
    scene.join(scene.nodes["n1"])
    scene.run(100)
    assert orders(scene) == [False]
    assert not stands_still(scene)


def test_an_order_that_was_not_heard_is_given_again() -> None:
    scene = beside()
    scene.ask("a", service_ms=1_000)
    scene.run(100)
    (engine,) = (engine for engine in scene.truth.values() if engine.endpoint == "bulk")
    engine.paused = False
    scene.tell(plan.ReplicaChanged(scene.status(engine)))
    assert engine.paused
    scene.run(2_000)
    assert not engine.paused
    scene.tell(plan.ReplicaChanged(replace(scene.status(engine), paused=True)))  # of long ago
    scene.run(100)
    assert not engine.paused


def test_a_lane_that_may_rush_goes_on() -> None:
    """It competes like a serverless endpoint from now on."""
    scene = beside()
    scene.ask("a", service_ms=2_000)
    scene.run(100)
    assert stands_still(scene)
    scene.apply(replace(scene.deployments["bulk"], mode=Mode.SERVERLESS))
    scene.run(100)
    assert not stands_still(scene)


def test_a_lost_gateways_requests_hold_nobody_up() -> None:
    scene = beside()
    scene.add_gateway("other")
    scene.run(100)
    scene.ask("a", service_ms=60_000, gateway="other")
    scene.run(100)
    assert stands_still(scene)
    scene.lose_gateway("other")
    scene.run(100)
    assert not stands_still(scene)


def test_a_sleeping_batch_replica_is_the_first_to_leave_host_memory() -> None:
    """Nobody waits for it, so no sleeper of a real-time endpoint ends for its sake."""
    scene = World(SETTINGS)
    scene.add_gateway("gw")
    scene.join(node("n1", 1, 4, host_gb=12))
    for name in ("a", "b", "c"):
        scene.apply(deployment(name))
    for name in ("a", "b", "c"):
        scene.ask(name)
        scene.run(5_000)
    for name in ("a", "b", "c", "bulk"):
        scene.core._fleet.costs.observe(f"digest-{name}", "n1", Tier.DISK, 100_000)  # in this world starts are as wakes
    scene.log.clear()
    scene.apply(deployment("bulk", mode=Mode.BATCH))
    scene.ask("bulk", service_ms=600_000)
    scene.run(60_000)
    assert "Start" in kinds(scene, "bulk")
    for turn in range(6):
        scene.ask("abc"[turn % 3])
        scene.run(20_000)
    assert sum(scene.served.get(name, 0) for name in ("a", "b", "c")) == 9
    ended = {command.replica.split("-")[0] for command in scene.log if isinstance(command, plan.Stop)}
    assert ended == {"bulk"}
