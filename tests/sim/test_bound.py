"""The lower bound: against enumeration where everything can be enumerated, and against runs that meet the target."""

from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.sim import api, profile, workload
from tidegate.sim.asks import Ask, Asking, heaviest_disjoint, needs
from tidegate.sim.bound import Bound, lower_bound
from tidegate.sim.workload import Traffic

FLEET = profile.load(None)
HEAD = "t_s,endpoint,input_tokens,output_tokens"
SLO_MS = 500.0


def write(path: Path, rows: list[tuple[float, str, int, int]]) -> Path:
    lines = [f"{at_ms / 1e3:.6f},{endpoint},{given_},{made}" for at_ms, endpoint, given_, made in rows]
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    return path


def bound_of(path: Path, allowed: dict[str, float], slo_ms: float = SLO_MS) -> Bound:
    return lower_bound(FLEET, path, allowed, slo_ms)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20), st.integers(1, 9)), max_size=10))
@settings(max_examples=200, deadline=None)
def test_the_heaviest_disjoint_set_is_disjoint_and_the_heaviest(raw: list[tuple[int, int, int]]) -> None:
    intervals = [(float(s), float(s + length), float(need)) for s, length, need in raw]
    chosen = sorted(intervals[k] for k in heaviest_disjoint(intervals))
    assert all(a[1] <= b[0] for a, b in pairwise(chosen))
    best = 0.0
    for mask in range(1 << len(intervals)):
        some = sorted(i for n, i in enumerate(intervals) if mask >> n & 1)
        if all(a[1] <= b[0] for a, b in pairwise(some)):
            best = max(best, sum(i[2] for i in some))
    assert sum(i[2] for i in chosen) == best


# --- against enumeration ----------------------------------------------------------------------------------------------


def in_time(asks: list[Ask], accelerators: int) -> bool:
    """Whether so many accelerators, as one fluid, have each prefill done in time: true iff no interval of time is
    asked for more than it has (preemptive scheduling with release times and due dates, Horn 1974).
    """
    dues = [ask.prefilled_ms + SLO_MS for ask in asks]
    for start in {ask.at_ms for ask in asks}:
        for end in dues:
            work = sum(a.prefill_ms for a, due in zip(asks, dues, strict=True) if a.at_ms >= start and due <= end)
            if work and work > accelerators * (end - start) * (1 + 1e-9):
                return False
    return True


def enumerated(by_endpoint: dict[str, list[Ask]], may_miss: dict[str, int]) -> int:
    """The fewest accelerators on which some choice of misses, each endpoint's within its own, leaves the rest in
    time.
    """

    def choices(names: list[str]) -> list[list[Ask]]:
        if not names:
            return [[]]
        mine, rest = by_endpoint[names[0]], choices(names[1:])
        kept = combinations(mine, max(0, len(mine) - may_miss[names[0]]))
        return [[*some, *others] for some in kept for others in rest]

    found = choices(sorted(by_endpoint))
    return next(n for n in range(1, 1_000) if any(in_time(asks, n) for asks in found))


def test_the_bound_is_never_above_what_enumeration_finds(tmp_path: Path) -> None:
    """Prefills only, so that what n accelerators can do at best is known exactly."""
    tight = 0
    for seed in range(60):
        dice = Random(seed)
        rows = sorted((dice.uniform(0, 12_000), dice.choice("ab"), dice.randint(2_000, 60_000), 1) for _ in range(8))
        allowed = {name: dice.randint(0, 2) for name in "ab"}
        asks: dict[str, list[Ask]] = {}
        for at_ms, name, given_, made in rows:
            asks.setdefault(name, []).append(Asking(FLEET, name).ask(at_ms, given_, made))
        path = write(tmp_path / f"{seed}.csv", rows)
        found = bound_of(path, {name: float(count) for name, count in allowed.items()})
        most = enumerated(asks, {name: allowed[name] for name in asks})
        assert found.accelerators <= most, f"seed {seed}"
        for name in asks:
            assert found.alone[name] <= enumerated({name: asks[name]}, allowed), f"seed {seed}, {name} alone"
        all_together = bound_of(path, {"": float(sum(allowed.values()))})
        assert all_together.accelerators <= most, f"seed {seed}: the misses of all may be anybody's"
        tight += found.accelerators > 1
    assert tight > 10, "a bound that always says one accelerator is never wrong either"


