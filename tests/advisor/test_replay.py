"""The replay against the simulator's engine, against arithmetic, and against its own cheap estimate."""

from dataclasses import replace

import numpy as np
import pytest

from tests.advisor.engine import engine_ttft_ms
from tidegate.advisor import estimate, hardware, replay, tries
from tidegate.advisor.catalogue import Offer, Rental
from tidegate.advisor.described import describe
from tidegate.advisor.hardware import Curve
from tidegate.advisor.replay import NEVER, WorkerRules
from tidegate.advisor.traffic import Traffic

ACCELERATORS, MODELS = hardware.known()


def hours(traffic: Traffic, count: float) -> Traffic:
    """The first hours of working time on the Monday."""
    start = 9 * 3.6e6
    mask = (traffic.t_ms >= start) & (traffic.t_ms < start + count * 3.6e6)
    cut = traffic.chosen(mask)
    return replace(cut, t_ms=cut.t_ms - start, span_ms=count * 3.6e6)


def fixed_curve(service_ms: list[float], slots: int = 1) -> Curve:
    work = np.array(service_ms) / slots
    return Curve("t4", 1, slots, service_ms, [0.0] * len(service_ms), [0.0] * (slots + 1), [1.0] * (slots + 1), work)


@pytest.mark.parametrize("per_day", [30_000, 120_000])
def test_one_replica_is_as_slow_as_the_engine_of_the_simulator(per_day: float) -> None:
    traffic = hours(describe("steady", per_day, 1000, 200), 1.0)
    model, accelerator = MODELS["qwen-32b-fp8"], ACCELERATORS["h100"]
    curve = hardware.curve(traffic, model, accelerator, 1, 100.0, 256)
    assert curve is not None
    engine, busy = engine_ttft_ms(traffic, model, accelerator)
    done = replay.fixed(curve, traffic.t_ms.tolist(), traffic.span_ms, 1)
    for q in (0.5, 0.95, 0.99):
        assert np.quantile(done.ttft_ms, q) == pytest.approx(np.quantile(engine, q), rel=0.15), q
    assert done.busy_ms / traffic.span_ms == pytest.approx(busy, rel=0.05)


def test_a_full_replica_conserves_work() -> None:
    """Ten requests at once on one place: the last answer comes when all their work is done."""
    curve = fixed_curve([100.0] * 10)
    done = replay.fixed(curve, [0.0] * 10, 1_000.0, 1)
    assert done.ttft_ms.tolist() == [100.0 * (k + 1) for k in range(10)]
    two = replay.fixed(curve, [0.0] * 10, 1_000.0, 2)
    assert two.ttft_ms.max() == 500.0


def test_a_worker_is_paid_from_its_start_to_its_idle_end() -> None:
    """The example of a vendor that billed so: 5 s of boot, 10 s of work, 10 s of idle: 25 s for one call."""
    one = replay.workers(fixed_curve([10_000.0]), [0.0], 1e6, WorkerRules(5_000.0, 10_000.0))
    assert one.intervals == [(0.0, 5_000.0, 25_000.0, 0)]
    assert one.cold == 1
    hundred = replay.workers(
        fixed_curve([10_000.0] * 100), [15_000.0 * (k > 0) + 10_000.0 * max(0, k - 1) for k in range(100)], 2e6,
        WorkerRules(5_000.0, 10_000.0),
    )  # fmt: skip
    assert hundred.intervals == [(0.0, 5_000.0, 1_015_000.0, 0)]  # 5 + 100 x 10 + 10 s


def test_a_warm_worker_is_never_cold_and_a_second_one_starts_in_a_burst() -> None:
    rules = WorkerRules(6_000.0, 1_000.0, warm=1)
    done = replay.workers(fixed_curve([300.0] * 4), [0.0, 700_000.0, 1_400_000.0, 1_400_000.0], 2e6, rules)
    assert done.cold == 0  # the fourth waits 300 ms for the warm worker instead of 6 s for the new one
    assert done.ttft_ms.tolist() == [300.0, 300.0, 300.0, 600.0]
    assert len(done.intervals) == 2  # which was started, and is paid for, all the same


def test_reactive_pools_follow_late_and_shrink_later() -> None:
    t_ms = np.sort(np.concatenate([np.arange(0, 3.6e6, 2_000.0), np.arange(1.2e6, 1.8e6, 150.0)])).tolist()
    curve = fixed_curve([1_000.0] * len(t_ms))
    done = replay.reactive(curve, t_ms, 3.6e6, 1, 0.7, 240_000.0)
    paid = sum(until - begun for begun, _, until, _ in done.intervals) / 3.6e6
    assert paid > 1.5  # replicas were added …
    assert paid < 12  # … and taken away again
    assert np.quantile(done.ttft_ms, 0.99) > 60_000  # minutes behind the jump
    assert len(done.ttft_ms) == len(t_ms)


