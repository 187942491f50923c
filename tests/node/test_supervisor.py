"""The node's supervisor against a scripted engine: commands × states, and every way an engine can misbehave."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.node.builders import DEPLOYMENT, RESERVED, Bench, pause, settle, sleep, start, stop, wake
from tests.node.loop import run_virtual
from tidegate.domain.plan import NodeCommand
from tidegate.domain.replica import ReplicaState as S
from tidegate.engines.fake import MIB, FakeScript
from tidegate.node.limits import NodeLimits


def test_start_is_ready_only_after_the_canary_and_says_what_it_measured() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(start_ms=700))
        status = await bench.do(start())
        assert bench.reports.states() == [S.STARTING, S.READY]
        assert bench.driver.engines[0].calls == ["ready", "canary", "memory"]
        assert (status.accelerator_bytes, status.took_ms, status.generation) == (8 * MIB, 700, 3)
        assert status.address == "unix:fake-r1"
        assert status.endpoint == DEPLOYMENT.endpoint

    run_virtual(main)


def test_sleep_drains_then_sleeps_then_measures_again() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(sleep_ms=40, drain_ms=500))
        status = await bench.do(start(), sleep())
        assert bench.reports.states() == [S.STARTING, S.READY, S.DRAINING, S.SLEEPING, S.ASLEEP]
        assert bench.driver.engines[0].calls[3:] == ["drain", "sleep", "memory"]
        assert (status.accelerator_bytes, status.host_bytes, status.took_ms, status.address) == (0, MIB, 40, "")

    run_virtual(main)


def test_wake_compares_the_canary_and_reports_its_time() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(wake_ms=25))
        status = await bench.do(start(), sleep(), wake())
        assert bench.reports.states()[-2:] == [S.WAKING, S.READY]
        assert (status.took_ms, status.accelerator_bytes, status.address) == (25, 8 * MIB, "unix:fake-r1")

    run_virtual(main)


def test_replicas_on_several_accelerators_wake_side_by_side() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(wake_ms=25))
        await bench.do(start(), sleep(), start("r2", accelerators=("cpu-1",)), sleep("r2"))
        bench.supervisor.carry_out(wake())
        await bench.do(wake("r2", accelerators=("cpu-1",)))
        order = [(s.replica, s.state) for s in bench.reports.statuses if s.state is S.WAKING or s.took_ms == 25]
        waking = [order.index((name, S.WAKING)) for name in ("r1", "r2")]
        ready = [order.index((name, S.READY)) for name in ("r1", "r2")]
        assert max(waking) < min(ready), order

    run_virtual(main)


def test_pause_is_carried_out_at_once_and_told_and_ends_with_whatever_comes_next() -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        status = await bench.do(start(), pause())
        (engine,) = bench.driver.engines
        assert (engine.paused, status.paused, status.state) == (True, True, S.READY)
        assert status.address, "who asks it waits"
        assert bench.supervisor.statuses == (status,), "a new link begins with it"
        status = await bench.do(pause(on=False))
        assert (engine.paused, status.paused) == (False, False)
        status = await bench.do(pause(), sleep())
        assert (engine.paused, status.paused, status.state) == (False, False, S.ASLEEP), "it must run to sleep"

    run_virtual(main)


REST: dict[str, tuple[NodeCommand, ...]] = {
    "unknown": (),
    "ready": (start(),),
    "asleep": (start(), sleep()),
    "stopped": (start(), stop()),
}
TABLE: list[tuple[str, NodeCommand, list[S]]] = [
    ("unknown", start(), [S.STARTING, S.READY]),
    ("unknown", wake(), [S.STOPPED]),
    ("unknown", sleep(), [S.STOPPED]),
    ("unknown", stop(), [S.STOPPED]),
    ("unknown", pause(), [S.STOPPED]),
    ("ready", start(), [S.READY]),
    ("ready", wake(), [S.READY]),
    ("ready", sleep(), [S.DRAINING, S.SLEEPING, S.ASLEEP]),
    ("ready", stop(), [S.DRAINING, S.STOPPING, S.STOPPED]),
    ("ready", pause(), [S.READY]),
    ("asleep", start(), [S.ASLEEP]),
    ("asleep", wake(), [S.WAKING, S.READY]),
    ("asleep", sleep(), [S.ASLEEP]),
    ("asleep", stop(), [S.STOPPING, S.STOPPED]),
    ("asleep", pause(), [S.ASLEEP]),
    ("stopped", start(), [S.STARTING, S.READY]),
    ("stopped", wake(), [S.STOPPED]),
    ("stopped", sleep(), [S.STOPPED]),
    ("stopped", stop(), [S.STOPPED]),
    ("stopped", pause(), [S.STOPPED]),
]


@pytest.mark.parametrize(("at", "command", "expected"), TABLE, ids=[f"{a}-{type(c).__name__}" for a, c, _ in TABLE])
def test_each_command_in_each_resting_state(at: str, command: NodeCommand, expected: list[S]) -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        if REST[at]:
            await bench.do(*REST[at])
        before = len(bench.reports.statuses)
        await bench.do(command)
        assert [status.state for status in bench.reports.statuses[before:]] == expected
        assert len(bench.driver.alive("r1")) == (expected[-1] is not S.STOPPED)

    run_virtual(main)


MOVING: dict[str, tuple[dict[str, int], tuple[NodeCommand, ...]]] = {
    "starting": ({"start_ms": 5_000}, (start(),)),
    "draining": ({"drain_ms": 5_000}, (start(), sleep())),
    "sleeping": ({"sleep_ms": 5_000}, (start(), sleep())),
    "waking": ({"wake_ms": 5_000}, (start(), sleep(), wake())),
}


@pytest.mark.parametrize("at", MOVING)
def test_stop_interrupts_whatever_is_under_way(at: str) -> None:
    async def main() -> None:
        script, commands = MOVING[at]
        bench = Bench(FakeScript(**script))  # type: ignore[arg-type]
        if commands[:-1]:
            await bench.do(*commands[:-1])
        bench.supervisor.carry_out(commands[-1])
        await asyncio.sleep(1)
        assert bench.reports.last().state == at
        bench.supervisor.carry_out(stop())
        await asyncio.sleep(0.1)
        assert bench.reports.last().state is S.STOPPED
        assert bench.reports.last().reason == "test"
        assert bench.driver.alive("r1") == []
        assert S.FAILED not in bench.reports.states()

    run_virtual(main)


@pytest.mark.parametrize("at", MOVING)
def test_death_of_the_engine_at_any_moment_is_reported_with_its_reason(at: str) -> None:
    async def main() -> None:
        script, commands = MOVING[at]
        bench = Bench(FakeScript(**script))  # type: ignore[arg-type]
        if commands[:-1]:
            await bench.do(*commands[:-1])
        bench.supervisor.carry_out(commands[-1])
        await asyncio.sleep(1)
        bench.driver.engines[0].die("killed by SIGKILL")
        await asyncio.sleep(0.1)
        last = bench.reports.last()
        assert (last.state, last.reason) == (S.STOPPED, "killed by SIGKILL")
        assert (last.accelerator_bytes, last.address) == (0, "")
        assert bench.supervisor.statuses == ()

    run_virtual(main)


@pytest.mark.parametrize("at", ["ready", "asleep"])
def test_death_at_rest(at: str) -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        await bench.do(*REST[at])
        bench.driver.engines[0].die("killed by SIGSEGV")
        await settle()
        assert (bench.reports.last().state, bench.reports.last().reason) == (S.STOPPED, "killed by SIGSEGV")
        assert (await bench.do(start())).state is S.READY

    run_virtual(main)


LIMITS = NodeLimits(start_ms_max=4_000, drain_ms_max=3_000, sleep_ms_max=2_000, wake_ms_max=1_000)
FAULTS: list[tuple[str, dict[str, Any], tuple[NodeCommand, ...], str]] = [
    ("start-fails", {"fail_start": "no such model"}, (start(),), "no such model"),
    ("never-ready", {"fail_ready": "weights are truncated"}, (start(),), "weights are truncated"),
    ("start-hangs", {"hang": frozenset({"start"})}, (start(),), "did not start within 4000 ms"),
    ("ready-hangs", {"hang": frozenset({"ready"})}, (start(),), "did not become ready within 4000 ms"),
    ("slow", {"start_ms": 4_001}, (start(),), "did not become ready within 4000 ms"),
    ("canary-hangs", {"hang": frozenset({"canary"})}, (start(),), "did not answer the canary within 30000 ms"),
    ("drain-hangs", {"hang": frozenset({"drain"})}, (start(), sleep()), "did not drain within 3000 ms"),
    ("sleep-hangs", {"hang": frozenset({"sleep"})}, (start(), sleep()), "did not sleep within 2000 ms"),
    ("sleep-fails", {"fail_sleep": "out of host memory"}, (start(), sleep()), "out of host memory"),
    ("wake-hangs", {"hang": frozenset({"wake"})}, (start(), sleep(), wake()), "did not wake within 1000 ms"),
    ("wake-fails", {"fail_wake": "mapping failed"}, (start(), sleep(), wake()), "mapping failed"),
    ("wrong-canary", {"canary_after_wake": "x"}, (start(), sleep(), wake()), "canary mismatch"),
    ("too-big", {"accelerator_bytes": RESERVED + 1}, (start(),), f"uses {RESERVED + 1} accelerator bytes"),
    ("elsewhere", {}, (start(), sleep(), wake(accelerators=("cpu-1",))), "this engine cannot move"),
]


@pytest.mark.parametrize(("script", "commands", "reason"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_every_fault_ends_in_stopped_with_its_reason_and_no_process(
    script: dict[str, Any], commands: tuple[NodeCommand, ...], reason: str
) -> None:
    async def main() -> None:
        bench = Bench(FakeScript(**script), limits=LIMITS)
        last = await bench.do(*commands)
        assert bench.reports.states()[-3:] == [S.FAILED, S.STOPPING, S.STOPPED]
        assert reason in last.reason
        assert last.accelerator_bytes == 0
        assert bench.driver.alive("r1") == []

    run_virtual(main)


@pytest.mark.parametrize("script", [{"lies_about_sleep": True}, {}], ids=["lies", "admits"])
def test_memory_that_was_not_given_back_is_reported_as_found(script: dict[str, Any]) -> None:
    async def main() -> None:
        bench = Bench(FakeScript(asleep_accelerator_bytes=5 * MIB, **script))
        status = await bench.do(start(), sleep())
        assert (status.state, status.accelerator_bytes) == (S.ASLEEP, 5 * MIB)

    run_virtual(main)


def test_a_movable_engine_wakes_where_it_is_told() -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        status = await bench.do(start(movable=True), sleep(), wake(accelerators=("cpu-1",)))
        assert (status.state, status.accelerators) == (S.READY, ("cpu-1",))

    run_virtual(main)


def test_an_engine_that_cannot_sleep_here_stops_instead() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(), sleeps=False)
        status = await bench.do(start(), sleep())
        assert status.state is S.STOPPED
        assert "stops instead of sleeping" in status.reason
        assert S.FAILED not in bench.reports.states()

    run_virtual(main)


def test_sleep_waits_for_what_is_running() -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        await bench.do(start())
        engine = bench.driver.engines[0]
        engine.running = 1
        bench.supervisor.carry_out(sleep())
        await asyncio.sleep(10)
        assert bench.reports.last().state is S.DRAINING
        engine.running = 0
        await asyncio.sleep(1)
        assert bench.reports.last().state is S.ASLEEP

    run_virtual(main)


def test_commands_given_in_a_burst_are_carried_out_in_order() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(start_ms=100, sleep_ms=100, wake_ms=100))
        for command in (start(), sleep(), wake(), sleep()):
            bench.supervisor.carry_out(command)
        await settle()
        assert bench.reports.states() == [
            *(
                S.STARTING,
                S.READY,
                S.DRAINING,
                S.SLEEPING,
                S.ASLEEP,
                S.WAKING,
                S.READY,
                S.DRAINING,
                S.SLEEPING,
                S.ASLEEP,
            )
        ]

    run_virtual(main)


PROBLEMS: list[tuple[NodeCommand, str]] = [
    (start(engine="vllm"), "this node has no engine 'vllm'; it has fake"),
    (start(accelerators=("gpu-7",)), "this node has no accelerator 'gpu-7'"),
    (start(accelerators=()), "no accelerator was given"),
]


@pytest.mark.parametrize(("command", "reason"), PROBLEMS)
def test_what_cannot_even_begin_is_answered(command: NodeCommand, reason: str) -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        status = await bench.do(command)
        assert status.state is S.STOPPED
        assert reason in status.reason
        assert status.endpoint == DEPLOYMENT.endpoint
        assert bench.driver.engines == []

    run_virtual(main)


def test_one_replica_failing_harms_no_other() -> None:
    async def main() -> None:
        bench = Bench(lambda order: FakeScript(fail_ready="bad" if order.replica == "r2" else ""))
        await bench.do(start("r1"), start("r2"), start("r3", accelerators=("cpu-1",)))
        assert {s.replica: s.state for s in bench.supervisor.statuses} == {"r1": S.READY, "r3": S.READY}

    run_virtual(main)


def test_a_process_that_will_not_end_is_not_called_stopped() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(hang=frozenset({"stop"})), limits=NodeLimits(stop_ms_max=1_000))
        status = await bench.do(start(), stop())
        assert (status.state, status.accelerator_bytes) == (S.STOPPING, 8 * MIB)
        assert "does not end" in status.reason
        bench.driver.engines[0].die("killed at last")
        await settle()
        assert (bench.reports.last().state, bench.reports.last().accelerator_bytes) == (S.STOPPED, 0)

    run_virtual(main)


def test_close_ends_every_engine_whatever_it_is_doing() -> None:
    async def main() -> None:
        bench = Bench(lambda order: FakeScript(start_ms=60_000 if order.replica == "r2" else 0))
        await bench.do(start("r1"), start("r3"), sleep("r3"))
        bench.supervisor.carry_out(start("r2"))
        await asyncio.sleep(0.1)
        await bench.supervisor.close()
        assert bench.supervisor.statuses == ()
        assert not any(engine.alive for engine in bench.driver.engines)
        assert (await bench.do(start("r4"))).reason == "the node is shutting down"

    run_virtual(main)


def test_a_bug_in_a_driver_is_logged_and_leaves_no_engine(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench(FakeScript())
        await bench.do(start())
        engine = bench.driver.engines[0]
        engine.sleep = _raise_bug  # type: ignore[method-assign]
        with caplog.at_level(logging.ERROR):
            status = await bench.do(sleep())
        assert status.state is S.STOPPED
        assert not engine.alive
        assert "its task failed" in caplog.text

    run_virtual(main)


async def _raise_bug() -> Any:
    raise ZeroDivisionError


def test_what_ended_is_remembered_within_a_bound() -> None:
    async def main() -> None:
        bench = Bench(FakeScript(fail_start="broken"), limits=NodeLimits(gone_replicas_max=2))
        await bench.do(start("r1"), start("r2"), start("r3"))
        answer: Callable[[str], Any] = bench.reports.last
        await bench.do(stop("r3"), stop("r1"))
        assert "broken" in answer("r3").reason
        assert answer("r1").reason == "not on this node"

    run_virtual(main)
