"""The capacity core against a world that knows the truth: each scene is one rule of the design."""

from dataclasses import replace

import pytest

from tests.policy.world import GB, World, deployment, node
from tidegate.domain import plan
from tidegate.domain.endpoint import EndpointState, Mode
from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.reconcile import CoreSettings, hostroom

FAST = CoreSettings(wait_ms_max=2_000, residency_ms_min=100, idle_ms_max=30_000, stable_window_ms=6_000)


def world(*names: str, accelerators: int = 1, gb: int = 8, settings: CoreSettings = FAST, **faults: float) -> World:
    scene = World(settings, **faults)
    scene.add_gateway("gw")
    scene.join(node("n1", accelerators, gb))
    for name in names:
        scene.apply(deployment(name))
    scene.run(5_000)
    return scene


def kinds(scene: World, endpoint: str) -> list[str]:
    """Commands about one endpoint's replicas, in order, without routes."""
    found = []
    for command in scene.log:
        if not isinstance(command, plan.Route):
            of = command.deployment.endpoint if isinstance(command, plan.Start) else command.replica.rsplit("-", 1)[0]
            if of == endpoint:
                found.append(type(command).__name__)
    return found


def seen(scene: World, endpoint: str) -> "object":
    return next(e for e in scene.core.view().endpoints if e.endpoint == endpoint)


def test_apply_loads_once_and_routes() -> None:
    scene = world("a")
    assert kinds(scene, "a") == ["Start"]
    route = scene.gateways["gw"].routes["a"]
    assert route.state is EndpointState.READY
    assert len(route.targets) == 1
    assert seen(scene, "a").state is EndpointState.IDLE


def test_more_endpoints_than_room_rest_in_host_memory() -> None:
    scene = world("a", "b", "c", "d")  # 4 × 4 GB on one accelerator of 8 GB
    tiers = sorted(e.tier for e in scene.core.view().endpoints)
    assert tiers == [Tier.ACCELERATOR] * 2 + [Tier.HOST] * 2


def test_eviction_keeps_the_order_of_a_safe_swap() -> None:
    scene = world("a", "b", "c")
    asleep = next(e.endpoint for e in scene.core.view().endpoints if e.tier is Tier.HOST)
    scene.log.clear()
    scene.ask(asleep)
    scene.run(1_000)
    assert scene.served[asleep] == 1
    steps = [type(c).__name__ for c in scene.log if not isinstance(c, plan.Route)]
    assert steps == ["Drain", "Sleep", "Wake"]
    assert all(c.reason.rule for c in scene.log if not isinstance(c, plan.Route))


def test_a_busy_endpoint_is_no_victim_until_the_wait_bound() -> None:
    scene = world("a", "b", "c")
    awake = [e.endpoint for e in scene.core.view().endpoints if e.tier is Tier.ACCELERATOR]
    asleep = next(e.endpoint for e in scene.core.view().endpoints if e.tier is Tier.HOST)
    for name in awake:
        for _ in range(4):
            scene.ask(name, service_ms=3_000)
    scene.run(50)
    scene.ask(asleep)
    scene.run(1_500)
    assert asleep not in scene.served, "nobody gives way while busy and within the bound"
    scene.run(6_000)
    assert scene.served[asleep] == 1
    assert "wait_bound" in {c.reason.rule for c in scene.log if isinstance(c, plan.Wake)}


def test_nobody_starves_under_continuous_traffic() -> None:
    scene = world("a", "b", "c")
    for _ in range(600):
        for name in ("a", "b", "c"):
            scene.ask(name, service_ms=120)
        scene.run(100)
    scene.run(20_000)
    bound = FAST.wait_ms_max * 4
    for name in ("a", "b", "c"):
        assert scene.served[name] == 600
        assert max(scene.waits[name]) <= bound


