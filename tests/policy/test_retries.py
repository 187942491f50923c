"""A load that fails is tried again within a stated bound, for as long as it fails, and says why all the while."""

from dataclasses import replace
from itertools import pairwise

from tests.policy.test_reconcile import seen
from tests.policy.world import World, deployment, node
from tidegate.domain.endpoint import EndpointState
from tidegate.policy.reconcile.settings import CoreSettings

BOUND_MS = 60_000


def test_a_first_load_nobody_asked_for_is_tried_again_within_a_minute_for_as_long_as_it_fails() -> None:
    scene = World(replace(CoreSettings(), residency_ms_min=0))
    scene.add_gateway("gw")
    scene.join(node("n1", 1, 8))
    scene.faults["start"] = 1.0
    scene.apply(deployment("a"))
    began, starts = scene.now, []
    while scene.now < began + 600_000:
        before = sum(type(command).__name__ == "Start" for command in scene.log)
        scene.run(1_000)
        if sum(type(command).__name__ == "Start" for command in scene.log) > before:
            starts.append(scene.now)
        view = seen(scene, "a")
        if len(starts) >= 2:
            assert "scripted fault" in view.reason or view.state is EndpointState.LOADING, view
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert max(gaps) < BOUND_MS
    assert starts[-1] > began + 600_000 - BOUND_MS, "it never gives up"
    assert len(starts) < 60, "and it pauses"
    scene.faults["start"] = 0.0
    scene.run(BOUND_MS)
    assert seen(scene, "a").state in (EndpointState.READY, EndpointState.IDLE)