def test_what_is_left_of_a_window_fits_what_it_is_said_to_need() -> None:
    """Each part of what is asked is a bound for any subset: dropping requests never makes a window ask for more."""
    dice = Random(5)
    asking = Asking(FLEET, "e")
    asks = [asking.ask(dice.uniform(0, 60_000), dice.randint(10, 9_000), dice.randint(1, 400)) for _ in range(40)]
    asks.sort()
    whole = needs(asks, 64_000.0, SLO_MS, asking.weight_bytes)
    whole.sort()
    for _ in range(50):
        some = [ask for ask in asks if dice.random() < 0.7]
        part = needs(some, 64_000.0, SLO_MS, asking.weight_bytes)
        dropped = len(asks) - len(some)
        assert sum(part.times_ms) <= sum(whole.times_ms) * (1 + 1e-9)
        assert sum(whole.without_largest(dropped).times_ms) <= sum(part.times_ms) * (1 + 1e-9)
        assert sum(whole.without_largest(dropped).volumes) <= sum(part.volumes) * (1 + 1e-9)


# --- against runs -----------------------------------------------------------------------------------------------------


def test_long_answers_decode_together(tmp_path: Path) -> None:
    """One after the other they would take three accelerators, beside each other one."""
    path = write(tmp_path / "busy.csv", [(k * 400.0, "e", 1_200, 300 + 400 * (k % 3)) for k in range(600)])
    run = api.simulate(path, policy="tidegate", accelerators=1, slo_ttft_ms=SLO_MS)
    assert run["slo_attainment"] >= 0.99
    assert bound_of(path, {"": 6.0}).accelerators == 1


def heavy(seed: int) -> list[tuple[float, str, int, int]]:
    """Three endpoints of which one asks for more than an accelerator has, now and then."""
    dice = Random(seed)
    traffic = [
        Traffic("storm", "on_off", dice.uniform(2.0, 6.0), dice.choice((3_000, 9_000)), dice.choice((20, 400, 1_500))),
        Traffic("steady", "poisson", dice.uniform(1.0, 3.0), 800, dice.choice((50, 300))),
        Traffic("bursts", "gamma", 1.0, 6_000, 30, cv=6.0),
    ]
    return list(workload.rows(traffic, 120_000.0, seed))


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_meets_the_target_on_fewer_than_the_bound(tmp_path: Path, seed: int) -> None:
    rows = heavy(seed)
    path = write(tmp_path / "t.csv", rows)
    counts = {name: sum(1 for row in rows if row[1] == name) for name in ("storm", "steady", "bursts")}
    each = {name: count * 0.1 for name, count in counts.items() if count >= 100}
    each[""] = sum(count * 0.1 for count in counts.values() if count < 100)
    for allowed in (each, {"": len(rows) * 0.1}):
        bound = bound_of(path, allowed)
        if bound.accelerators == 1:
            continue
        run = api.simulate(path, policy="tidegate", accelerators=bound.accelerators - 1, slo_ttft_ms=SLO_MS)
        met = run["slo_attainment"] >= 0.9
        if len(allowed) > 1:
            met = run["endpoint_attainment_min"] >= 0.9 and run["pooled_rest_attainment"] >= 0.9
        assert not met, f"served on {bound.accelerators - 1}, and the bound says {bound.accelerators}"


def test_a_storm_that_one_endpoint_cannot_be_spared_is_found(tmp_path: Path) -> None:
    """Of all requests 1 % may miss, and the storm is less than that; of the storm's own, 1 % may."""
    calm = [(k * 100.0, f"calm-{k % 4}", 100, 5) for k in range(12_000)]
    storm = [(600_000.0 + k * 100.0, "storm", 30_000, 2) for k in range(110)]
    path = write(tmp_path / "t.csv", sorted([*calm, *storm]))
    each = {f"calm-{k}": 30.0 for k in range(4)} | {"storm": 1.0}
    found = bound_of(path, each)
    assert found.alone["storm"] >= 10  # ten prefills of two seconds each come every second
    assert found.accelerators >= found.alone["storm"]
    assert set(found.alone) == set(each)
    assert all(found.alone[f"calm-{k}"] == 1 for k in range(4))
    assert found.peak is not None
    assert found.peak.from_s <= 640.0
    assert found.peak.to_s >= 600.0
    assert bound_of(path, {"": 121.0}).accelerators == 1
