"""What is measured of the fleet, as a fold over events at known instants: expected figures worked out by hand."""

import pytest

from tests.control.world import TIDES, S
from tidegate.control.meters import Meters, fleet_metrics
from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, EndpointState, Mode
from tidegate.domain.fleet import Accelerator, Node, Tier
from tidegate.policy.view import AcceleratorView, EndpointView, FleetView, ReplicaView

WHY = plan.Reason("test")
A = Deployment("acme/a", "acme", TIDES, Mode.DEDICATED_SERVERLESS)
NODE = Node("n1", "local", (Accelerator("cpu-0", "cpu", 100),), 1_000, 1_000)


def status(replica: str, endpoint: str, state: S, nbytes: int = 0, took_ms: int = 0) -> plan.ReplicaChanged:
    told = plan.ReplicaStatus(replica, endpoint, "n1", 1, state, ("cpu-0",), nbytes, took_ms=took_ms)
    return plan.ReplicaChanged(told)


def demand(endpoint: str, queued: int, oldest_wait_ms: int = 0) -> plan.DemandReported:
    return plan.DemandReported("g1", endpoint, queued, 0, 1, oldest_wait_ms)


def sample(meters: Meters, name: str, **labels: str) -> float:
    return meters.registry.get_sample_value(name, labels) or 0.0


def start(meters: Meters, replica: str, endpoint: str, at_ms: int) -> None:
    meters.command(plan.Start(replica, "n1", ("cpu-0",), A, 60, WHY), endpoint, at_ms)


def evict(meters: Meters, replica: str, endpoint: str, drain_ms: int, sleep_ms: int) -> None:
    meters.command(plan.Drain(replica, "n1", endpoint, WHY), endpoint, drain_ms)
    meters.command(plan.Sleep(replica, "n1", WHY), endpoint, sleep_ms)
    meters.event(status(replica, endpoint, S.ASLEEP), sleep_ms)


def test_an_activation_counts_from_the_first_waiting_request_and_a_swap_from_the_drain() -> None:
    meters = Meters(thrash_ms=60_000)
    meters.event(plan.NodeJoined(NODE), 1_000)
    start(meters, "ra", "acme/a", 1_000)
    meters.event(status("ra", "acme/a", S.READY, 60, took_ms=700), 1_700)
    assert meters.activation_ms_last == {"acme/a": 700}
    assert meters.start_ms == {TIDES.digest: 700}
    assert sample(meters, "tidegate_swap_seconds_count", from_tier="disk") == 0

    meters.event(demand("acme/b", 1, oldest_wait_ms=40), 10_000)  # first waited at 9,960
    meters.event(demand("acme/b", 3, oldest_wait_ms=140), 10_100)
    evict(meters, "ra", "acme/a", 10_010, 10_020)
    start(meters, "rb", "acme/b", 10_030)
    meters.event(status("rb", "acme/b", S.READY, 60), 10_530)
    assert meters.activation_ms_last["acme/b"] == 10_530 - 9_960
    assert sample(meters, "tidegate_swap_seconds_sum", from_tier="disk") == pytest.approx(0.520)
    assert sample(meters, "tidegate_reclaim_seconds_sum", from_tier="disk") == pytest.approx(0.570)
    assert meters.activations == {"acme/a": 1, "acme/b": 1}


def test_room_that_was_made_once_is_one_swap() -> None:
    meters = Meters(thrash_ms=60_000)
    start(meters, "ra", "acme/a", 0)
    meters.event(status("ra", "acme/a", S.READY, 60), 10)
    evict(meters, "ra", "acme/a", 100, 110)
    for replica, endpoint, at_ms in (("rb", "acme/b", 120), ("rc", "acme/c", 5_000)):
        start(meters, replica, endpoint, at_ms)
        meters.event(status(replica, endpoint, S.READY, 20), at_ms + 30)
    assert sample(meters, "tidegate_swap_seconds_count", from_tier="disk") == 1
    assert sample(meters, "tidegate_swap_seconds_sum", from_tier="disk") == pytest.approx(0.050)


