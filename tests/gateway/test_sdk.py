"""The official OpenAI SDK, unmodified, as a black box."""

from pathlib import Path

import openai
import pytest

from tests.gateway.engine import die, refuse
from tests.gateway.rig import ENDPOINTS, KEY, KEYS, Rig, rig, run
from tests.loop import until
from tidegate.domain.limits import Limits, Scope
from tidegate.wire.internal import Catalog

HELLO = [{"role": "user", "content": "hello"}]


def client(r: Rig, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{r.port}/v1", api_key=key, max_retries=0)


async def limit(r: Rig, **limits: int) -> None:
    """From now on, the tenant of the usual key has these limits, and a replica."""
    r.control.version += 1
    rules = (Limits(Scope.TENANT, "acme", **limits),)
    await r.control.links[-1].send(Catalog(r.control.version, KEYS, ENDPOINTS, limits=rules))
    await r.control.route(r.target())
    await until(lambda: r.gateway._loop.limiter.gate.active and r.gateway.parts.room.endpoints, "the limits")


def test_chat_unary_and_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, client(r) as sdk:
            answer = await sdk.chat.completions.create(model="acme/chat", messages=HELLO, max_tokens=4)  # type: ignore[arg-type]
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 4
            assert (await sdk.chat.completions.with_raw_response.create(model="chat", messages=HELLO)).headers[  # type: ignore[arg-type]
                "x-request-id"
            ]
            stream = await sdk.chat.completions.create(
                model="acme/chat",
                messages=HELLO,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},  # type: ignore[arg-type]
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "t1 t2 t3 t4 "
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 4
            assert [x.output_tokens for x in r.journal.final] == [4, 3, 4]

    run(main())


def test_the_synchronous_sdk(tmp_path: Path) -> None:
    import asyncio

    def ask(port: int) -> tuple[int, str]:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as sdk:
            models = [m.id for m in sdk.models.list()]
            stream = sdk.chat.completions.create(model=models[0], messages=HELLO, max_tokens=3, stream=True)  # type: ignore[arg-type]
            text = "".join(c.choices[0].delta.content or "" for c in stream)
            unary = sdk.chat.completions.create(model=models[0], messages=HELLO, max_tokens=3)  # type: ignore[arg-type]
            return unary.usage.completion_tokens if unary.usage else 0, text

    async def main() -> None:
        async with rig(tmp_path) as r:
            assert await asyncio.to_thread(ask, r.port) == (3, "t1 t2 t3 ")

    run(main())


def test_embeddings_and_models(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, client(r) as sdk:
            await r.control.route(r.target(), name="acme/embed")
            answer = await sdk.embeddings.create(model="acme/embed", input="x", encoding_format="float")
            assert answer.data[0].embedding == [0.5, 1.0]
            record = await r.record()
            assert (record.input_tokens, record.output_tokens, record.api) == (4, 0, "embeddings")
            assert [m.id async for m in sdk.models.list()] == ["acme/chat", "acme/embed", "house/common"]
            assert (await sdk.models.retrieve("acme/chat")).owned_by == "acme"

    run(main())


def test_errors_are_the_sdks_own_classes(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, client(r) as sdk, client(r, "nobody") as stranger:
            create = sdk.chat.completions.create
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="acme/chat", messages=HELLO)  # type: ignore[arg-type]
            with pytest.raises(openai.NotFoundError):
                await create(model="acme/none", messages=HELLO)  # type: ignore[arg-type]
            r.engine.script.append(refuse(400, "context_length_exceeded"))
            with pytest.raises(openai.BadRequestError) as bad:
                await create(model="acme/chat", messages=HELLO)  # type: ignore[arg-type]
            assert bad.value.code == "context_length_exceeded"
            await r.control.route()
            with pytest.raises(openai.InternalServerError) as full:
                await create(model="acme/chat", messages=HELLO, extra_headers={"x-scale-up-timeout": "0"})  # type: ignore[arg-type]
            assert (full.value.status_code, full.value.code) == (503, "capacity")
            await limit(r, requests_per_minute=1)
            await create(model="acme/chat", messages=HELLO, max_tokens=2)  # type: ignore[arg-type]
            with pytest.raises(openai.RateLimitError) as limited:
                await create(model="acme/chat", messages=HELLO)  # type: ignore[arg-type]
            assert limited.value.code == "rate_limit_exceeded"
            assert int(limited.value.response.headers["retry-after"]) >= 1

    run(main())


def test_an_error_in_a_stream_is_raised_by_the_sdk(tmp_path: Path) -> None:
    from tests.gateway.engine import Exchange, event

    async def one_then_die(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await die(exchange)

    async def main() -> None:
        async with rig(tmp_path) as r, client(r) as sdk:
            r.engine.script.append(one_then_die)
            stream = await sdk.chat.completions.create(model="acme/chat", messages=HELLO, stream=True)  # type: ignore[arg-type]
            first = await anext(stream)
            assert first.choices[0].delta.content == "a"
            with pytest.raises(openai.APIError) as error:
                await anext(stream)
            assert error.value.code == "engine_error"

    run(main())
