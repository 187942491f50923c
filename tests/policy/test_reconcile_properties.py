"""Random lives of a fleet. The world asserts the safety laws at each command; here also rest, service and sameness."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.world import World, deployment, node
from tidegate.domain import plan
from tidegate.domain.endpoint import Mode
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.reconcile import CoreSettings

TIGHT = CoreSettings(wait_ms_max=2_000, residency_ms_min=100, idle_ms_max=20_000, stable_window_ms=6_000)
NAMES = ("a", "b", "c", "d", "e")

steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(NAMES), st.integers(1, 4), st.integers(10, 3_000)),
        st.tuples(st.just("apply"), st.sampled_from(NAMES), st.integers(0, 1), st.sampled_from(list(Mode))),
        st.tuples(st.just("roll"), st.sampled_from(NAMES)),
        st.tuples(st.just("pause"), st.sampled_from(NAMES)),
        st.tuples(st.just("remove"), st.sampled_from(NAMES)),
        st.tuples(st.just("manual"), st.sampled_from(NAMES), st.sampled_from(("wake", "sleep"))),
        st.tuples(st.just("crash"), st.integers(0, 9)),
        st.tuples(st.just("lose_node"), st.sampled_from(("n1", "n2"))),
        st.tuples(st.just("join_node"), st.sampled_from(("n1", "n2"))),
        st.tuples(st.just("flap_gateway")),
        st.tuples(st.just("run"), st.integers(1, 3_000)),
    ),
    max_size=40,
)
faults = st.fixed_dictionaries(
    {name: st.sampled_from((0.0, 0.0, 0.1, 0.4)) for name in ("start", "wake", "lie", "double")}
)


def live(seed: int, script: list[tuple], chances: dict[str, float]) -> World:
    scene = World(TIGHT, seed, **chances)
    scene.add_gateway("gw")
    scene.join(node("n1", 2, gb=8, host_gb=12))
    for name in NAMES[:3]:
        scene.apply(deployment(name))
    for step in script:
        act(scene, step)
        check_beliefs(scene)
    return scene


def act(scene: World, step: tuple) -> None:
    match step:
        case ("ask", name, count, service_ms):
            for _ in range(count if name in scene.deployments else 0):
                scene.ask(name, service_ms)
        case ("apply", name, minimum, mode):
            old = scene.deployments.get(name)
            generation = old.generation + 1 if old else 1
            minimum = max(minimum, 1 if mode is Mode.DEDICATED else 0)
            wanted = deployment(name, mode=mode, min_replicas=minimum, max_replicas=2, generation=generation)
            scene.apply(wanted)
        case ("roll", name) if name in scene.deployments:
            old = scene.deployments[name]
            scene.apply(replace(old, generation=old.generation + 1, slots=old.slots + 1))
        case ("pause", name) if name in scene.deployments:
            old = scene.deployments[name]
            scene.apply(replace(old, generation=old.generation + 1, paused=not old.paused))
        case ("remove", name) if name in scene.deployments:
            del scene.deployments[name]
            for gateway in scene.gateways.values():
                gateway.held.pop(name, None)
            scene.tell(plan.EndpointRemoved(name))
        case ("manual", name, action):
            scene.tell(plan.ManualAction(name, action))
        case ("crash", index) if scene.truth:
            scene.crash(list(scene.truth)[index % len(scene.truth)])
            scene.run(1)
        case ("lose_node", name) if name in scene.nodes:
            scene.lose_node(name)
        case ("join_node", name):
            scene.join(node(name, 2, gb=8, host_gb=12))
        case ("flap_gateway",):
            scene.add_gateway("gw2")
            if "a" in scene.deployments:
                scene.ask("a", 500, "gw2")
            scene.run(200)
            scene.lose_gateway("gw2")
        case ("run", duration):
            scene.run(duration)


def check_beliefs(scene: World) -> None:
    """The book covers the truth: whatever really holds memory is on it."""
    view = scene.core.view()
    for accelerator in view.accelerators:
        used = sum(
            t.nbytes
            for t in scene.truth.values()
            if t.node == accelerator.node and accelerator.accelerator in t.accelerators
        )
        assert used <= accelerator.reserved_bytes, "bytes in use that are not on the book"
        assert accelerator.reserved_bytes <= accelerator.capacity_bytes
    for host in view.hosts:
        assert host.reserved_bytes <= host.capacity_bytes


@given(st.integers(0, 1_000), steps, faults)
@settings(max_examples=150, deadline=None)
def test_any_life_keeps_the_laws_and_ends_well(seed: int, script: list[tuple], chances: dict[str, float]) -> None:
    scene = live(seed, script, chances)
    scene.faults.clear()
    if not scene.nodes:
        scene.join(node("n1", 2, gb=8, host_gb=12))
    scene.run(240_000)
    check_beliefs(scene)
    views = {e.endpoint: e for e in scene.core.view().endpoints}
    assert set(views) == set(scene.deployments), "removed endpoints are forgotten, others are not"
    pinned = {n for n, d in scene.deployments.items() if d.min_replicas and not d.paused}
    for name, view in views.items():
        states = [r.state for r in view.replicas]
        assert set(states) <= {S.READY, S.ASLEEP}, f"{name} has come to rest: {states}"
        held = sum(len(g.held.get(name, ())) for g in scene.gateways.values())
        roomy = len(pinned) <= 2 and not any(d.mode is Mode.BATCH for d in scene.deployments.values())
        if roomy and not scene.deployments[name].paused:
            assert held == 0, f"{name} still has requests held though there is room: {view.reason}"


@given(st.integers(0, 100), steps, faults)
@settings(max_examples=30, deadline=None)
def test_the_same_events_give_the_same_commands(seed: int, script: list[tuple], chances: dict[str, float]) -> None:
    assert live(seed, script, chances).log == live(seed, script, chances).log