def test_demand_that_went_away_before_anything_was_ready_is_not_waiting_any_more() -> None:
    meters = Meters(thrash_ms=60_000)
    meters.event(demand("acme/a", 1), 1_000)
    meters.event(demand("acme/a", 0), 2_000)
    start(meters, "ra", "acme/a", 50_000)
    meters.event(status("ra", "acme/a", S.READY, 60), 50_100)
    assert meters.activation_ms_last["acme/a"] == 100


def test_thrash_is_the_share_of_evictions_undone_soon() -> None:
    meters = Meters(thrash_ms=1_000)
    for at_ms, endpoint, again_ms in ((0, "acme/a", 900), (10_000, "acme/b", 11_500), (20_000, "acme/c", None)):
        replica = f"r-{endpoint}-{at_ms}"
        start(meters, replica, endpoint, at_ms)
        meters.event(status(replica, endpoint, S.READY, 60), at_ms)
        evict(meters, replica, endpoint, at_ms, at_ms)
        if again_ms is not None:
            start(meters, f"{replica}-again", endpoint, again_ms)
    assert meters.thrash_ratio() == pytest.approx(1 / 3)
    assert Meters(1).thrash_ratio() == 0


def test_a_drain_called_off_is_no_eviction() -> None:
    meters = Meters(thrash_ms=1_000)
    start(meters, "ra", "acme/a", 0)
    meters.command(plan.Drain("ra", "n1", "acme/a", WHY), "acme/a", 5)
    meters.command(plan.Resume("ra", "n1", "acme/a", WHY), "acme/a", 6)
    meters.command(plan.Stop("ra", "n1", WHY), "acme/a", 7)
    assert meters.thrash_ratio() == 0
    start(meters, "ra2", "acme/a", 8)
    assert meters.thrash_ratio() == 0


def test_a_lost_node_and_a_removed_endpoint_leave_nothing_behind() -> None:
    meters = Meters(thrash_ms=1_000)
    meters.event(plan.NodeJoined(NODE), 0)
    start(meters, "ra", "acme/a", 0)
    meters.event(status("ra", "acme/a", S.READY, 60), 10)
    meters.event(plan.NodeLost("n1"), 20)
    meters.event(demand("acme/a", 1), 30)
    start(meters, "ra2", "acme/a", 40)
    meters.event(status("ra2", "acme/a", S.READY, 60), 90)
    assert meters.activation_ms_last["acme/a"] == 60, "nothing of it was ready after the node was lost"
    meters.event(plan.EndpointRemoved("acme/a"), 100)
    assert (meters.activations, meters.activation_ms_last) == ({}, {})


def test_gauges_show_every_state_also_when_nothing_is_in_it() -> None:
    replica = ReplicaView("r1", "n1", ("cpu-0",), S.READY, 1, 60, 0, 0)
    endpoint = EndpointView(
        "acme/a", Mode.DEDICATED, EndpointState.READY, Tier.ACCELERATOR, (replica,), 1, 0, 0, 0, "", 0, 0
    )
    accelerator = AcceleratorView("n1", "cpu-0", "local", 100, 60, ("r1",))
    view = FleetView((endpoint,), (accelerator,), (), ("g1",), ())
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in fleet_metrics(view, 1, 2, {"acme/a": 1.5})
        for sample in metric.samples
    }
    assert found["tidegate_replicas", "ready"] == 1
    assert found["tidegate_replicas", "asleep"] == 0
    assert found["tidegate_endpoints", "ready"] == 1
    assert found["tidegate_accelerator_reserved_bytes", "n1", "cpu-0"] == 60
    assert found["tidegate_lent_accelerator_seconds_total", "acme/a"] == 1.5
    assert (found["tidegate_nodes",], found["tidegate_gateways",]) == (1, 2)
