"""Whatever the core commands, in whatever order and however engines behave: the laws of a node hold."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.node.builders import RESERVED, Bench, pause, settle, sleep, start, stop, wake
from tests.node.loop import run_virtual
from tidegate.domain.plan import NodeCommand
from tidegate.domain.replica import ReplicaState
from tidegate.engines.fake import MIB, FakeScript
from tidegate.node.limits import NodeLimits

NAMES = ("r1", "r2")
LIMITS = NodeLimits(start_ms_max=800, drain_ms_max=800, sleep_ms_max=800, wake_ms_max=800, canary_ms_max=800)

scripts = st.builds(
    FakeScript,
    start_ms=st.sampled_from([0, 10, 300, 900]),
    drain_ms=st.sampled_from([0, 10, 900]),
    sleep_ms=st.sampled_from([0, 10, 900]),
    wake_ms=st.sampled_from([0, 10, 900]),
    hang=st.frozensets(st.sampled_from(["start", "ready", "drain", "sleep", "wake", "canary", "memory"]), max_size=1),
    fail_ready=st.sampled_from(["", "", "", "cannot load"]),
    fail_wake=st.sampled_from(["", "", "", "cannot map"]),
    accelerator_bytes=st.sampled_from([1 * MIB, 8 * MIB, RESERVED, RESERVED + 1]),
    asleep_accelerator_bytes=st.sampled_from([0, 0, 3 * MIB]),
    lies_about_sleep=st.booleans(),
    canary_after_wake=st.sampled_from([None, None, None, "other"]),
)
commands = st.sampled_from([make(name) for make in (start, wake, sleep, stop, pause) for name in NAMES])
acts = st.lists(
    st.tuples(st.one_of(commands, st.sampled_from(["die", "wait"])), st.sampled_from([0, 5, 100, 1_000])), max_size=25
)


@settings(max_examples=150, deadline=None)
@given(script=scripts, plan=acts)
def test_laws(script: FakeScript, plan: list[tuple[NodeCommand | str, int]]) -> None:
    async def main() -> None:
        bench = Bench(script, limits=LIMITS)  # its recorder checks that every reported change is a legal arrow
        asked: dict[str, int] = {}
        for act, wait_ms in plan:
            if act == "die":
                for engine in bench.driver.engines[-1:]:
                    engine.die("killed by SIGKILL")
            elif not isinstance(act, str):
                asked[act.replica] = len(bench.reports.statuses)
                bench.supervisor.carry_out(act)
            await asyncio.sleep(wait_ms / 1000)
            for name in NAMES:
                assert len(bench.driver.alive(name)) <= 1, "two engines for one replica"
        await settle()
        for name, before in asked.items():
            answers = [s for s in bench.reports.statuses[before:] if s.replica == name]
            assert answers, f"the last command for {name} was never answered"
            assert answers[-1].state in (ReplicaState.READY, ReplicaState.ASLEEP, ReplicaState.STOPPED)
        for status in bench.reports.statuses:
            assert status.accelerator_bytes <= RESERVED
            assert (status.address != "") == (status.state is ReplicaState.READY)
            assert not status.paused or status.state is ReplicaState.READY
            if status.state is ReplicaState.STOPPED:
                assert status.accelerator_bytes == 0
        alive = {status.replica for status in bench.supervisor.statuses}
        assert alive == {name for name in NAMES if bench.driver.alive(name)}
        assert all(s.state is not ReplicaState.STOPPED for s in bench.supervisor.statuses)
        await bench.supervisor.close()
        assert not any(engine.alive for engine in bench.driver.engines)

    run_virtual(main)
