"""The built-in driver's own promises, with real processes: engines outlive the template, and nothing outlives us."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.loop import until
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.errors import EngineFault
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import StartOrder
from tidegate.engines.builtin import BuiltinDriver, BuiltinEngine, BuiltinLimits, devices_of
from tidegate.engines.inspect import FileInspector
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Lifeline

pytestmark = pytest.mark.e2e
pytest.importorskip("torch")
pytest.importorskip("transformers")
RESERVED = 64 << 20


def order(replica: str = "acme/chat-1", *, memory_bytes: int = RESERVED) -> StartOrder:
    from tests import models

    profile = FileInspector().inspect(str(models.llama()))
    deployment = Deployment("acme/chat", "acme", profile, Mode.DEDICATED_SERVERLESS, slots=2)
    return StartOrder(replica, deployment, (Accelerator("cpu-0", "cpu", RESERVED),), memory_bytes)


def play(
    scene: Callable[[BuiltinDriver, Lifeline, LogRing], Awaitable[None]],
    limits: BuiltinLimits = BuiltinLimits(),
    cpu_device: str = "cpu",
) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="tg-") as folder:
            lifeline, logs = Lifeline(), LogRing(Path(folder) / "logs" / "engines.log")
            driver = BuiltinDriver(
                directory=Path(folder) / "run",
                lifeline=lifeline,
                threads=1,
                logs=logs,
                limits=limits,
                cpu_device=cpu_device,
            )
            try:
                await scene(driver, lifeline, logs)
            finally:
                lifeline.close()
                await driver.close()
                logs.close()

    asyncio.run(main())


async def ready(driver: BuiltinDriver, replica: str = "acme/chat-1") -> BuiltinEngine:
    engine = await driver.start(order(replica))
    await engine.ready()
    return engine


def test_engines_outlive_the_template_and_it_comes_back() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        first = await ready(driver)
        canary = await first.canary()
        template = driver.template.process
        assert template is not None
        os.kill(template.pid, signal.SIGKILL)
        await template.exited()
        assert await first.canary() == canary
        second = await ready(driver, "acme/chat-2")
        assert await second.canary() == canary
        os.kill(first.pid, signal.SIGKILL)  # its parent is gone: still noticed
        assert "engine process" in await asyncio.wait_for(first.exited(), 10)
        await first.stop()
        await second.stop()
        assert any("ready: generative" in line for line in logs.tail)

    play(scene)


def test_host_memory_is_counted_anew_while_it_sleeps() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        engine = await ready(driver)
        await engine.drain()
        assert (await engine.sleep()).host_bytes == 0, "nobody has asked for it yet, and sleep does not wait for it"
        deadline = time.monotonic() + 60
        while not (await engine.memory()).host_bytes:
            assert time.monotonic() < deadline, "the count in its sleep"
            await asyncio.sleep(0.02)
        await engine.stop()

    play(scene, BuiltinLimits(host_count_ms=1))


def test_replicas_of_a_model_with_memory_apart_have_one_host_copy() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        engines = [await ready(driver, f"acme/chat-{n}") for n in range(2)]
        weights = order().deployment.model.weight_bytes
        for engine in engines:
            awake = await engine.memory()
            assert awake.accelerator_bytes >= weights
            assert awake.copy_bytes >= weights
            canary = await engine.canary()
            await engine.drain()
            assert (await engine.sleep()).accelerator_bytes == 0
            asleep = await engine.memory()
            assert (asleep.accelerator_bytes, asleep.copy_bytes) == (0, awake.copy_bytes)
            assert (await engine.wake()).accelerator_bytes >= weights
            assert await engine.canary() == canary
        for engine in engines:
            await engine.stop()

    play(scene, cpu_device="apart")


def test_over_several_accelerators_each_holds_its_share() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        one, seen = order(memory_bytes=1 << 20), []
        budgets = tuple(Accelerator(f"cpu-{n}", "cpu", RESERVED) for n in range(2))
        for accelerators in (budgets[:1], budgets):
            engine = await driver.start(replace(one, accelerators=accelerators))
            await engine.ready()
            seen.append((await engine.memory()).accelerator_bytes)
            await engine.drain()
            assert (await engine.sleep()).accelerator_bytes == 0
            await engine.stop()
        assert seen[0] <= 2 * seen[1] <= seen[0] + (64 << 10)

    play(scene)


@pytest.mark.parametrize(
    ("ids", "device"), [(("gpu-0",), "cuda:0"), (("gpu-3",), "cuda:3"), (("gpu-2", "gpu-5"), "cuda:2,cuda:5")]
)
def test_gpus_are_called_by_their_number(ids: tuple[str, ...], device: str) -> None:
    assert devices_of([Accelerator(name, "NVIDIA H100", 1) for name in ids]) == device


def test_everything_ends_with_the_lifeline() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        engine = await ready(driver)
        template = driver.template.process
        assert template is not None
        lifeline.close()  # as when this process is killed: the kernel closes it
        await asyncio.wait_for(engine.exited(), 30)
        await asyncio.wait_for(template.exited(), 30)
        await until(lambda: not Path(engine.address.removeprefix("unix:")).exists(), "the socket goes with its engine")

    play(scene)


def test_it_stands_still_in_the_middle_of_an_answer_and_goes_on_where_it_was() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        engine = await ready(driver)
        canary = await engine.canary()
        engine.pause(True)
        asked = asyncio.create_task(engine.canary())
        done, _ = await asyncio.wait({asked}, timeout=0.3)
        assert not done, "who asks waits"
        engine.pause(False)
        assert await asyncio.wait_for(asked, 30) == canary
        engine.pause(True)
        await asyncio.wait_for(engine.stop(), 30)
        assert "engine process" in await engine.exited()

    play(scene)


def test_a_model_beyond_its_reservation_is_refused_with_the_reason() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        engine = await driver.start(order(memory_bytes=100_000))
        with pytest.raises(EngineFault, match="does not fit"):
            await engine.ready()
        await engine.stop()
        assert "does not fit" in await engine.exited()

    play(scene)


def test_a_stopped_start_leaves_the_template_alone() -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        await (await ready(driver)).stop()
        template = driver.template.process
        for _ in range(5):
            await (await driver.start(order())).stop()  # the moment it is forked
        await ready(driver)
        assert driver.template.process is template

    play(scene)


def test_a_template_that_cannot_come_up_is_a_fault_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(driver: BuiltinDriver, lifeline: Lifeline, logs: LogRing) -> None:
        with pytest.raises(EngineFault, match="does not come up: it ended with exit code"):
            await driver.start(order())

    # As with a broken install: the interpreter cannot import what it needs.
    monkeypatch.setattr("tidegate.engines.template.PROGRAM", "tidegate.no_such_module")
    play(scene)


def test_a_start_is_given_up_at_once_while_the_template_still_imports() -> None:
    async def scene(driver: BuiltinDriver, _lifeline: Lifeline, _logs: LogRing) -> None:
        starting = asyncio.create_task(driver.start(order()))
        await until(lambda: driver.template.process is not None, "the template is started")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not (driver.directory / "template.sock").exists(), "it waited until the template could fork"

    play(scene)
