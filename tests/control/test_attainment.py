"""Attainment, availability and the error budget, folded from what gateways count; activation bounds as published."""

import random
from collections import deque
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.control.world import running
from tests.loop import on_loop, until
from tidegate.control.attainment import WINDOWS, Attainment, Kept
from tidegate.control.meters import Meters
from tidegate.control.promises import bound, bounds_by_size
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.wire.internal import ServiceReported

E = "acme/a"


def told(gateway: str, served: int, attained: int, failed: int, *, baseline: bool = False) -> ServiceReported:
    return ServiceReported(gateway, E, served, attained, failed, baseline)


def test_counts_are_absolute_so_a_lost_or_doubled_report_does_no_harm() -> None:
    kept = Attainment()
    for report in (told("g1", 10, 9, 0), told("g1", 10, 9, 0), told("g1", 30, 28, 1), told("g2", 5, 5, 0)):
        kept.report(report, 1_000)
    five = kept.kept(E, 1_000)["5m"]
    assert five == Kept(35, 33, 1)
    assert (five.attainment, five.availability) == (33 / 36, 35 / 36)


def test_what_was_counted_before_a_link_is_not_counted_again() -> None:
    kept = Attainment()
    kept.report(told("g1", 1_000, 900, 5, baseline=True), 1_000)
    kept.report(told("g1", 1_002, 902, 5), 2_000)
    assert kept.kept(E, 2_000)["30d"] == Kept(2, 2, 0)
    kept.gateway_lost("g1")
    kept.report(told("g1", 1_002, 902, 5, baseline=True), 3_000)
    assert kept.kept(E, 3_000)["30d"] == Kept(2, 2, 0)


def test_each_window_forgets_what_is_older_than_it() -> None:
    kept = Attainment()
    now_ms = 1_800_000_000_000
    kept.report(told("g1", 4, 4, 0), now_ms)
    for name, (bucket_ms, count) in WINDOWS.items():
        assert kept.kept(E, now_ms + bucket_ms * (count - 1))[name].served == 4
        assert kept.kept(E, now_ms + bucket_ms * count)[name].requests == 0
    assert [bucket_ms * count for bucket_ms, count in WINDOWS.values()] == [
        300_000,
        3_600_000,
        86_400_000,
        2_592_000_000,
    ]


def test_memory_is_bounded() -> None:
    kept, dice = Attainment(), random.Random(1)
    now_ms = 0
    for number in range(1, 3_000):
        now_ms += dice.randrange(1, 3_600_000)
        kept.report(told("g1", number, number, 0), now_ms)
    assert sum(len(ring) for ring in kept._rings[E].values()) <= 360
    kept.forget(E)
    assert not kept._rings
    assert not kept._last


moments = st.lists(
    st.tuples(st.integers(1, 90_000_000), st.integers(0, 9), st.integers(0, 3), st.booleans()), min_size=1, max_size=40
)


@given(moments)
def test_what_is_saved_at_any_moment_and_restored_is_what_was_counted(
    moments: list[tuple[int, int, int, bool]],
) -> None:
    """One process that lives on beside others that take over from each other: the same windows at every moment."""
    steady, mortal = Attainment(), Attainment()
    stored: dict[tuple[object, ...], tuple[object, ...]] = {}
    now_ms, served, failed = 1_800_000_000_000, 0, 0
    for gap_ms, more, misses, dies in moments:
        now_ms, served, failed = now_ms + gap_ms, served + more, failed + misses
        steady.report(told("g1", served, served, failed), now_ms)
        mortal.report(told("g1", served, served, failed), now_ms)
        if dies:
            rows, _ = mortal.unsaved()
            mortal.unsaved_again(rows, ())  # once the store was away
            rows, _ = mortal.unsaved()
            stored.update({row[:3]: row for row in rows})
            mortal = Attainment()
            mortal.restore(list(stored.values()), now_ms)  # type: ignore[arg-type]
            mortal.report(told("g1", served, served, failed, baseline=True), now_ms)
        assert mortal.kept(E, now_ms) == steady.kept(E, now_ms)


def test_a_removed_endpoint_is_removed_from_the_store_too() -> None:
    kept = Attainment()
    kept.report(told("g1", 4, 4, 0), 1_000)
    kept.forget(E)
    assert kept.unsaved() == ([], {E})
    kept.unsaved_again([], {E})
    kept.report(told("g1", 1, 1, 0), 2_000)
    rows, gone = kept.unsaved()
    assert (len(rows), gone) == (4, {E}), "removed first, then counted anew"


