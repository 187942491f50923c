"""How many replicas: concurrency, headroom, windows of an endpoint's own, and what was measured of its replicas."""

import pytest

from tests.policy.test_reconcile import FAST, kinds, seen, world
from tests.policy.world import World, deployment
from tidegate.domain import plan
from tidegate.domain.endpoint import Scaling
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.forecast import ServiceTime
from tidegate.policy.scaling import PeakWindow, decide, pressing, replicas


@pytest.mark.parametrize(
    ("load", "minimum", "maximum", "peak", "warm", "required", "retained"),
    [
        (0, 0, 4, 0, False, 0, 0),
        (0, 0, 4, 0, True, 0, 1),
        (1, 0, 4, 0, True, 1, 1),
        (9, 0, 4, 1, True, 2, 2),
        (90, 0, 4, 1, True, 4, 4),
        (1, 0, 4, 3, True, 1, 3),
        (0, 2, 4, 3, False, 2, 2),
    ],
)
def test_scaling_table(
    load: int, minimum: int, maximum: int, peak: int, warm: bool, required: int, retained: int
) -> None:
    reactive = replicas(load, deployment("a", slots=8, concurrency_target=8))
    assert decide(reactive, minimum, maximum, recent_peak=peak, keep_warm=warm) == (required, retained)


def test_the_window_forgets_a_peak_after_its_length() -> None:
    window = PeakWindow(60_000)
    window.push(0, 5)
    window.push(30_000, 1)
    assert window.peak(59_000) == 5
    assert window.peak(75_000) == 1
    assert window.peak(200_000) == 0


@pytest.mark.parametrize(
    ("load", "slots", "percent", "wanted"),
    [(0, 4, 50, 0), (8, 0, 0, 1), (8, 1, 0, 2), (8, 0, 25, 2), (16, 0, 25, 3), (16, 9, 25, 4), (1, 7, 0, 1)],
)
def test_headroom_is_the_larger_of_slots_and_share_and_none_without_load(
    load: int, slots: int, percent: int, wanted: int
) -> None:
    scaling = Scaling(headroom_slots=slots, headroom_percent=percent)
    assert replicas(load, deployment("a", slots=8, concurrency_target=8, scaling=scaling)) == wanted


@pytest.mark.parametrize(
    ("queued", "in_flight", "ready", "rate", "load"),
    [
        (0, 0, 1, 4.0, 0),
        (6, 8, 1, None, 14),  # nothing measured: all that is held asks for room
        (6, 8, 1, 4.0, 10),  # four a second, and a second of the two promised: four of the six will be served in time
        (6, 8, 2, 4.0, 8),
        (6, 8, 0, 4.0, 14),  # nobody serves
        (3, 0, 1, 100.0, 1),  # never none while something waits
    ],
)
def test_what_is_reached_in_time_at_the_measured_rate_asks_for_no_replica(
    queued: int, in_flight: int, ready: int, rate: float | None, load: int
) -> None:
    assert pressing(queued, in_flight, ready, rate, 2_000) == load


def test_the_rate_is_measured_only_while_replicas_have_all_they_can_do() -> None:
    service = ServiceTime()
    for second in range(1, 21):
        service.observe(second * 1_000, 1, 1)
    assert service.served_per_s is None, "one request a second came; it says nothing of how many would have been served"
    for second in range(21, 31):
        service.observe(second * 1_000, 16, 10, full=2)
    assert service.served_per_s == pytest.approx(5.0)


def test_load_is_remembered_for_about_a_minute() -> None:
    service = ServiceTime()
    for second in range(1, 301):
        service.observe(second * 1_000, 6, 3)
    assert service.at_once(300_000, 6) == pytest.approx(6.0, rel=0.02)
    assert service.at_once(360_000, 0) == pytest.approx(3.0, rel=0.05)
    assert service.at_once(3_600_000, 0) < 0.2, "also when no report has come since"


