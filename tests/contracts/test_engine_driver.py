"""What every engine driver keeps, whatever it drives: the same suite on the fake and on real torch processes."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.errors import EngineFault
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import Engine, EngineDriver, StartOrder
from tidegate.engines.builtin import BuiltinDriver
from tidegate.engines.fake import FakeDriver, FakeScript
from tidegate.engines.inspect import FileInspector
from tidegate.engines.process import Lifeline

MIB = 1 << 20
RESERVED = 64 * MIB
CPU = Accelerator("cpu-0", "cpu", 256 * MIB)


@dataclass
class Subject:
    """A driver under test, with what differs between them: its model, and how one of its engines is killed."""

    driver: EngineDriver
    model: Path
    kill: Callable[[Any], None]
    reason_killed: str
    bad_models: dict[str, Path]
    count: Callable[[], int]  # of engine processes alive
    engines: list[Engine] = field(default_factory=list)

    def order(self, replica: str = "acme/chat-1", model: Path | None = None, reserved: int = RESERVED) -> StartOrder:
        source = str(model or self.model)
        profile = ModelProfile(source, "", ModelKind.GENERATIVE, 1, 1, 256)
        if model is None and (self.model / "config.json").exists():
            profile = FileInspector().inspect(source)
        deployment = Deployment("acme/chat", "acme", profile, Mode.DEDICATED_SERVERLESS, slots=4)
        return StartOrder(replica, deployment, (CPU,), reserved)

    async def start(self, order: StartOrder) -> Engine:
        engine = await self.driver.start(order)
        self.engines.append(engine)
        return engine

    async def started(self, replica: str = "acme/chat-1") -> Engine:
        engine = await self.start(self.order(replica))
        await engine.ready()
        return engine

    async def stop_all(self) -> None:
        while self.engines:
            await self.engines.pop().stop()


@contextlib.asynccontextmanager
async def fake_subject(folder: Path) -> AsyncIterator[Subject]:
    bad = {kind: folder / kind for kind in ("missing", "truncated", "pickled")}
    sources = {str(path) for path in bad.values()}

    def script(order: StartOrder) -> FakeScript:
        return FakeScript(fail_ready="no weights" if order.deployment.model.source in sources else "", token_ms=20)

    driver = FakeDriver(script, directory=folder)
    kill = lambda engine: engine.die("killed by SIGKILL")  # noqa: E731
    try:
        yield Subject(driver, folder / "model", kill, "killed by SIGKILL", bad, lambda: len(driver.alive()))
    finally:
        await driver.close()


@contextlib.asynccontextmanager
async def builtin_subject(folder: Path) -> AsyncIterator[Subject]:
    from tests import models

    model = models.llama()
    truncated = models.copy(model, folder)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "pickled").mkdir()
    shutil.copy(model / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    bad = {"missing": folder / "missing", "truncated": truncated, "pickled": folder / "pickled"}
    lifeline = Lifeline()
    driver = BuiltinDriver(directory=folder / "run", lifeline=lifeline, threads=1)

    def count() -> int:
        assert driver.template.process is not None
        return len(psutil.Process(driver.template.process.pid).children())

    try:
        yield Subject(driver, model, lambda engine: os.kill(engine.pid, signal.SIGKILL), "engine process", bad, count)
    finally:
        lifeline.close()
        await driver.close()


SUBJECTS = {"fake": fake_subject, "builtin": builtin_subject}
Scene = Callable[[Subject], Awaitable[None]]
Play = Callable[[Scene], None]


@pytest.fixture(scope="module", params=[pytest.param("fake"), pytest.param("builtin", marks=pytest.mark.e2e)])
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    """Runs scenes on one driver, one after another; what a scene started is stopped after it.

    The folder has a short name: sockets have 107 bytes for their path.
    """
    if request.param == "builtin":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory(prefix="tg-") as folder, asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        subject = runner.run(stack.enter_async_context(SUBJECTS[request.param](Path(folder))))

        def run(scene: Scene) -> None:
            async def whole() -> None:
                try:
                    await scene(subject)
                finally:
                    await subject.stop_all()

            runner.run(whole())

        try:
            yield run
        finally:
            runner.run(stack.aclose())


def client(engine: Engine) -> httpx.AsyncClient:
    kind, _, path = engine.address.partition(":")
    assert kind == "unix"
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path), base_url="http://engine", timeout=60)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "acme/chat", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 6, **fields}


async def fails(call: Coroutine[Any, Any, Any]) -> str:
    with pytest.raises(EngineFault) as fault:
        await call
    assert fault.value.reason
    assert "Traceback" not in fault.value.reason
    return fault.value.reason


def test_ready_means_it_answers(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        async with client(engine) as http:
            response = await http.post("/v1/chat/completions", json=chat())
        assert response.status_code == 200
        usage = response.json()["usage"]
        assert 1 <= usage["completion_tokens"] <= 6
        assert response.headers["x-tidegate-prompt-tokens"] == str(usage["prompt_tokens"])

    play(scene)


def test_a_stream_numbers_its_events_by_tokens(play: Play) -> None:
    """The gateway counts what an aborted client got by the last `id:` line it forwarded."""

    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        body = chat(stream=True, stream_options={"include_usage": True})
        async with client(engine) as http:
            response = await http.post("/v1/chat/completions", json=body)
        events = [event for event in response.text.split("\n\n") if event]
        assert events[-1] == "data: [DONE]"
        numbers = [int(event.split("\n")[0].removeprefix("id: ")) for event in events if event.startswith("id: ")]
        assert numbers == sorted(numbers)
        last = json.loads(events[-2].partition("data: ")[2])
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == numbers[-1]

    play(scene)


def test_the_socket_is_only_ours(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        assert os.stat(engine.address.removeprefix("unix:")).st_mode & 0o077 == 0

    play(scene)


def test_canary_is_stable_and_survives_sleep(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        first = await engine.canary()
        assert await engine.canary() == first
        await engine.drain()
        await engine.sleep()
        await engine.wake()
        assert await engine.canary() == first

    play(scene)


def test_memory_stays_within_the_order_and_falls_asleep(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        awake = await engine.memory()
        assert 0 < awake.accelerator_bytes <= RESERVED
        await engine.drain()
        asleep = await engine.sleep()
        assert asleep.accelerator_bytes == 0
        assert (await engine.memory()).accelerator_bytes == 0
        assert asleep.host_bytes > 0
        await engine.wake()
        await engine.canary()  # whatever is mapped lazily is there now
        woken = await engine.memory()
        assert 0 < woken.accelerator_bytes <= RESERVED

    play(scene)


def test_asleep_it_refuses_at_once_and_awake_it_answers(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        async with client(engine) as http:
            await engine.drain()
            await engine.sleep()
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 503
            await engine.wake()
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200

    play(scene)


def test_it_refuses_to_sleep_over_running_work_and_drains_it(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        long = chat(stream=True, max_tokens=100, ignore_eos=True)
        async with client(engine) as http, http.stream("POST", "/v1/chat/completions", json=long) as response:
            lines = response.aiter_lines()
            await anext(lines)
            assert "in flight" in await fails(engine.sleep())
            draining = asyncio.create_task(engine.drain())
            rest = [line async for line in lines]
            assert "data: [DONE]" in rest
            await draining
        await engine.sleep()

    play(scene)


def test_stop_is_idempotent_and_ends_the_process(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        await engine.stop()
        await engine.stop()
        assert await asyncio.wait_for(engine.exited(), 10)
        await fails(engine.canary())
        async with client(engine) as http:
            with pytest.raises(httpx.TransportError):
                await http.post("/v1/chat/completions", json=chat())

    play(scene)


def test_death_is_noticed_and_explained(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        watching = asyncio.create_task(engine.exited())
        await asyncio.sleep(0)
        subject.kill(engine)
        assert subject.reason_killed in await asyncio.wait_for(watching, 10)
        await fails(engine.wake())
        await engine.stop()

    play(scene)


def test_two_engines_do_not_know_each_other(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        first = await subject.started()
        second = await subject.started("acme/chat-2")
        assert await first.canary() == await second.canary()
        await first.stop()
        assert await second.canary()
        again = await subject.started()
        assert again.address == first.address

    play(scene)


@pytest.mark.parametrize("kind", ["missing", "truncated", "pickled"])
def test_a_model_that_cannot_be_served_is_a_fault_with_a_reason(play: Play, kind: str) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.start(subject.order(model=subject.bad_models[kind]))
        reason = await fails(engine.ready())
        assert len(reason) > 8
        await engine.stop()
        assert await (await subject.started("acme/other")).canary()

    play(scene)


def test_giving_up_on_a_start_leaves_nothing_behind(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        starting = asyncio.create_task(subject.driver.start(subject.order()))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        assert starting.cancelled()
        engine = await subject.started()
        assert await engine.canary()
        assert subject.count() == 1

    play(scene)
