"""Foreign engines that misbehave under the node's real supervisor: ended, the reason told, neighbours unharmed."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.subjects import RESERVED, SHAPE, STANDIN, children_named, standin_driver
from tests.node.builders import WHY, Recorder
from tidegate.assemble.clock import SteadyClock
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.errors import EngineFault
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.plan import Sleep, Start, Stop, Wake
from tidegate.domain.ports import StartOrder
from tidegate.domain.replica import ReplicaState as S
from tidegate.engines.inspect import FileInspector
from tidegate.engines.process import Lifeline
from tidegate.engines.programs import ServedDriver
from tidegate.node.limits import NodeLimits
from tidegate.node.supervisor import Supervisor

pytestmark = pytest.mark.e2e
CPU = Accelerator("cpu-0", "cpu", 1 << 30)
NODE = Node("node-1", "local", (CPU,), 1 << 30, 1 << 33)


class Scene:
    """A node with a healthy replica and room for one that is not."""

    def __init__(self, kind: str, folder: Path, driver: ServedDriver) -> None:
        self.kind, self.folder, self.driver = kind, folder, driver
        self.reports = Recorder()
        limits = NodeLimits(start_ms_max=8_000, sleep_ms_max=2_000, wake_ms_max=2_000)
        self.supervisor = Supervisor(
            node=NODE, drivers={kind: driver}, clock=SteadyClock(), limits=limits, report=self.reports
        )

    def start(self, replica: str, fault: str = "") -> None:
        deployment = self.deployment(replica, fault)
        self.supervisor.carry_out(Start(replica, "node-1", ("cpu-0",), deployment, RESERVED, WHY))

    def deployment(self, replica: str, fault: str) -> Deployment:
        from tests import models

        model = models.copy(models.llama(**SHAPE, dtype="bfloat16"), self.folder / replica)
        (model / "fault").write_text(fault)
        profile = FileInspector().inspect(str(model))
        return Deployment(f"acme/{replica}", "acme", profile, Mode.DEDICATED_SERVERLESS, slots=4, engine=self.kind)

    async def until(self, replica: str, *states: S) -> Any:
        deadline = time.monotonic() + 30
        while not self.reports.states(replica) or self.reports.last(replica).state not in states:
            assert time.monotonic() < deadline, (replica, self.reports.states(replica))
            await asyncio.sleep(0.01)
        return self.reports.last(replica)


@contextlib.asynccontextmanager
async def node(kind: str) -> AsyncIterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        lifeline = Lifeline()
        scene = Scene(kind, Path(folder), standin_driver(kind, Path(folder), lifeline))
        try:
            yield scene
        finally:
            await scene.supervisor.close()
            lifeline.close()


def play(kind: str, script: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with node(kind) as scene:
            await script(scene)

    pytest.importorskip("torch")
    asyncio.run(main())


async def beside_a_healthy_one(scene: Scene, fault: str, expected: str) -> None:
    """Starts both, puts the bad one to sleep and wakes it, as far as it lets itself."""
    scene.start("good")
    good = await scene.until("good", S.READY)
    scene.start("bad", fault)
    found = await scene.until("bad", S.READY, S.STOPPED)
    if found.state is S.READY:
        scene.supervisor.carry_out(Sleep("bad", "node-1", WHY))
        found = await scene.until("bad", S.ASLEEP, S.STOPPED)
    if found.state is S.ASLEEP:
        scene.supervisor.carry_out(Wake("bad", "node-1", ("cpu-0",), RESERVED, WHY))
        found = await scene.until("bad", S.READY, S.STOPPED)
    assert found.state is S.STOPPED, "a bad engine serves nobody"
    assert expected in found.reason
    assert scene.reports.last("good") == good, "nothing changed for its neighbour"
    assert children_named(STANDIN.name)() == 1, "and of the bad one nothing is left"
    scene.supervisor.carry_out(Sleep("good", "node-1", WHY))
    await scene.until("good", S.ASLEEP)
    scene.supervisor.carry_out(Wake("good", "node-1", ("cpu-0",), RESERVED, WHY))
    await scene.until("good", S.READY)


CASES = [
    ("vllm", "never ready", "did not become ready within"),
    ("vllm", "hangs in sleep", "did not sleep within"),
    ("vllm", "refuses sleep", "it answered 500"),
    ("vllm", "gibberish", "canary mismatch"),
    ("vllm", "dies in wake", "the engine process ended with exit code 1"),
    ("sglang", "hangs in sleep", "did not sleep within"),
    ("sglang", "gibberish", "canary mismatch"),
    ("trtllm", "refuses sleep", "it answered 500"),
    ("trtllm", "dies in wake", "the engine process ended with exit code 1"),
]


@pytest.mark.parametrize(("kind", "fault", "expected"), CASES)
def test_a_bad_engine_is_ended_and_says_why(kind: str, fault: str, expected: str) -> None:
    play(kind, lambda scene: beside_a_healthy_one(scene, fault, expected))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_one_that_lies_about_freed_memory_is_reported_with_what_it_holds(kind: str) -> None:
    """The core then counts it as holding its accelerator, and never wakes another into that memory."""

    async def script(scene: Scene) -> None:
        scene.start("good")
        await scene.until("good", S.READY)
        scene.start("bad", "keeps its memory")
        await scene.until("bad", S.READY)
        scene.supervisor.carry_out(Sleep("bad", "node-1", WHY))
        asleep = await scene.until("bad", S.ASLEEP)
        weights = scene.deployment("other", "").model.weight_bytes
        assert asleep.accelerator_bytes >= weights
        scene.supervisor.carry_out(Sleep("good", "node-1", WHY))
        assert (await scene.until("good", S.ASLEEP)).accelerator_bytes == 0
        scene.supervisor.carry_out(Stop("bad", "node-1", WHY))
        await scene.until("bad", S.STOPPED)

    play(kind, script)


TRIALS = [
    ("vllm", "keeps its memory", "asleep it still holds"),
    ("vllm", "refuses sleep", "it refuses to sleep: it answered 500"),
    ("vllm", "hangs in sleep", "it refuses to sleep: it did not sleep within"),
    ("vllm", "gibberish", "after a sleep it answered otherwise"),
    ("sglang", "keeps its memory", "asleep it still holds"),
    ("trtllm", "dies in wake", "it died when it was put to sleep"),
]


@pytest.mark.parametrize(("kind", "fault", "why"), TRIALS)
def test_the_first_engine_shows_whether_sleep_is_worth_anything(kind: str, fault: str, why: str) -> None:
    """Where it is not, replicas are stopped instead, and the reason is told with each of them."""

    async def script(scene: Scene) -> None:
        order = StartOrder("r", scene.deployment("first", fault), (CPU,), RESERVED)
        engine = await scene.driver.start(order)
        with contextlib.suppress(EngineFault):  # where it could not even be woken again, it never gets ready
            await engine.ready()
        await engine.stop()
        assert not scene.driver.sleeps
        assert why in scene.driver.why_not
        scene.start("second")
        await scene.until("second", S.READY)
        scene.supervisor.carry_out(Sleep("second", "node-1", WHY))
        stopped = await scene.until("second", S.STOPPED)
        assert "stops instead of sleeping" in stopped.reason
        assert why in stopped.reason

    play(kind, script)
