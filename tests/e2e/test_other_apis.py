"""Messages, Responses, scores and a batch of embeddings on real models of the built-in engine, by official SDKs."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
import anthropic
import openai

from tests import models
from tests.e2e.platform import Platform, running, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONFIG = """
demo = false
[accelerators]
kind = "cpu"
count = 2
memory = "512MiB"
[[tenants]]
id = "acme"
api_key = "tg-acme-0123456789"
"""
KEY = "tg-acme-0123456789"
HELLO: Any = [{"role": "user", "content": "the water of the world"}]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    made = {"chat": models.llama(seed=1), "embed": models.bert_embedding(), "rank": models.bert_classifier(labels=1)}
    endpoints = "".join(f"[[endpoints]]\nname = 'acme/{name}'\nmodel = '{path}'\n" for name, path in made.items())
    with running(tmp_path_factory.mktemp("apis"), config=CONFIG + endpoints) as platform:
        yield platform


def test_messages_and_responses_say_what_chat_says(platform: Platform) -> None:
    claude = anthropic.Anthropic(base_url=platform.base_url, api_key=KEY)
    gpt = openai.OpenAI(base_url=platform.base_url + "/v1", api_key=KEY)
    greedy: Any = {"model": "chat", "temperature": 0}
    chat = gpt.chat.completions.create(**greedy, messages=HELLO, max_tokens=8)
    said, usage = chat.choices[0].message.content, chat.usage
    assert usage is not None
    ask: Any = {"model": "chat", "messages": HELLO, "max_tokens": 8, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**ask)
    assert [block.text for block in message.content if block.type == "text"] == [said]
    assert (message.usage.output_tokens, message.stop_reason) == (usage.completion_tokens, "max_tokens")
    with claude.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == said
        assert stream.get_final_message().usage.output_tokens == usage.completion_tokens
    response = gpt.responses.create(**greedy, input=HELLO, max_output_tokens=8)
    assert (response.output_text, response.status) == (said, "incomplete")
    with gpt.responses.stream(**greedy, input=HELLO, max_output_tokens=8) as events:
        *_, last = events
    assert last.type == "response.incomplete"  # cut at max_output_tokens, as OpenAI says it
    assert last.response.output_text == said


def test_what_the_engine_has_not_is_refused_by_name_in_every_dialect(platform: Platform) -> None:
    """Tools and schemas; log probabilities it has, where the dialect has a place for them."""
    claude = anthropic.Anthropic(base_url=platform.base_url, api_key=KEY)
    gpt = openai.OpenAI(base_url=platform.base_url + "/v1", api_key=KEY)
    function = {"name": "tide", "parameters": {"type": "object"}}
    schema = {"name": "tide", "schema": {"type": "object"}}
    chat: dict[str, Any] = {"model": "chat", "messages": HELLO, "max_tokens": 2}
    for more, param in (
        ({"tools": [{"type": "function", "function": function}]}, "tools"),
        ({"functions": [function]}, "functions"),
        ({"response_format": {"type": "json_schema", "json_schema": schema}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ):
        for stream in (False, True):
            _refused(
                openai.BadRequestError,
                param,
                lambda more=more, s=stream: gpt.chat.completions.create(**chat, stream=s, **more),
            )
    asked: dict[str, Any] = {"model": "chat", "input": "the water"}
    _refused(
        openai.BadRequestError, "tools", lambda: gpt.responses.create(**asked, tools=[{"type": "function"} | function])
    )  # type: ignore[list-item]
    form: Any = {"format": {"type": "json_schema"} | schema}
    _refused(openai.BadRequestError, "text.format", lambda: gpt.responses.create(**asked, text=form))
    _refused(openai.BadRequestError, "top_logprobs", lambda: gpt.responses.create(**asked, top_logprobs=2))
    tools: Any = [{"name": "tide", "input_schema": {"type": "object"}}]
    with pytest.raises(anthropic.BadRequestError, match="'tools' is not supported"):
        claude.messages.create(model="chat", messages=HELLO, max_tokens=8, tools=tools)
    with gpt.realtime.connect(model="chat") as session:
        session.response.create(response={"instructions": "x", "tools": [{"type": "function", "name": "tide"}]})
        *_, done = (session.recv() for _ in range(3))
        assert done.type == "response.done"
        assert done.response.status_details is not None
        failed = done.response.status_details.error
        assert failed is not None
        assert (failed.code, "'tools'" in (failed.message or "")) == ("unsupported_parameter", True)
    logged = gpt.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert logged is not None
    assert [len(token.top_logprobs) for token in logged.content or ()] == [2, 2]


def _refused(kind: type[openai.APIStatusError], param: str, ask: Callable[[], object]) -> None:
    with pytest.raises(kind) as refused:
        ask()
    assert refused.value.param == param
    assert param in refused.value.message


def test_scores_are_the_rerankers(platform: Platform) -> None:
    texts = ["the water", "many people", "two more days"]
    with platform.admin() as http:
        http.headers["authorization"] = f"Bearer {KEY}"
        for model in ("rank", "embed"):
            body = {"model": model, "query": "the sea", "documents": texts}
            ranked = {r["index"]: r["relevance_score"] for r in http.post("/v1/rerank", json=body).json()["results"]}
            scored = http.post("/v1/score", json={"model": model, "text_1": "the sea", "text_2": texts}).json()
            assert [one["score"] for one in scored["data"]] == pytest.approx([ranked[n] for n in range(3)])
        refused = http.post("/v1/score", json={"model": "chat", "text_1": "a", "text_2": "b"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "wrong_endpoint_kind")


def test_a_batch_of_embeddings(platform: Platform) -> None:
    gpt = openai.OpenAI(base_url=platform.base_url + "/v1", api_key=KEY)
    lines = [
        {
            "custom_id": f"t{n}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "embed", "input": f"word {n}"},
        }
        for n in range(12)
    ]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = gpt.files.create(file=("in.jsonl", data), purpose="batch")
    batch = gpt.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    wait_until(lambda: gpt.batches.retrieve(batch.id).status == "completed", "the batch", 60)
    done = gpt.batches.retrieve(batch.id)
    assert done.output_file_id is not None
    results = [json.loads(line) for line in gpt.files.content(done.output_file_id).text.splitlines()]
    asked = gpt.embeddings.create(model="embed", input="word 3", encoding_format="float").data[0].embedding
    got = next(r["response"]["body"]["data"][0]["embedding"] for r in results if r["custom_id"] == "t3")
    assert got == pytest.approx(asked, abs=1e-4)
    assert len(results) == 12