def test_one_replay_tells_the_overflow_of_every_number_of_base_replicas() -> None:
    """What k replicas let overflow is the same whether or not there are more replicas behind them."""
    traffic = hours(describe("spiky", 200_000, 300, 60), 3.0)
    curve = hardware.curve(traffic, MODELS["llama-8b"], ACCELERATORS["l4"], 1, 60.0, 4)
    assert curve is not None
    t_ms = traffic.t_ms.tolist()
    whole = replay.workers(curve, t_ms, traffic.span_ms, WorkerRules(0.0, NEVER))
    index = np.array(whole.index)
    assert index.max() >= 3
    for k in (1, 2, 3):
        kept = index < k  # k replicas alone serve these, the same on the same replica, and nobody is sent past the k-th
        subset = replace(
            curve, prefill_ms=np.array(curve.prefill_ms)[kept].tolist(), tokens=np.array(curve.tokens)[kept].tolist(),
            work_ms=curve.work_ms[kept],
        )  # fmt: skip
        part = replay.workers(subset, np.array(t_ms)[kept].tolist(), traffic.span_ms, WorkerRules(0.0, NEVER))
        assert max(part.index) == k - 1
        assert part.index == index[kept].tolist()


@pytest.mark.parametrize(("shape", "accelerator"), [("steady", "h100"), ("business-hours", "h100"), ("mixed", "h200")])
def test_the_estimate_is_within_a_tenth_of_the_replay(shape: str, accelerator: str) -> None:
    traffic = describe(shape, 8_000, 900, 150)
    curve = hardware.curve(traffic, MODELS["llama-8b"], ACCELERATORS[accelerator], 1, 100.0, 256)
    assert curve is not None
    guess = estimate.replicas(curve, traffic.t_ms, traffic.span_ms, 2_000.0)
    assert guess is not None
    t_ms = traffic.t_ms.tolist()
    enough = replay.fixed(curve, t_ms, traffic.span_ms, guess)
    assert np.quantile(enough.ttft_ms, 0.99) <= 2_000.0
    if guess > 1:
        fewer = replay.fixed(curve, t_ms, traffic.span_ms, guess - 1, 2_000.0)
        assert fewer.lost or np.quantile(fewer.ttft_ms, 0.99) > 2_000.0


def bursts(count: int, size: int) -> Traffic:
    """`size` equal requests within a second of each other, `count` times, a minute apart: what overtakes averages."""
    base = describe("steady", count * size * 24, 2_000, 27)
    base = replace(base, inputs=np.full(len(base), 2_000))
    t_ms = np.concatenate([k * 60_000.0 + np.arange(size) * 1_000.0 / size for k in range(count)])
    cut = base.chosen(np.arange(len(base)) < len(t_ms))
    return replace(cut, t_ms=t_ms, span_ms=count * 60_000.0)


@pytest.mark.parametrize("size", [20, 60, 150])
def test_the_estimate_of_bursts_is_within_a_tenth_of_the_replay(size: int) -> None:
    """A level taken over the whole day made bursts look quick: 12 % too few replicas on a real trace."""
    traffic = bursts(20, size)
    curve = hardware.curve(traffic, MODELS["qwen-32b-fp8"], ACCELERATORS["h100"], 1, 100.0, 256)
    assert curve is not None
    guess = estimate.replicas(curve, traffic.t_ms, traffic.span_ms, 2_000.0)
    needed = next(
        n for n in range(1, 64)
        if np.quantile(replay.fixed(curve, traffic.t_ms.tolist(), traffic.span_ms, n).ttft_ms, 0.99) <= 2_000.0
    )  # fmt: skip
    assert guess == pytest.approx(needed, rel=0.10)


def test_keep_warm_pings_are_billed_as_what_they_run() -> None:
    rental = Rental(name="t4", usd_per_hour=3.6)
    offer = Offer(id="x", mode="serverless", title="x", billing="execution", idle_s=600, ping_s=300, round_up_ms=100)
    assert tries.warm_usd(offer, rental, 3.6e6) == pytest.approx(12 * 0.1 * 3.6 / 3600)  # 12 pings of 100 ms
    paid = Offer(id="x", mode="serverless", title="x", billing="execution", idle_s=600, round_up_ms=100)
    assert tries.warm_usd(paid, rental, 3.6e6) == pytest.approx(3.6)
