"""Batch work in the simulator: every line ends once, real-time work comes first, and the figures say what was idle."""

from pathlib import Path

import pytest

from tests.sim.test_laws import scene
from tests.sim.test_simulate import small_trace
from tidegate.domain import plan
from tidegate.domain.endpoint import Mode
from tidegate.domain.errors import Refusal
from tidegate.policy.reconcile import serving
from tidegate.sim import api, harvest, page, profile, workload
from tidegate.sim.faults import Faults
from tidegate.sim.timeline import Timeline

FAULTS_END_MS = 300_000.0
HEADER = "t_s,endpoint,input_tokens,output_tokens"
FEW = "\n".join([HEADER, "0,a,100,10", "1800,a,100,10", "3600,a,100,10"]) + "\n"


def job(path: Path, lines: int = 2_000) -> Path:
    path.write_text(
        "\n".join([HEADER, *(f"0,job,{1_000 + n % 7 * 300},{50 + n % 11 * 40}" for n in range(lines))]) + "\n"
    )
    return path


def test_an_idle_fleet_is_harvested(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(FEW)
    result = api.simulate(trace, accelerators=2, batch_trace=job(tmp_path / "j.csv", 6_000))
    assert result["batch_lines"] == 6_000
    assert result["batch_lines_left"] == 0
    assert result["batch_tokens"] == sum(1_050 + n % 7 * 300 + n % 11 * 40 for n in range(6_000))
    assert result["harvest_share"] > 0.9
    assert result["slo_attainment"] == 1.0


def test_lines_give_way_and_none_is_lost(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.csv", endpoints=12, minutes=12.0, per_second=0.03)
    without = api.simulate(trace, accelerators=2)
    result = api.simulate(trace, accelerators=2, batch_trace=job(tmp_path / "j.csv", 15_000))
    assert result["batch_preempted"] > 0
    assert 0 < result["batch_lines"] < 15_000
    assert result["batch_lines"] + result["batch_lines_left"] == 15_000
    assert result["requests"] == without["requests"]
    assert result["refused"] == 0
    assert result["batch_accelerator_hours"] <= result["idle_accelerator_hours"]
    assert 0.0 < result["harvest_share"] < 1.0
    assert without["batch_tokens"] == 0
    assert "batch_lines" not in without


def test_the_page_says_what_batch_did(tmp_path: Path) -> None:
    trace, timeline = tmp_path / "t.csv", Timeline()
    trace.write_text(FEW)
    result = api.simulate(trace, accelerators=2, batch_trace=job(tmp_path / "j.csv", 50), timeline=timeline)
    html = page.render(result, timeline, "t.csv")
    assert "batch lines done</dt><dd>50 <small>of 50" in html
    assert "job:batch" in html
    assert ">–</text>" in html, "no attainment of what nobody asked"


def test_batch_that_finds_no_room_does_not_look_for_it_at_every_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once did: endpoints became idle and busy by the second, and the core did nothing else any more."""
    looked = []
    activate = serving.activate

    def counted(fleet, endpoint, *rest):  # type: ignore[no-untyped-def]
        looked.append(endpoint.name)
        return activate(fleet, endpoint, *rest)

    monkeypatch.setattr(serving, "activate", counted)
    trace = small_trace(tmp_path / "t.csv", endpoints=8, minutes=10.0, per_second=1.0)
    api.simulate(trace, accelerators=2, batch_trace=job(tmp_path / "j.csv"))
    assert looked.count("job:batch") < 5 * 600  # seconds


def test_a_line_ends_once() -> None:
    jobs = harvest.Job("job", [(1, 1)], 1, 1.0)
    request = harvest.Request("1", "job", 0.0, 1, 1)
    jobs.open["1"] = (1, 1)
    jobs.asked = 1
    jobs.finished(request)
    with pytest.raises(harvest.LineLost):
        jobs.finished(request)
    jobs.asked = 2
    with pytest.raises(harvest.LineLost, match="2 lines asked, 1 done"):
        jobs.end(0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "model", "says"),
    [
        (HEADER + "\n", None, "no line in it"),
        (HEADER + "\n0,a,1,1\n0,b,1,1\n", None, "a batch has one endpoint"),
        (HEADER + "\n0,a,1,1\n", "gpt-9", "batch model 'gpt-9' is not in the fleet (llama"),
        (HEADER + "\n0,a,9000000,1\n", None, "does not fit on a node"),
    ],
)
def test_a_bad_job_is_refused(tmp_path: Path, text: str, model: str | None, says: str) -> None:
    path = tmp_path / "j.csv"
    path.write_text(text)
    with pytest.raises(Refusal) as refused:
        harvest.read(path, profile.load(None), model, 8)
    assert says in refused.value.message


@pytest.mark.parametrize("seed", range(200, 204))
def test_no_line_is_lost_through_faults(seed: int) -> None:
    """Engines crash and hang, reports are lost, nodes lose power: what was asked is done once or still to do."""
    faults = Faults(
        slow=0.05, hang=0.02, lost=0.02, doubled=0.1, crash_every_ms=20_000.0, power_cut_every_ms=60_000.0,
        until_ms=FAULTS_END_MS,
    )  # fmt: skip
    world, traffic, duration_ms = scene(seed, faults)
    lines = [(500 + n % 5 * 100, 20 + n % 3 * 40) for n in range(30_000)]
    lane = harvest.deployment(world.profile, "job:batch", world.profile.models["qwen-14b-bf16"], lines, 2)
    jobs = harvest.Job("job:batch", lines, lane.slots, 1.0)
    world.begin_job(jobs, lane)
    rows = list(workload.rows(traffic, duration_ms, seed))
    world.run(iter(rows))
    assert world.meter.requests == len(rows), "each request ends exactly once"
    assert jobs.done > 0
    assert jobs.done + len(jobs.open) + len(jobs.again) == jobs.asked
    assert jobs.left == len(lines) - jobs.done
    done = lines[: jobs.asked].copy()
    for line in [*jobs.open.values(), *jobs.again]:
        done.remove(line)
    assert jobs.tokens == sum(i + o for i, o in done), "each line counted once, and no other"


@pytest.mark.parametrize("seed", range(300, 304))
def test_what_stands_still_goes_on_through_faults(seed: int) -> None:
    """Orders to stand still or go on are lost with their link, reports are doubled, nodes vanish: once all is quiet, no
    engine with lines to do stands still.
    """
    faults = Faults(lost=0.05, doubled=0.3, power_cut_every_ms=60_000.0, until_ms=120_000.0)
    world, traffic, _ = scene(seed, faults)
    lines = [(500 + n % 5 * 100, 20 + n % 3 * 40) for n in range(100_000)]
    lane = harvest.deployment(world.profile, "job:batch", world.profile.models["qwen-14b-bf16"], lines, 4)
    jobs = harvest.Job("job:batch", lines, lane.slots, 1.0)
    orders = []
    world.watch.append(lambda command, _: orders.append(command.on) if isinstance(command, plan.Pause) else None)
    world.begin_job(jobs, lane)
    world.run(workload.rows(traffic, 150_000.0, seed))
    assert True in orders
    assert False in orders
    assert world.injected.get("lost_pause", 0) > 0
    done = jobs.done
    world.run_until(world.now_ms + 30_000.0)
    engines = [p for node in world.nodes.values() for p in node.processes.values() if p.deployment.mode is Mode.BATCH]
    assert engines
    assert not any(process.paused for process in engines), "nobody works any more"
    assert jobs.done > done