def test_demand_that_returns_calls_the_drain_off() -> None:
    scene = world("a", "b", "c")
    asleep = next(e.endpoint for e in scene.core.view().endpoints if e.tier is Tier.HOST)
    # The victim gets a request while its drain is under way: it must serve on, and the other finds room elsewhere.
    scene.ask(asleep)
    scene.run(1)  # the report has arrived, the drain is out, the fence is not back
    drained = next(c for c in reversed(scene.log) if isinstance(c, plan.Drain))
    scene.tell(plan.DemandReported("gw", drained.endpoint, 1, 0, 1, 5))
    assert any(isinstance(c, plan.Resume) and c.replica == drained.replica for c in scene.log)


def test_late_confirmation_of_a_called_off_drain_is_not_the_next_ones() -> None:
    scene = world("a", "b", "c")
    asleep = next(e.endpoint for e in scene.core.view().endpoints if e.tier is Tier.HOST)
    scene.ask(asleep)
    scene.run(1)
    drained = next(c for c in reversed(scene.log) if isinstance(c, plan.Drain))
    scene.tell(plan.DemandReported("gw", drained.endpoint, 1, 0, 1, 5))
    scene.tell(plan.DemandReported("gw", drained.endpoint, 0, 0, 1, 0))
    scene.tell(plan.ManualAction(drained.endpoint, "sleep"))
    again = next(c for c in reversed(scene.log) if isinstance(c, plan.Drain) and c.replica == drained.replica)
    assert again.fence > drained.fence
    before = len([c for c in scene.log if isinstance(c, plan.Sleep)])
    scene.tell(plan.FenceConfirmed("gw", drained.replica, drained.fence))
    assert len([c for c in scene.log if isinstance(c, plan.Sleep)]) == before
    scene.tell(plan.FenceConfirmed("gw", drained.replica, again.fence))
    assert len([c for c in scene.log if isinstance(c, plan.Sleep)]) == before + 1


def test_lost_gateway_counts_as_fenced() -> None:
    scene = world("a")
    scene.add_gateway("gw2")
    scene.ask("a", service_ms=60_000, gateway="gw2")
    scene.run(10)
    scene.tell(plan.ManualAction("a", "sleep"))
    scene.run(1_000)
    assert "Sleep" not in kinds(scene, "a")
    scene.lose_gateway("gw2")
    scene.run(1_000)
    assert "Sleep" in kinds(scene, "a")


def test_a_sleep_that_frees_nothing_stops_the_replica_before_the_next_wakes() -> None:
    scene = world("a", "b", settings=replace(FAST, first_load=False), gb=4)
    scene.ask("a")
    scene.run(3_000)
    scene.faults["lie"] = 1.0
    scene.log.clear()
    scene.ask("b")
    scene.run(5_000)  # World.occupy asserts that b never starts on top of a
    assert scene.served["b"] == 1
    assert [type(c).__name__ for c in scene.log if not isinstance(c, plan.Route)] == ["Drain", "Sleep", "Stop", "Start"]
    assert seen(scene, "a").reason != ""


@pytest.mark.parametrize(
    ("host_gb", "of_a", "of_b"),
    [
        (12, ["Start", "Drain", "Sleep"], ["Start", "Drain", "Sleep"]),
        (4, ["Start", "Drain", "Sleep", "Stop"], ["Start", "Drain", "Sleep", "Stop"]),  # room is kept for who is awake
        (3, ["Start", "Drain", "Stop"], ["Start", "Drain", "Stop"]),
    ],
)
def test_host_memory_is_a_budget_of_its_own(host_gb: int, of_a: list[str], of_b: list[str]) -> None:
    scene = World(replace(FAST, first_load=False))
    scene.add_gateway("gw")
    scene.join(node("n1", 1, gb=4, host_gb=host_gb))
    for name in ("a", "b", "c"):
        scene.apply(deployment(name))
    for name in ("a", "b", "c"):
        scene.ask(name)
        scene.run(3_000)
    assert scene.served == {"a": 1, "b": 1, "c": 1}
    assert kinds(scene, "a") == of_a
    assert kinds(scene, "b") == of_b