def test_a_replica_goes_where_its_neighbours_had_less_to_do() -> None:
    """Both accelerators have room, and the one that comes first has a neighbour with all that its target allows."""
    scene = world("heavy", accelerators=2, gb=8)
    for _ in range(60):
        scene.ask("heavy", service_ms=3_900)
        scene.run(1_000)
    scene.apply(deployment("new"))
    scene.ask("new")
    scene.run(2_000)
    places = [{p for r in seen(scene, name).replicas for p in r.accelerators} for name in ("heavy", "new")]
    assert places == [{"acc-0"}, {"acc-1"}]


def awake(scene: World, endpoint: str = "a") -> int:
    return sum(r.state is S.READY for r in seen(scene, endpoint).replicas)


def pool(**scaling: int) -> World:
    """Room for three replicas of an endpoint that is up."""
    scene = world(accelerators=3, gb=4)
    scene.apply(deployment("a", max_replicas=3, scaling=Scaling(**scaling)))
    scene.ask("a")
    scene.run(2_000)
    return scene


@pytest.mark.parametrize(("up_ms", "early"), [(0, 2), (3_000, 1)])
def test_one_more_comes_only_once_it_was_wanted_for_the_up_window(up_ms: int, early: int) -> None:
    scene = pool(up_window_ms=up_ms)
    for _ in range(8):
        scene.ask("a", service_ms=10_000)
    scene.run(2_500)
    assert awake(scene) == early
    scene.run(2_500)
    assert awake(scene) == 2
    wanted = [c.reason for c in scene.log if isinstance(c, plan.Start | plan.Wake) and c.reason.rule == "scale_out"]
    assert dict(wanted[0].inputs)["required"] == 2, "and the audit log says how many were wanted"


def test_a_load_shorter_than_the_up_window_brings_nothing_but_the_first_is_never_delayed() -> None:
    scene = pool(up_window_ms=60_000)
    for _ in range(8):
        scene.ask("a", service_ms=500)
    scene.run(20_000)
    assert kinds(scene, "a") == ["Start"]
    assert scene.served["a"] == 9


@pytest.mark.parametrize(("down_ms", "left"), [(None, 1), (1_000, 1), (60_000, 2)])
def test_a_surplus_stays_for_the_down_window(down_ms: int | None, left: int) -> None:
    scene = pool(**{} if down_ms is None else {"down_window_ms": down_ms})
    for _ in range(8):
        scene.ask("a", service_ms=1_500)
    scene.run(3_000)
    assert awake(scene) == (2 if down_ms != 1_000 else 1), "two while they were needed"
    scene.run(2 * FAST.stable_window_ms)
    assert awake(scene) == left


@pytest.mark.parametrize(("zero_ms", "left"), [(0, 0), (5_000, 0), (600_000, 1)])
def test_the_last_replica_stays_for_the_zero_window(zero_ms: int, left: int) -> None:
    scene = pool(zero_window_ms=zero_ms)
    scene.run(FAST.idle_ms_max // 2)
    assert awake(scene) == left
    assert ("Sleep" in kinds(scene, "a")) is (left == 0)


def test_a_change_of_windows_needs_no_new_replica() -> None:
    scene = pool(zero_window_ms=600_000)
    scene.apply(deployment("a", max_replicas=3, scaling=Scaling(zero_window_ms=1_000, down_window_ms=1_000)))
    scene.run(3_000)
    assert kinds(scene, "a") == ["Start", "Drain", "Sleep"]


def test_headroom_takes_free_room_and_nobodys_place() -> None:
    scene = pool(headroom_slots=4)
    scene.ask("a", service_ms=60_000)
    scene.run(3_000)
    assert awake(scene) == 2, "four slots in use or spare are one replica, the fifth another"
    crowded = world("b", accelerators=2, gb=4)
    crowded.ask("b")
    crowded.run(2_000)
    crowded.apply(deployment("a", max_replicas=3, scaling=Scaling(headroom_slots=4)))
    for _ in range(20):
        crowded.ask("b")
        crowded.ask("a", service_ms=900)
        crowded.run(1_000)
    assert "Drain" not in kinds(crowded, "b"), "a neighbour that is asked each second keeps its place"
