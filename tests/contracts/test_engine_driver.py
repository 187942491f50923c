"""What every engine driver keeps, whatever it drives: the same suite on the fake and on real torch processes."""

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contracts.subjects import (
    Subject,
    builtin_subject,
    fake_subject,
    llamacpp_subject,
    standin_subject,
    vllm_subject,
)
from tests.programs import LLAMA_SERVER, VLLM_PYTHON
from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import Engine

SUBJECTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Subject]]] = {
    "fake": fake_subject,
    "builtin": builtin_subject,
    "builtin apart": partial(builtin_subject, cpu_device="apart"),
    "llamacpp": llamacpp_subject,
    "vllm": vllm_subject,
    "vllm stand-in": partial(standin_subject, "vllm"),
    "sglang stand-in": partial(standin_subject, "sglang"),
    "trtllm stand-in": partial(standin_subject, "trtllm"),
}
NOT_HERE = {
    "llamacpp": "" if LLAMA_SERVER else "llama-server was not found on PATH (make engines-llamacpp)",
    "vllm": "" if VLLM_PYTHON else "vLLM was not asked for (make engines-vllm, then TIDEGATE_TEST_VLLM_PYTHON)",
}
Scene = Callable[[Subject], Awaitable[None]]
Play = Callable[[Scene], None]


@pytest.fixture(
    scope="module", params=["fake", *(pytest.param(n, marks=pytest.mark.e2e) for n in SUBJECTS if n != "fake")]
)
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    """Runs scenes on one driver, one after another; what a scene started is stopped after it.

    The folder has a short name: sockets have 107 bytes for their path.
    """
    if why := NOT_HERE.get(request.param):
        pytest.skip(why)
    if request.param != "fake":
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
    kind, _, place = engine.address.partition(":")
    if kind == "tcp":
        return httpx.AsyncClient(base_url=f"http://{place}", timeout=60)
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=place), base_url="http://engine", timeout=60)


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
        assert usage["prompt_tokens"] > 0
        if subject.ours:
            assert response.headers["x-tidegate-prompt-tokens"] == str(usage["prompt_tokens"])

    play(scene)


def test_a_stream_ends_with_its_usage_and_ours_numbers_its_events(play: Play) -> None:
    """The gateway counts what an aborted client got by the last `id:` line it forwarded."""

    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        body = chat(stream=True, stream_options={"include_usage": True}, ignore_eos=True)
        async with client(engine) as http:
            response = await http.post("/v1/chat/completions", json=body)
        events = [event for event in response.text.split("\n\n") if event]
        assert events[-1] == "data: [DONE]"
        numbers = [int(event.split("\n")[0].removeprefix("id: ")) for event in events if event.startswith("id: ")]
        assert numbers == sorted(numbers)
        assert bool(numbers) == subject.ours
        last = json.loads(events[-2].partition("data: ")[2])
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == (numbers[-1] if subject.ours else 6)

    play(scene)


def test_nobody_else_reaches_it(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        if engine.address.startswith("tcp:"):
            assert engine.address.startswith("tcp:127.0.0.1:")
            return
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
        assert 0 < awake.accelerator_bytes <= subject.reserved
        if not subject.driver.sleeps:
            assert "still holds" in subject.driver.why_not
            return
        await engine.drain()
        asleep = await engine.sleep()
        assert asleep.accelerator_bytes == 0
        assert (await engine.memory()).accelerator_bytes == 0
        assert asleep.host_bytes > 0
        await engine.wake()
        await engine.canary()  # whatever is mapped lazily is there now
        woken = await engine.memory()
        assert 0 < woken.accelerator_bytes <= subject.reserved

    play(scene)


def test_asleep_it_refuses_at_once_and_awake_it_answers(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        async with client(engine) as http:
            await engine.drain()
            await engine.sleep()
            if subject.ours:  # others are only kept from requests by the fence
                assert (await http.post("/v1/chat/completions", json=chat())).status_code == 503
            await engine.wake()
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200

    play(scene)


def test_it_refuses_to_sleep_over_running_work_and_drains_it(play: Play) -> None:
    async def scene(subject: Subject) -> None:
        engine = await subject.started()
        long = chat(stream=True, max_tokens=subject.long_tokens, ignore_eos=True)
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
        assert again.address == first.address or again.address.startswith("tcp:")

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
        if not starting.cancelled():  # it never waits: what is started is in the caller's hands
            await starting.result().stop()
        engine = await subject.started()
        assert await engine.canary()
        assert subject.count() == 1

    play(scene)