@pytest.mark.parametrize(("one_copy", "asleep"), [(True, 2), (False, 1)])
def test_a_model_is_in_host_memory_once_where_its_replicas_share_it(one_copy: bool, asleep: int) -> None:
    """Two replicas of 4 GB each on a node whose host memory has 6."""
    scene = World(replace(FAST, first_load=False))
    scene.add_gateway("gw")
    scene.join(node("n1", 2, gb=4, host_gb=6))
    scene.apply(deployment("a", max_replicas=2, slots=1, concurrency_target=1, one_copy=one_copy))
    for _ in range(2):
        scene.ask("a", service_ms=5_000)
    scene.run(8_000)
    assert len(seen(scene, "a").replicas) == 2
    scene.tell(plan.ManualAction("a", "sleep"))
    scene.run(3_000)
    assert [r.state for r in seen(scene, "a").replicas] == [S.ASLEEP] * asleep
    assert scene.core.view().hosts[0].reserved_bytes == 4 * GB
    scene.crash(next(iter(scene.truth)))  # one of them: the copy stays with the other
    scene.run(1_000)
    assert scene.core.view().hosts[0].reserved_bytes == (4 * GB if asleep == 2 else 0)
    scene.tell(plan.EndpointRemoved("a"))
    scene.run(3_000)
    assert not scene.truth
    assert scene.core.view().hosts[0].reserved_bytes == 0


def test_a_copy_leaves_host_memory_only_with_the_last_that_shares_it() -> None:
    """Three sleepers, of which two share a copy: only the one that stands alone would make room."""
    scene = World(replace(FAST, first_load=False))
    scene.add_gateway("gw")
    scene.join(node("n1", 3, gb=4, host_gb=8))
    scene.apply(deployment("pair", max_replicas=2, slots=1, concurrency_target=1, one_copy=True))
    scene.apply(deployment("alone"))
    for _ in range(2):
        scene.ask("pair", service_ms=5_000)
    scene.ask("alone")
    scene.run(8_000)
    for name in ("pair", "alone"):
        scene.tell(plan.ManualAction(name, "sleep"))
    scene.run(3_000)
    assert scene.core.view().hosts[0].reserved_bytes == 8 * GB

    def dropped(need_gb: int) -> list[str] | None:
        found = hostroom.sleepers_to_drop(scene.core._fleet, "n1", need_gb * GB, float("inf"), scene.now)
        return None if found is None else sorted(replica.endpoint for replica in found)

    assert dropped(4) == ["alone"]
    assert dropped(8) is None
    scene.crash(next(t.id for t in scene.truth.values() if t.endpoint == "pair"))
    scene.run(100)
    assert dropped(8) == ["alone", "pair"]


def test_failing_start_backs_off_shows_why_and_leaves_others_alone() -> None:
    scene = world("good")
    scene.faults["start"] = 1.0
    scene.apply(deployment("bad"))
    scene.run(30_000)
    view = seen(scene, "bad")
    assert view.state is EndpointState.FAILED
    assert view.reason == "scripted fault"
    starts = kinds(scene, "bad").count("Start")
    assert FAST.failures_max <= starts <= 8, "it pauses longer and longer"
    scene.ask("good")
    scene.run(1_000)
    assert scene.served["good"] == 1
    scene.faults["start"] = 0.0
    scene.run(120_000)
    assert seen(scene, "bad").state is not EndpointState.FAILED, "it goes on trying slowly"


def test_failed_wake_is_started_cold() -> None:
    scene = world("a", "b", "c")
    asleep = next(e.endpoint for e in scene.core.view().endpoints if e.tier is Tier.HOST)
    scene.faults["wake"] = 1.0
    scene.log.clear()
    scene.ask(asleep)
    scene.run(5_000)
    assert kinds(scene, asleep) == ["Wake", "Stop", "Start"]
    assert scene.served[asleep] == 1


