"""The public entry points on small traces, the compute model against arithmetic, the bound against runs."""

from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.domain.plan import Command, Event, Tick
from tidegate.policy.reconcile import FleetCore
from tidegate.sim import api, baselines, bound, profile, workload
from tidegate.sim.compute import CHUNK_MS, Compute, Engine, Request
from tidegate.sim.plan import plan
from tidegate.sim.workload import Traffic

KEYS = {
    "policy", "requests", "accelerators", "accelerator_hours", "busy_accelerator_hours", "slo_attainment",
    "endpoint_attainment_min", "endpoints_below_99", "ttft_ms", "activations", "cold_share", "batch_tokens",
    "thrash_ratio", "wall_s",
}  # fmt: skip


def small_trace(path: Path, endpoints: int = 8, minutes: float = 20.0, per_second: float = 0.05) -> Path:
    traffic = [Traffic(f"e{i}", "on_off", per_second, period_ms=120_000.0) for i in range(endpoints)]
    lines = ["t_s,endpoint,input_tokens,output_tokens"]
    for at_ms, endpoint, input_tokens, output_tokens in workload.rows(traffic, minutes * 60_000.0, 3):
        lines.append(f"{at_ms / 1000:.3f},{endpoint},{input_tokens},{output_tokens}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("policy", baselines.POLICIES)
def test_every_policy_serves_every_request(tmp_path: Path, policy: str) -> None:
    result = api.simulate(small_trace(tmp_path / "t.csv"), policy=policy, accelerators=4)
    assert result.keys() >= KEYS
    assert result["requests"] > 100
    assert result["refused"] == 0
    assert 0.0 < result["slo_attainment"] <= 1.0
    assert result["accelerators"] == (8 if policy == "dedicated" else 4)
    assert result["busy_accelerator_hours"] <= result["accelerator_hours"]


def test_without_a_number_of_accelerators_it_is_one_machine_of_the_fleet(tmp_path: Path) -> None:
    trace, fleet = small_trace(tmp_path / "t.csv", endpoints=2, minutes=5.0), tmp_path / "fleet.toml"
    fleet.write_text('default_model = "llama-3_1-8b-bf16"\n[node]\naccelerator = "l4"\naccelerators = 3\n')
    assert api.simulate(trace, fleet=fleet)["accelerators"] == 3
    assert api.simulate(trace)["accelerators"] == 8


def test_the_policy_needs_fewer_swaps_than_lru_and_no_more_accelerators(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.csv", endpoints=10, minutes=60.0)
    ours = api.simulate(trace, policy="tidegate", accelerators=2)
    lru = api.simulate(trace, policy="lru", accelerators=2)
    assert ours["slo_attainment"] >= lru["slo_attainment"] - 0.01
    assert ours["evictions"] <= lru["evictions"] * 1.05


def test_plan_is_between_the_bound_and_dedicated(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.csv", endpoints=6, minutes=15.0)
    result = plan(trace, attainment=0.9, slo_ttft_ms=5_000.0, policies=("tidegate", "dedicated"))
    lowest = result["lower_bound"]["accelerators"]
    assert result["lower_bound"]["name"] == bound.NAME
    assert lowest <= result["policies"]["tidegate"] <= result["policies"]["dedicated"]
    said: list[str] = []
    with ProcessPoolExecutor(2, max_tasks_per_child=16) as pool:
        again = plan(
            trace,
            attainment=0.9,
            slo_ttft_ms=5_000.0,
            policies=("tidegate", "dedicated"),
            pool=pool,
            progress=lambda policy, *_: said.append(policy),
        )
    assert again == result, "searched in two processes"
    assert {name.partition(":")[0] for name in said} == {"tidegate", "dedicated"}


def engine() -> Engine:
    fleet = profile.load(None)
    return Engine(fleet.models["qwen-14b-bf16"], fleet.accelerator, 10**10)


def finish(compute: Compute) -> dict[str, float]:
    ended = {}
    while compute.active:
        now = compute.due_ms()
        for request in compute.collect(now):
            ended[request.id] = now
    return ended


def test_one_request_alone_takes_prefill_plus_decode() -> None:
    compute = Compute({"r": engine()})
    compute.submit("r", Request("1", "e", 0.0, 1_000, 101), 0.0)
    ended = finish(compute)
    e = compute.engines["r"]
    prefill = 1_000 * e.flop_ms
    assert prefill == pytest.approx(66.4, abs=0.1)  # 2 × 14.8e9 × 1000 ÷ (990e12 × 0.45) s
    decode = 100 * (e.weight_ms + 1_000 * e.kv_ms)
    assert ended["1"] == pytest.approx(prefill + decode, rel=0.01)


def test_two_engines_on_one_accelerator_take_turns() -> None:
    alone = Compute({"a": engine()})
    alone.submit("a", Request("1", "e", 0.0, 10, 1_001), 0.0)
    shared = Compute({"a": engine(), "b": engine()})
    shared.submit("a", Request("1", "e", 0.0, 10, 1_001), 0.0)
    shared.submit("b", Request("2", "f", 0.0, 10, 1_001), 0.0)
    assert finish(shared)["2"] == pytest.approx(2.0 * finish(alone)["1"], rel=0.05)


def test_a_replica_over_several_accelerators_takes_its_part_of_each() -> None:
    fleet = profile.load(None)
    model, hardware = fleet.models["qwen-14b-bf16"], fleet.accelerator
    pair = Engine(model, hardware, 10**10, ("a", "b"))
    alone = Compute({"pair": pair})
    alone.submit("pair", Request("1", "e", 0.0, 10, 1_001), 0.0)
    ms_alone = finish(alone)["1"]
    one = Compute({"a": engine()})
    one.submit("a", Request("1", "e", 0.0, 10, 1_001), 0.0)
    assert finish(one)["1"] == pytest.approx(1.9 * ms_alone, rel=0.01), "twice as fast, less 5 % for the all-reduces"
    beside = Compute(
        {"pair": Engine(model, hardware, 10**10, ("a", "b")), "b": Engine(model, hardware, 10**10, ("b",))}
    )
    beside.submit("pair", Request("1", "e", 0.0, 10, 1_001), 0.0)
    beside.submit("b", Request("2", "f", 0.0, 10, 3_001), 0.0)
    assert finish(beside)["1"] == pytest.approx(2.9 * ms_alone, rel=0.01), "it waits for the busier of its two"
    assert beside.busy_ms["b"] > beside.busy_ms["a"]


def test_a_batch_shares_the_reading_of_weights() -> None:
    compute = Compute({"a": engine()})
    for number in range(8):
        compute.submit("a", Request(str(number), "e", 0.0, 10, 1_001), 0.0)
    one = Compute({"a": engine()})
    one.submit("a", Request("x", "e", 0.0, 10, 1_001), 0.0)
    assert max(finish(compute).values()) < 1.3 * finish(one)["x"]


@given(
    st.lists(st.tuples(st.floats(0.0, 5_000.0), st.integers(1, 30_000), st.integers(1, 500)), min_size=1, max_size=12)
)
@settings(max_examples=80, deadline=None)
def test_every_request_ends_once_and_kv_is_given_back(arrivals: list[tuple[float, int, int]]) -> None:
    compute = Compute({"r": engine()})
    ended: list[str] = []
    for number, (at_ms, input_tokens, output_tokens) in enumerate(sorted(arrivals)):
        while compute.due_ms() <= at_ms:
            ended += [r.id for r in compute.collect(compute.due_ms())]
        compute.submit("r", Request(str(number), "e", at_ms, input_tokens, output_tokens), at_ms)
        assert compute.due_ms() >= at_ms
        assert compute.engines["r"].pace_ms >= min(CHUNK_MS, compute.engines["r"].weight_ms)
    ended += list(finish(compute))
    assert sorted(ended, key=int) == [str(n) for n in range(len(arrivals))]
    assert compute.engines["r"].kv_free == compute.engines["r"].tokens_max


def test_arrival_processes_have_their_rate_and_burstiness() -> None:
    gaps = {}
    for shape in ("poisson", "gamma"):
        times = [r[0] for r in workload.rows([Traffic("e", shape, 1.0, cv=4.0)], 2e7, 1)]
        assert len(times) == pytest.approx(20_000, rel=0.1)
        gaps[shape] = workload.burstiness([b - a for a, b in pairwise(times)])
    assert gaps["poisson"] == pytest.approx(1.0, abs=0.05)
    assert gaps["gamma"] == pytest.approx(4.0, rel=0.15)


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    """What a run keeps is bounded by endpoints and replicas, not by requests."""
    sizes = []
    for minutes in (10.0, 80.0):
        path = small_trace(tmp_path / f"{minutes}.csv", endpoints=3, minutes=minutes, per_second=0.5)
        fleet = profile.load(None)
        summary = api.trace.summarize(path)
        setup = baselines.prepare("tidegate", fleet, api.deployments(fleet, summary, 2_000.0), 2, path)
        world = api.build_world(fleet, setup, api.Meter(2_000.0, 100.0))
        world.run(api.trace.rows(path))
        sizes.append(len(world.requests) + len(world._heap) + len(world.meter.ttft.bins))
    assert sizes[1] < sizes[0] + 400


def test_endpoints_that_wait_for_room_arm_one_timer_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overtaken timers once armed others when they rang, and each waiting endpoint looked ten times a second."""
    ticks = 0
    handle = FleetCore.handle

    def counted(core: FleetCore, event: Event, now_ms: int) -> list[Command]:
        nonlocal ticks
        ticks += isinstance(event, Tick)
        return handle(core, event, now_ms)

    monkeypatch.setattr(FleetCore, "handle", counted)
    trace = small_trace(tmp_path / "t.csv", endpoints=8, minutes=10.0)
    result = api.simulate(trace, policy="fixed-keepalive:3600", accelerators=1)
    assert result["refused"] > 0, "some wait for ever"
    assert ticks < 8 * 600
