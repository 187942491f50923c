"""Models that must be fetched first: one node does it ahead of demand, placement and estimates know who has them."""

from dataclasses import replace

from tests.policy.world import GB, World, deployment, node
from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, EndpointState
from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.reconcile import CoreSettings

SETTINGS = CoreSettings(wait_ms_max=2_000, residency_ms_min=100)


def remote(name: str, **changes: object) -> Deployment:
    made = deployment(name, **changes)
    return replace(made, model=replace(made.model, source=f"hf://acme/{name}@0"))


def fleet(*nodes: str) -> World:
    scene = World(SETTINGS)
    scene.add_gateway("gw")
    for name in nodes:
        scene.join(node(name, 2, 8))
        scene.tell(plan.WeightsChanged(name, ()))
    return scene


def of_kind(scene: World, kind: type) -> list[plan.Command]:
    return [command for command in scene.log if isinstance(command, kind)]


def tier(scene: World, endpoint: str) -> Tier:
    return next(e.tier for e in scene.core.view().endpoints if e.endpoint == endpoint)


def test_one_node_fetches_and_the_first_start_shares_its_fetch() -> None:
    scene = fleet("n1", "n2", "n3")
    scene.apply(remote("a"))
    (fetch,) = of_kind(scene, plan.Prefetch)
    assert isinstance(fetch, plan.Prefetch)
    assert fetch.model.source == "hf://acme/a@0"
    scene.run(1_000)
    (start,) = of_kind(scene, plan.Start)
    assert isinstance(start, plan.Start)
    assert start.node == fetch.node


def test_fetches_are_spread_over_the_home_region() -> None:
    scene = World(SETTINGS)
    scene.join(node("n1", 1), node("n2", 1), node("far", 1, region="far"))
    for name, held in (("n1", ("x",)), ("n2", ()), ("far", ())):
        scene.tell(plan.WeightsChanged(name, held))
    scene.apply(remote("a"))
    assert [command.node for command in of_kind(scene, plan.Prefetch)] == ["n2"]  # type: ignore[union-attr]


def test_what_is_on_a_disk_is_not_fetched_again_and_starts_there() -> None:
    scene = fleet("n1", "n2")
    model = remote("a").model
    scene.tell(plan.WeightsChanged("n2", (model.digest,)))
    scene.apply(remote("a"))
    scene.run(1_000)
    assert of_kind(scene, plan.Prefetch) == []
    assert [start.node for start in of_kind(scene, plan.Start)] == ["n2"]  # type: ignore[union-attr]


def test_a_node_that_joins_later_fetches_what_its_region_lacks() -> None:
    scene = World(SETTINGS)
    scene.apply(remote("a"))
    scene.join(node("n1", 1))
    assert of_kind(scene, plan.Prefetch) == []  # it has not said what it has
    scene.tell(plan.WeightsChanged("n1", ()))
    assert len(of_kind(scene, plan.Prefetch)) == 1


def test_a_fetch_dies_with_its_node_and_the_next_report_finds_another() -> None:
    scene = fleet("n1")
    scene.apply(remote("a", paused=True))
    scene.lose_node("n1")
    scene.join(node("n2", 1))
    scene.tell(plan.WeightsChanged("n2", ()))
    assert [command.node for command in of_kind(scene, plan.Prefetch)] == ["n1", "n2"]  # type: ignore[union-attr]


def test_the_tier_and_the_estimate_tell_remote_from_disk() -> None:
    scene = fleet("n1")
    scene.apply(remote("a", gb=4, paused=True))
    scene.tell(plan.WeightsChanged("n1", ()))  # the fetch did not succeed
    assert tier(scene, "a") is Tier.REMOTE
    costs = scene.core._fleet.costs
    model = remote("a").model
    assert costs.activation_ms(model.digest, "n1", Tier.REMOTE, 4 * GB) > costs.activation_ms(
        model.digest, "n1", Tier.DISK, 4 * GB
    )
    scene.tell(plan.WeightsChanged("n1", (model.digest,)))
    assert tier(scene, "a") is Tier.DISK
    assert scene.core.view().hosts[0].on_disk == (model.digest,)


def test_how_far_a_fetch_is_reaches_the_endpoint() -> None:
    scene = fleet("n1")
    scene.apply(remote("a"))
    (start,) = of_kind(scene, plan.Start)
    assert isinstance(start, plan.Start)
    for reason, shown in (("downloading 40 %", "downloading 40 %"), ("", "loading from disk")):
        scene.tell(plan.ReplicaChanged(plan.ReplicaStatus(start.replica, "a", "n1", 1, S.STARTING, reason=reason)))
        seen = next(e for e in scene.core.view().endpoints if e.endpoint == "a")
        assert (seen.state, seen.reason) == (EndpointState.LOADING, shown)
        assert scene.gateways["gw"].routes["a"].reason == shown


def test_a_local_model_is_never_fetched() -> None:
    scene = fleet("n1")
    scene.apply(deployment("a"))
    scene.run(1_000)
    assert of_kind(scene, plan.Prefetch) == []
    assert len(of_kind(scene, plan.Start)) == 1
