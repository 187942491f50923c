"""Every state an endpoint can be shown in is truly reached, with the reason a person reads."""

from dataclasses import replace

from tests.policy.test_reconcile import FAST, seen
from tests.policy.world import World, deployment, node
from tidegate.domain import plan
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.fleet import Tier
from tidegate.domain.plan import ManualAction


def world(first_load: bool = True, accelerators: int = 1, gb: int = 8, **faults: float) -> World:
    scene = World(replace(FAST, first_load=first_load), **faults)
    scene.add_gateway("gw")
    scene.join(node("n1", accelerators, gb))
    return scene


def state(scene: World, endpoint: str = "a") -> tuple[EndpointState, str]:
    view = seen(scene, endpoint)
    return view.state, view.reason  # type: ignore[attr-defined]


def test_creating_loading_ready_idle() -> None:
    scene = world(first_load=False)
    scene.apply(deployment("a"))
    assert state(scene) == (EndpointState.CREATING, "not loaded yet")
    scene.ask("a", service_ms=2_000)
    scene.run(50)
    assert state(scene) == (EndpointState.LOADING, "loading from disk")
    scene.run(1_000)
    assert state(scene) == (EndpointState.READY, "")
    scene.run(3_000)
    assert state(scene) == (EndpointState.IDLE, "")


def test_asleep_and_waking() -> None:
    scene = world()
    scene.apply(deployment("a"))
    scene.run(3_000)
    scene.tell(ManualAction("a", "sleep"))
    scene.run(500)
    assert state(scene)[0] is EndpointState.ASLEEP
    assert seen(scene, "a").tier is Tier.HOST  # type: ignore[attr-defined]
    scene.ask("a")
    scene.run(30)
    assert state(scene) == (EndpointState.WAKING, "waking from host memory")


def test_draining() -> None:
    scene = world()
    scene.apply(deployment("a"))
    scene.run(3_000)
    scene.ask("a", service_ms=2_000)
    scene.run(50)
    scene.tell(plan.EndpointRemoved("a"))
    assert state(scene) == (EndpointState.DRAINING, "endpoint removed")


def test_paused() -> None:
    scene = world()
    scene.apply(deployment("a", paused=True))
    scene.run(1_000)
    assert state(scene) == (EndpointState.PAUSED, "paused by its owner")


def test_failed() -> None:
    scene = world(start=1.0)
    scene.apply(deployment("a"))
    scene.ask("a")
    scene.run(30_000)
    assert state(scene)[0] is EndpointState.FAILED
    assert "scripted fault" in state(scene)[1]


def test_degraded() -> None:
    """One replica serves, and the second one it needs cannot be started."""
    scene = world(accelerators=2, gb=4)
    scene.apply(deployment("a", max_replicas=2))
    scene.run(3_000)
    scene.faults["start"] = 1.0
    for _ in range(200):
        scene.ask("a", service_ms=400)
        scene.run(100)
        for _ in range(8):
            scene.ask("a", service_ms=400)
        if state(scene)[0] is EndpointState.DEGRADED:
            break
    assert state(scene)[0] is EndpointState.DEGRADED
    assert "scripted fault" in state(scene)[1]
    assert scene.gateways["gw"].routes["a"].targets, "and serves on"