def test_dedicated_is_placed_at_once_and_never_evicted() -> None:
    scene = world("a")
    scene.apply(deployment("d", mode=Mode.DEDICATED, min_replicas=1))
    scene.run(3_000)
    for round_ in range(20):
        scene.ask("a", service_ms=500)
        scene.apply(deployment(f"x{round_ % 3}"))
        scene.ask(f"x{round_ % 3}", service_ms=500)
        scene.run(700)
    assert kinds(scene, "d") == ["Start"]


def test_new_generation_serves_before_the_old_one_goes() -> None:
    scene = world("a")
    scene.ask("a", service_ms=1_500)
    scene.run(10)
    scene.log.clear()
    scene.apply(replace(deployment("a"), generation=2, slots=8))
    scene.run(4_000)
    assert kinds(scene, "a") == ["Start", "Drain", "Stop"]
    assert seen(scene, "a").replicas[0].generation == 2


def test_a_change_of_limits_needs_no_new_replica() -> None:
    scene = world("a")
    scene.log.clear()
    scene.apply(replace(deployment("a"), generation=2, max_replicas=3, price_plan="gold"))
    scene.run(3_000)
    assert kinds(scene, "a") == []


def test_removed_endpoint_drains_stops_and_is_forgotten() -> None:
    scene = world("a")
    scene.ask("a", service_ms=800)
    scene.run(10)
    scene.tell(plan.EndpointRemoved("a"))
    assert scene.gateways["gw"].routes["a"].targets == ()
    scene.run(3_000)
    assert scene.served["a"] == 1, "what was in flight finished"
    assert not scene.truth
    assert scene.core.view().endpoints == ()


def test_scales_out_and_back() -> None:
    scene = world(accelerators=4, gb=4)
    scene.apply(deployment("a", max_replicas=3))
    scene.run(2_000)
    for _ in range(12):
        scene.ask("a", service_ms=2_000)
    scene.run(1_500)
    assert len(seen(scene, "a").replicas) == 3
    scene.run(30_000)
    awake = [r for r in seen(scene, "a").replicas if r.state is S.READY]
    assert len(awake) == 1, "the surplus goes after the stable window, one stays warm"
    scene.run(60_000)
    assert seen(scene, "a").tier is Tier.HOST, "and sleeps after the keep-alive"


@pytest.mark.parametrize("action", ["pause", "manual"])
def test_pause_and_manual_sleep(action: str) -> None:
    scene = world("a")
    if action == "pause":
        scene.apply(replace(deployment("a"), generation=2, paused=True))
    else:
        scene.tell(plan.ManualAction("a", "sleep"))
    scene.run(1_000)
    assert seen(scene, "a").tier is Tier.HOST
    scene.ask("a")
    scene.run(2_000)
    served = scene.served.get("a", 0)
    assert served == (0 if action == "pause" else 1)
    if action == "manual":
        scene.tell(plan.ManualAction("a", "sleep"))
        scene.run(1_000)
        scene.tell(plan.ManualAction("a", "wake"))
        scene.run(1_000)
        assert seen(scene, "a").tier is Tier.ACCELERATOR


def test_lost_node_withdraws_routes_and_the_endpoint_comes_up_elsewhere() -> None:
    scene = world("a")
    scene.join(node("n2"))
    scene.ask("a", service_ms=5_000)
    scene.run(10)
    scene.lose_node("n1")
    assert scene.gateways["gw"].routes["a"].targets == ()
    scene.run(3_000)
    assert seen(scene, "a").replicas[0].node == "n2"
    scene.run(6_000)
    assert scene.served["a"] == 1


