"""Requests are parsed strictly: what we do not have is refused by name, and no refusal repeats what was sent."""

import json
from typing import Any

import pytest

from tidegate.domain.errors import LimitHit, Refusal
from tidegate.wire import openai
from tidegate.wire.openai import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest, RerankRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
INPUT = {"model": "m", "input": "hi"}


def refused(kind: type, body: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(Refusal) as caught:
        openai.parse(kind, json.dumps(body).encode())
    return caught.value.code, caught.value.param


@pytest.mark.parametrize(
    ("kind", "base", "extra", "code", "param"),
    [
        (ChatRequest, CHAT, {"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        (ChatRequest, CHAT, {"audio": {}}, "unsupported_parameter", "audio"),
        (ChatRequest, CHAT, {"best_of": 2}, "unsupported_parameter", "best_of"),
        (ChatRequest, CHAT, {"store": 0}, "unsupported_parameter", "store"),
        (ChatRequest, CHAT, {"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        (ChatRequest, CHAT, {"stream_options": {"x": 1}}, "unsupported_parameter", "stream_options.x"),
        (ChatRequest, CHAT, {"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
        (ChatRequest, CHAT, {"messages": []}, "invalid_request", "messages"),
        (ChatRequest, CHAT, {"messages": [{"role": "tool"}]}, "invalid_request", "messages[0].role"),
        (ChatRequest, CHAT, {"messages": [{"content": "x"}]}, "invalid_request", "messages[0].role"),
        (ChatRequest, CHAT, {"model": ""}, "invalid_request", "model"),
        (ChatRequest, CHAT, {"temperature": "hot"}, "invalid_request", "temperature"),
        (ChatRequest, CHAT, {"temperature": 2.5}, "invalid_request", "temperature"),
        (ChatRequest, CHAT, {"top_p": 0}, "invalid_request", "top_p"),
        (ChatRequest, CHAT, {"n": 9}, "invalid_request", "n"),
        (ChatRequest, CHAT, {"max_tokens": True}, "invalid_request", "max_tokens"),
        (ChatRequest, CHAT, {"max_completion_tokens": 0}, "invalid_request", "max_completion_tokens"),
        (ChatRequest, CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "invalid_request", "stop"),
        (ChatRequest, CHAT, {"stop": ""}, "invalid_request", "stop"),
        (ChatRequest, CHAT, {"stop": "x" * 257}, "invalid_request", "stop"),
        (ChatRequest, CHAT, {"top_logprobs": 2}, "invalid_request", "top_logprobs"),
        (ChatRequest, CHAT, {"logit_bias": {"a": 1}}, "invalid_request", "logit_bias"),
        (ChatRequest, CHAT, {"logit_bias": {"1": 101}}, "invalid_request", "logit_bias"),
        (CompletionRequest, TEXT, {"prompt": [1, "a"]}, "invalid_request", "prompt"),
        (CompletionRequest, TEXT, {"prompt": []}, "invalid_request", "prompt"),
        (CompletionRequest, TEXT, {"prompt": [[]]}, "invalid_request", "prompt"),
        (CompletionRequest, TEXT, {"prompt": ["a"] * 5, "n": 8}, "invalid_request", "prompt"),
        (CompletionRequest, TEXT, {"echo": True}, "unsupported_parameter", "echo"),
        (CompletionRequest, TEXT, {"logprobs": 6}, "invalid_request", "logprobs"),
        (EmbeddingRequest, INPUT, {"dimensions": 5}, "unsupported_parameter", "dimensions"),
        (EmbeddingRequest, INPUT, {"encoding_format": "hex"}, "invalid_request", "encoding_format"),
        (EmbeddingRequest, INPUT, {"input": []}, "invalid_request", "input"),
        (ClassifyRequest, INPUT, {"input": []}, "invalid_request", "input"),
        (ClassifyRequest, INPUT, {"input": 5}, "invalid_request", "input"),
        (
            RerankRequest,
            {"model": "m", "query": "q", "documents": ["d"]},
            {"documents": []},
            "invalid_request",
            "documents",
        ),
    ],
)
def test_refused_by_name(kind: type, base: dict[str, Any], extra: dict[str, Any], code: str, param: str) -> None:
    assert refused(kind, base | extra) == (code, param)


@pytest.mark.parametrize(
    ("kind", "base", "name"), [(ChatRequest, CHAT, "messages"), (CompletionRequest, TEXT, "prompt")]
)
def test_missing_parameter_is_named(kind: type, base: dict[str, Any], name: str) -> None:
    assert refused(kind, {k: v for k, v in base.items() if k != name}) == ("invalid_request", name)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model": "m",}'])
def test_not_json(body: bytes) -> None:
    for parse in (openai.parse_head, lambda b: openai.parse(ChatRequest, b)):
        with pytest.raises(Refusal) as caught:
            parse(body)
        assert (caught.value.code, caught.value.status) == ("invalid_json", 400)


def test_deep_nesting_is_refused_not_a_crash() -> None:
    with pytest.raises(Refusal):
        openai.parse_head(b'{"model":"m","x":' + b"[" * 200_000)


def test_what_asks_for_nothing_is_accepted() -> None:
    extra = {
        "tools": [],
        "store": False,
        "n": None,
        "service_tier": "auto",
        "suffix": None,
        "user": "u",
        "metadata": {},
    }
    request = openai.parse(ChatRequest, json.dumps(CHAT | extra).encode())
    assert request.messages[0].text == "hi"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = openai.parse(
        ChatRequest, json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()
    )
    assert request.messages[0].text == "ab"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompt_shapes(prompt: Any, wanted: list[Any]) -> None:
    request = openai.parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert openai.texts(request.prompt) == wanted


@pytest.mark.parametrize(
    "extra",
    [
        {"messages": [{"role": "secret-word", "content": "x"}]},
        {"temperature": "secret-word"},
        {"stream_options": "secret-word"},
        {"metadata": {"a": ["secret-word"]}},
        {"messages": [{"role": "user", "content": [{"type": "secret-word"}]}]},
    ],
)
def test_refusals_repeat_no_value(extra: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        openai.parse(ChatRequest, json.dumps(CHAT | extra).encode())
    assert b"secret-word" not in openai.refusal_body(caught.value)


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ({"role": "tool", "content": "x"}, "system, developer, user, assistant"),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, "text"),
    ],
)
def test_a_word_that_is_not_one_of_a_few_is_told_which_are(message: dict[str, object], accepted: str) -> None:
    with pytest.raises(Refusal, match=rf"\(accepted: {accepted}\)"):
        openai.parse(ChatRequest, json.dumps(CHAT | {"messages": [message]}).encode())


def test_error_body_and_headers() -> None:
    refusal = Refusal("queue_full", "full", retry_after_ms=1_001, limit=LimitHit("queue", 5, 5))
    assert json.loads(openai.refusal_body(refusal)) == {
        "error": {
            "message": "full",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
            "limit": {"kind": "queue", "current": 5, "full": 5},
        }
    }
    assert openai.refusal_headers(refusal) == {"retry-after": "2"}
    assert openai.refusal_headers(Refusal("not_ready", "x")) == {}


def test_sse_framing() -> None:
    assert openai.sse_event(b"{}", 7) == b"id: 7\ndata: {}\n\n"
    assert openai.sse_event(b"{}") == b"data: {}\n\n"
    assert openai.sse_comment("waiting") == b": waiting\n\n"
    assert openai.sse_error(Refusal("engine_error", "gone")).startswith(b'data: {"error":')
