"""Messages and Responses, asked by their own SDKs, unmodified: on the same relay, meter and refusals as chat."""

from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.gateway.engine import Exchange, die, event, refuse
from tests.gateway.rig import KEY, Rig, rig, run
from tests.gateway.test_sdk import limit
from tidegate.domain.usage import Outcome

HELLO: Any = [{"role": "user", "content": "hello"}]


def claude(r: Rig, key: str = KEY) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{r.port}", api_key=key, max_retries=0)


def gpt(r: Rig, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{r.port}/v1", api_key=key, max_retries=0)


def test_messages_whole_and_streamed(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, claude(r) as sdk:
            whole = await sdk.messages.create(model="acme/chat", max_tokens=4, messages=HELLO, system="be brief")
            assert (whole.type, whole.role, whole.content[0].type) == ("message", "assistant", "text")
            assert whole.usage.output_tokens == 4
            assert whole.id.startswith("msg_")
            async with sdk.messages.stream(model="chat", max_tokens=4, messages=HELLO) as stream:
                kinds = [event.type async for event in stream]
                last = await stream.get_final_message()
            assert kinds[0] == "message_start"
            assert kinds[-1] == "message_stop"
            assert last.content[0].type == "text"
            assert last.content[0].text == "t1 t2 t3 t4 "
            assert last.usage.output_tokens == 4
            assert last.usage.input_tokens > 0
            assert last.stop_reason in ("end_turn", "max_tokens")
            assert [(x.outcome, x.output_tokens) for x in r.journal.final] == [(Outcome.COMPLETED, 4)] * 2

    run(main())


def test_messages_errors_are_the_sdks_own_classes(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, claude(r) as sdk, claude(r, "nobody") as stranger:
            create = sdk.messages.create
            with pytest.raises(anthropic.AuthenticationError):
                await stranger.messages.create(model="chat", max_tokens=4, messages=HELLO)
            with pytest.raises(anthropic.NotFoundError, match="no such model"):
                await create(model="other/secret", max_tokens=4, messages=HELLO)
            with pytest.raises(anthropic.BadRequestError, match="'mcp_servers' is not supported"):
                await create(model="chat", max_tokens=4, messages=HELLO, extra_body={"mcp_servers": [{}]})
            image: Any = [{"type": "image", "source": {"type": "url", "url": "https://secret.example"}}]
            with pytest.raises(anthropic.BadRequestError) as refused:
                await create(model="chat", max_tokens=4, messages=[{"role": "user", "content": image}])
            assert "secret" not in str(refused.value)
            r.engine.script.append(refuse(400, "context_length_exceeded"))
            with pytest.raises(anthropic.BadRequestError):
                await create(model="chat", max_tokens=4, messages=HELLO)
            body: Any = refused.value.body
            assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
            await r.control.route()
            with pytest.raises(anthropic.InternalServerError, match="no free capacity"):
                await create(model="chat", max_tokens=4, messages=HELLO, extra_headers={"x-scale-up-timeout": "0"})
            await limit(r, requests_per_minute=1)
            await create(model="chat", max_tokens=4, messages=HELLO)
            with pytest.raises(anthropic.RateLimitError):
                await create(model="chat", max_tokens=4, messages=HELLO)

    run(main())


def test_a_messages_stream_that_breaks_says_so(tmp_path: Path) -> None:
    async def one_then_die(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await die(exchange)

    async def main() -> None:
        async with rig(tmp_path) as r, claude(r) as sdk:
            r.engine.script.append(one_then_die)
            stream = await sdk.messages.create(model="chat", max_tokens=9, messages=HELLO, stream=True)
            with pytest.raises(anthropic.APIStatusError, match="engine"):
                [event async for event in stream]
            assert (await r.record()).outcome is Outcome.ENGINE_LOST

    run(main())


def test_responses_whole_and_streamed(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, gpt(r) as sdk:
            whole = await sdk.responses.create(
                model="chat", input="hello", instructions="be brief", max_output_tokens=4
            )
            assert whole.output_text
            assert (whole.object, whole.usage.output_tokens if whole.usage else 0) == ("response", 4)
            async with sdk.responses.stream(model="chat", input=HELLO, max_output_tokens=4) as stream:
                events = [event async for event in stream]
                last = await stream.get_final_response()
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert events[0].type == "response.created"
            assert events[-1].type in ("response.completed", "response.incomplete")
            assert last.output_text == "t1 t2 t3 t4 "
            assert last.usage is not None
            assert last.usage.output_tokens == 4
            assert [(x.outcome, x.output_tokens) for x in r.journal.final] == [(Outcome.COMPLETED, 4)] * 2

    run(main())


def test_responses_that_would_need_a_memory_are_refused_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, gpt(r) as sdk:
            for field, value in (("previous_response_id", "resp_1"), ("conversation", "conv_1"), ("store", True)):
                with pytest.raises(openai.BadRequestError) as refused:
                    await sdk.responses.create(model="chat", input="x", extra_body={field: value})
                assert refused.value.param == field
            search: Any = [{"type": "web_search"}]
            with pytest.raises(openai.BadRequestError, match="tools"):
                await sdk.responses.create(model="chat", input="x", tools=search)
            with pytest.raises(openai.AuthenticationError):
                await gpt(r, "nobody").responses.create(model="chat", input="x")

    run(main())
