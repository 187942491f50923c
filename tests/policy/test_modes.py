"""Modes and regions in the capacity core: what dedicated is promised, what an owner may lend, where one may borrow."""

from tests.policy.test_reconcile import FAST, kinds, seen
from tests.policy.world import World, deployment, node
from tidegate.domain import plan
from tidegate.domain.endpoint import EndpointState, Mode
from tidegate.domain.replica import ReplicaState as S


def full_world(accelerators: int = 1, gb: int = 4) -> World:
    """Room for exactly one replica of 4 GB an accelerator."""
    scene = World(FAST)
    scene.add_gateway("gw")
    scene.join(node("n1", accelerators, gb))
    return scene


def where(scene: World, endpoint: str) -> list[str]:
    """Nodes on which it is ready."""
    return sorted(r.node for r in seen(scene, endpoint).replicas if r.state is S.READY)


def test_dedicated_does_not_lend_unless_its_owner_says_so() -> None:
    for lend in (False, True):
        scene = full_world()
        scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1, lend=lend))
        scene.run(3_000)
        scene.apply(deployment("a"))
        scene.ask("a")
        scene.run(5_000)
        assert scene.served.get("a", 0) == int(lend)
        assert ("Sleep" in kinds(scene, "d")) is lend
        scene.ask("d")
        scene.run(5_000)
        assert scene.served["d"] == 1, "and the owner has it back when it wants it"


def test_one_that_lends_stays_resident_while_nobody_wants_its_place() -> None:
    scene = full_world()
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1, lend=True))
    scene.run(10 * FAST.idle_ms_max)
    assert kinds(scene, "d") == ["Start"]


def test_a_reservation_of_two_is_had_in_full_although_somebody_is_busy_there() -> None:
    scene = full_world(accelerators=2)
    scene.apply(deployment("a", slots=64))
    scene.ask("a", service_ms=1_000)
    scene.run(1_500)
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=2, max_replicas=2))
    for _ in range(4 * FAST.wait_ms_max // 500):
        scene.ask("a", service_ms=1_000)
        scene.ask("d", service_ms=1_000)
        scene.run(500)
    assert len(where(scene, "d")) == 2


def test_an_idle_dedicated_endpoint_is_not_lent_to_batch() -> None:
    scene = full_world()
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1))
    scene.run(3_000)
    scene.apply(deployment("b", mode=Mode.BATCH))
    scene.ask("b")
    scene.run(600_000)
    assert kinds(scene, "d") == ["Start"]
    assert "b" not in scene.served


def test_dedicated_bursts_into_the_pool_and_only_its_reservation_is_sacred() -> None:
    scene = full_world(accelerators=2)
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1, max_replicas=2))
    scene.run(3_000)
    for _ in range(8):
        scene.ask("d", service_ms=3_000)
    scene.run(2_500)
    assert len(where(scene, "d")) == 2, "the burst got a second replica"
    scene.run(2_000)
    scene.apply(deployment("a"))
    scene.ask("a")
    scene.run(4_000)
    assert scene.served["a"] == 1, "the replica above the reservation made room"
    assert len(where(scene, "d")) == 1
    assert scene.served["d"] == 8


def test_rest_gives_burst_replicas_back_without_dropping_a_call() -> None:
    scene = full_world(accelerators=2)
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1, max_replicas=2))
    scene.run(3_000)
    for _ in range(8):
        scene.ask("d", service_ms=3_000)
    scene.run(2_500)
    assert len(where(scene, "d")) == 2
    for _ in range(40):
        scene.ask("d", service_ms=400)
        scene.run(500)
    assert len(where(scene, "d")) == 1
    assert scene.served["d"] == 48


# --- regions ----------------------------------------------------------------------------------------------------------


def two_regions() -> World:
    scene = World(FAST)
    scene.add_gateway("gw")
    scene.join(node("eu1", gb=4, region="eu"), node("us1", gb=4, region="us"))
    return scene


def test_borrows_in_the_next_region_when_home_is_full_and_returns_when_it_is_not() -> None:
    scene = two_regions()
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1, regions=("eu",)))
    scene.run(2_000)
    scene.apply(deployment("a", regions=("eu", "us")))
    scene.ask("a")
    scene.run(3_000)
    assert where(scene, "a") == ["us1"]
    scene.deployments.pop("d")
    scene.tell(plan.EndpointRemoved("d"))
    for _ in range(60):
        scene.ask("a", service_ms=200)
        scene.run(500)
    assert where(scene, "a") == ["eu1"], "home again, under traffic"
    assert scene.served["a"] == 61
    rules = [c.reason.rule for c in scene.log if isinstance(c, plan.Start)]
    assert "return_home" in rules


def test_borrows_when_home_is_dead_and_returns_when_it_is_back() -> None:
    scene = two_regions()
    scene.apply(deployment("a", regions=("eu", "us"), min_replicas=1))
    scene.run(2_000)
    assert where(scene, "a") == ["eu1"]
    scene.lose_node("eu1")
    scene.run(3_000)
    assert where(scene, "a") == ["us1"]
    scene.join(node("eu1", gb=4, region="eu"))
    scene.run(30_000)
    assert where(scene, "a") == ["eu1"]


def test_bound_to_a_dead_region_is_refused_by_name_and_served_nowhere_else() -> None:
    scene = two_regions()
    scene.apply(deployment("a", regions=("eu",)))
    scene.apply(deployment("b", regions=("eu", "us")))
    scene.run(2_000)
    scene.lose_node("eu1")
    scene.ask("a")
    scene.run(5_000)
    assert scene.gateways["gw"].routes["a"].refusal == "", "it may only be starting again: held"
    scene.run(60_000)
    route = scene.gateways["gw"].routes["a"]
    assert (route.refusal, route.state, route.targets) == ("residency_denied", EndpointState.FAILED, ())
    assert route.reason == "no node in eu; it may not run elsewhere"
    assert scene.gateways["gw"].routes["b"].refusal == ""
    starts = [c for c in scene.log if isinstance(c, plan.Start) and c.deployment.endpoint == "a"]
    assert {c.node for c in starts} == {"eu1"}
    scene.join(node("eu1", gb=4, region="eu"))
    scene.run(1)
    assert scene.gateways["gw"].routes["a"].refusal == ""
    scene.run(5_000)
    assert scene.served["a"] == 1


def test_without_any_node_nothing_is_denied_yet() -> None:
    scene = World(FAST)
    scene.add_gateway("gw")
    scene.apply(deployment("a", regions=("eu",)))
    scene.run(1_000)
    assert scene.gateways["gw"].routes["a"].refusal == ""