def test_restarted_core_takes_over_what_runs() -> None:
    scene = world("a", "b", "c")
    again = World(FAST)
    again.now = scene.now + 500
    again.truth = scene.truth
    again.add_gateway("gw")
    for name in ("a", "b", "c"):
        again.apply(deployment(name))
    again.join(scene.nodes["n1"])
    again.run(3_000)
    assert not [c for c in again.log if isinstance(c, plan.Start | plan.Stop)]
    assert again.gateways["gw"].routes["a"].version > scene.gateways["gw"].routes["a"].version
    for name in ("a", "b", "c"):
        again.ask(name)
    again.run(3_000)
    assert again.served == {"a": 1, "b": 1, "c": 1}


def test_too_large_for_any_accelerator_says_so() -> None:
    scene = world()
    scene.apply(deployment("huge", gb=100))
    scene.ask("huge")
    scene.run(5_000)
    view = seen(scene, "huge")
    assert view.reason.startswith("no accelerator is large enough")
    assert str(100 * GB) in view.reason


def test_stays_in_its_regions() -> None:
    scene = World(FAST)
    scene.add_gateway("gw")
    scene.join(node("n1", region="eu"), node("n2", region="us"))
    scene.apply(deployment("a", regions=("us",)))
    scene.apply(deployment("b", regions=("ap",)))
    scene.ask("a")
    scene.ask("b")
    scene.run(5_000)
    assert [r.node for r in seen(scene, "a").replicas] == ["n2"]
    assert seen(scene, "b").replicas == ()
    assert seen(scene, "b").reason == "no node in ap"


def test_spread_over_two_accelerators() -> None:
    scene = world(accelerators=2, gb=4)
    scene.apply(deployment("tp", accelerators_per_replica=2))
    scene.apply(deployment("one"))
    for name in ("tp", "one", "tp", "one"):
        scene.ask(name)
        scene.run(3_000)
    assert scene.served == {"tp": 2, "one": 2}


def test_batch_gives_way_at_once_and_takes_only_what_was_long_idle() -> None:
    scene = world("a", gb=4)
    scene.apply(deployment("bulk", mode=Mode.BATCH))
    for _ in range(10):
        scene.ask("a", service_ms=100)
        scene.ask("bulk", service_ms=60_000)
        scene.run(300)
    assert kinds(scene, "bulk") == [], "ten times its wake (322 ms by the prior) its owner's place is safe from batch"
    scene.run(6_000)
    assert seen(scene, "bulk").tier is Tier.ACCELERATOR
    scene.ask("a")
    scene.run(1_500)
    assert scene.served["a"] == 11
    assert kinds(scene, "bulk")[:3] == ["Start", "Drain", "Sleep"]


def test_batch_on_its_way_gives_way_at_once_too() -> None:
    scene = world("a", gb=4)
    scene.ask("a")
    scene.run(300)
    scene.apply(deployment("bulk", mode=Mode.BATCH))
    scene.ask("bulk", service_ms=60_000)
    while "Start" not in kinds(scene, "bulk"):
        scene.run(10)
    asked = len(scene.waits["a"])
    scene.ask("a", service_ms=500)
    scene.run(200)  # its start takes 400
    assert kinds(scene, "bulk")[:2] == ["Start", "Stop"]
    assert len(scene.waits["a"]) == asked + 1, "served before batch would have been ready"
    scene.run(20_000)
    assert seen(scene, "bulk").tier is Tier.ACCELERATOR, "and comes back once the owner is quiet"


def test_demand_for_a_replica_on_its_way_to_sleep_wakes_it_instead_of_starting_another() -> None:
    scene = world("a", accelerators=2)
    scene.tell(plan.ManualAction("a", "sleep"))
    (replica,) = next(iter(scene.core.view().endpoints)).replicas
    while not any(isinstance(c, plan.Sleep) for c in scene.log):
        scene.run(1)
    scene.log.clear()
    scene.ask("a")
    scene.run(2_000)
    assert scene.served["a"] == 1
    assert kinds(scene, "a") == ["Wake"]
    assert [r.replica for r in next(iter(scene.core.view().endpoints)).replicas] == [replica.replica]
