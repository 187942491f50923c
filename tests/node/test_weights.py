"""A replica whose weights are elsewhere: fetched before its engine starts, held while it lives, faults by name."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from tests.node.builders import NODE, PROFILE, WHY, Recorder, settle, start, stop
from tests.node.loop import LoopClock, run_virtual
from tests.node.test_agent import TestLink
from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import WeightFault
from tidegate.domain.plan import Prefetch, WeightsChanged
from tidegate.domain.ports import Link
from tidegate.domain.replica import ReplicaState as S
from tidegate.engines.fake import FakeDriver, FakeScript
from tidegate.node.agent import NodeAgent
from tidegate.node.limits import NodeLimits
from tidegate.node.supervisor import Supervisor

REMOTE = replace(PROFILE, source="hf://acme/tide@0")


@dataclass
class Held:
    path: str
    released: int = 0

    def release(self) -> None:
        self.released += 1


@dataclass
class ScriptedWeights:
    """`Weights` that take `seconds` and then are there, or `fault`."""

    seconds: float = 10.0
    fault: str = ""
    held: list[Held] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    given_up: int = 0

    async def hold(self, model: ModelProfile, progress: Callable[[int], None]) -> Held:
        try:
            for percent in range(0, 101, 5):
                progress(percent)
                await asyncio.sleep(self.seconds / 21)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.fault:
            raise WeightFault(self.fault)
        self.digests.append(model.digest)
        self.held.append(Held("/cache/tide"))
        return self.held[-1]

    def present(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.digests)))


def play(weights: ScriptedWeights, scene: Callable[[Supervisor, Recorder, FakeDriver], Awaitable[None]]) -> None:
    async def main() -> None:
        driver, reports = FakeDriver(FakeScript()), Recorder()
        limits = NodeLimits(fetch_ms_max=60_000)
        supervisor = Supervisor(
            node=NODE, drivers={"fake": driver}, clock=LoopClock(), limits=limits, report=reports, weights=weights
        )
        await scene(supervisor, reports, driver)
        await supervisor.close()

    run_virtual(main)


def test_the_engine_gets_a_directory_and_the_weights_are_held_while_it_lives() -> None:
    weights = ScriptedWeights()

    async def scene(supervisor: Supervisor, reports: Recorder, driver: FakeDriver) -> None:
        supervisor.carry_out(start(model=REMOTE))
        await settle()
        assert driver.engines[-1].order.deployment.model.source == "/cache/tide"
        loading = [s.reason for s in reports.statuses if s.state is S.STARTING]
        assert loading[:3] == ["", "downloading 0 %", "downloading 10 %"]
        assert loading[-1] == ""
        assert (reports.last().state, reports.last().reason) == (S.READY, "")
        assert reports.last().took_ms < 10_000, "the fetch is not part of the start"
        assert weights.held[0].released == 0
        supervisor.carry_out(stop())
        await settle()
        assert (reports.last().state, weights.held[0].released) == (S.STOPPED, 1)

    play(weights, scene)


def test_a_fault_of_the_source_is_the_replicas_reason() -> None:
    async def scene(supervisor: Supervisor, reports: Recorder, driver: FakeDriver) -> None:
        supervisor.carry_out(start(model=REMOTE))
        await settle()
        assert reports.states()[-3:] == [S.FAILED, S.STOPPING, S.STOPPED]
        assert reports.last().reason == "the Hub refuses the credentials"
        assert not driver.engines

    play(ScriptedWeights(fault="the Hub refuses the credentials"), scene)


def test_a_fetch_is_bounded_and_given_up_on_stop() -> None:
    slow = ScriptedWeights(seconds=10_000)

    async def scene(supervisor: Supervisor, reports: Recorder, driver: FakeDriver) -> None:
        supervisor.carry_out(start("r1", model=REMOTE))
        await settle()
        assert reports.last("r1").reason == "did not fetch its weights within 60000 ms"
        supervisor.carry_out(start("r2", model=REMOTE))
        await asyncio.sleep(5)
        supervisor.carry_out(stop("r2"))
        await settle()
        assert reports.last("r2").state is S.STOPPED
        assert slow.given_up == 2

    play(slow, scene)


def test_the_agent_tells_what_is_on_its_disk_and_prefetches() -> None:
    weights = ScriptedWeights()

    async def main() -> None:
        links: list[TestLink] = []

        async def connect() -> Link:
            links.append(TestLink())
            return links[-1]

        driver = FakeDriver(FakeScript())
        agent = NodeAgent(node=NODE, drivers={"fake": driver}, connect=connect, clock=LoopClock(), weights=weights)
        running = asyncio.create_task(agent.run())
        await asyncio.sleep(1)
        told = [m for m in links[0].sent if isinstance(m, WeightsChanged)]
        assert told == [WeightsChanged("node-1", ())]
        for _ in range(2):  # the second is the same one
            links[0].say(Prefetch("node-1", REMOTE, WHY))
        await settle()
        told = [m for m in links[0].sent if isinstance(m, WeightsChanged)]
        assert told[-1] == WeightsChanged("node-1", (REMOTE.digest,))
        assert [held.released for held in weights.held] == [1]
        weights.fault = "the source is away"
        links[0].say(Prefetch("node-1", replace(REMOTE, digest="other"), WHY))
        await settle()
        assert len([m for m in links[0].sent if isinstance(m, WeightsChanged)]) == len(told) + 1, "told all the same"
        links[0].say(Prefetch("node-1", replace(REMOTE, digest="third"), WHY))
        await asyncio.sleep(1)
        await agent.close()
        await asyncio.wait_for(running, 60)
        assert weights.given_up == 1

    run_virtual(main)