@on_loop
async def test_service_levels_outlive_the_control_plane(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node()
        await world.apply(E)
        gateway = await world.gateway()
        await gateway.link.send(told("g1", 8, 7, 2))
        await until(lambda: world.control.meters.attainment.kept(E, world.clock.now_ms())["5m"].requests, "the report")
        before = await world.endpoint(E)
    async with running(tmp_path) as world:
        after = await world.endpoint(E)
        assert after["slo_status"] == before["slo_status"]
        assert after["slo_status"]["30d"]["requests"] == 10
        assert after["slo_since_ms"] <= before["slo_since_ms"]


def test_the_error_budget_is_what_is_left_of_the_allowed_misses() -> None:
    assert Kept(1_000, 995, 0).budget_left(99) == 0.5
    assert Kept(990, 980, 10).budget_left(99) == -1.0
    assert Kept(0, 0, 0).budget_left(99) is None
    assert Kept(0, 0, 0).attainment is None


def test_bounds_by_size_join_endpoints_of_one_size_and_leave_out_sizes_without_any() -> None:
    meters = Meters(1_000)
    for name, took_ms in (("a/small", 10), ("a/little", 30), ("a/large", 500)):
        meters.activation_ms[name] = {"host": deque([took_ms])}
    sizes = {"a/small": 1, "a/little": 1 << 30, "a/large": (1 << 30) + 1, "a/quiet": 1 << 40}
    model = ModelProfile("/m", "d", ModelKind.GENERATIVE, 0, 0, 1)
    wanted = [Deployment(n, "a", replace(model, weight_bytes=b), Mode.SERVERLESS) for n, b in sizes.items()]
    small, large = bounds_by_size(wanted, meters)
    assert (small.size, small.tiers["host"].count, small.tiers["host"].p50_ms) == ("up to 1 GiB", 2, 10)
    assert (large.size, large.tiers["host"].p99_ms) == ("up to 4 GiB", 500)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=200))
def test_bounds_are_times_that_were_measured_and_in_order(times: list[int]) -> None:
    made = bound(times)
    assert {made.p50_ms, made.p95_ms, made.p99_ms} <= set(times)
    assert min(times) <= made.p50_ms <= made.p95_ms <= made.p99_ms <= max(times)
    assert sum(t <= made.p95_ms for t in times) >= 0.95 * len(times)


@on_loop
async def test_an_endpoint_shows_its_limits_bounds_and_attainment(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node()
        gateway = await world.gateway()
        fresh = await world.apply(E, slots=4, max_replicas=3)
        assert fresh["concurrency"] == {"current": 0, "full": 12}
        assert fresh["slo_status"]["24h"] == {
            "requests": 0, "attainment": None, "availability": None, "error_budget": None
        }  # fmt: skip
        await gateway.demand(E, queued=1, arrived=1)
        await until(lambda: gateway.targets(E), "a replica")
        await gateway.link.send(told("g1", 8, 7, 2))
        await until(lambda: world.control.meters.attainment.kept(E, world.clock.now_ms())["5m"].requests, "the report")
        shown = await world.endpoint(E)
        assert shown["concurrency"] == {"current": 4, "full": 12}
        assert shown["activation_bounds"]["disk"]["count"] == 1
        assert shown["slo_status"]["1h"] == {
            "requests": 10, "attainment": 0.7, "availability": 0.8, "error_budget": 1 - 3 / 0.1
        }  # fmt: skip
        (group,) = (await world.http.get("/api/v1/activation-bounds")).json()["data"]
        assert (group["size"], group["weight_bytes_max"]) == ("up to 1 GiB", 1 << 30)
        assert group["tiers"]["disk"] == shown["activation_bounds"]["disk"]
        metrics = (await world.http.get("/metrics")).text
        for line in (
            'tidegate_endpoint_concurrency{endpoint="acme/a",limit="full"} 12.0',
            'tidegate_slo_attainment{endpoint="acme/a",window="5m"} 0.7',
            'tidegate_availability{endpoint="acme/a",window="30d"} 0.8',
            'tidegate_activation_bound_seconds{endpoint="acme/a",from_tier="disk",quantile="0.99"}',
            'tidegate_size_activation_bound_seconds{from_tier="disk",quantile="0.5",size="up to 1 GiB"}',
        ):
            assert line in metrics, line
