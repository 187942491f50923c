"""Messages and Responses as chat and back: turns, tools and formats that no small engine has, checked word for word."""

import json
from typing import Any

import pytest

from tidegate.domain.errors import Refusal
from tidegate.wire.messages import Messages
from tidegate.wire.responses import Responses
from tidegate.wire.score import Score

CALL = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": '{"at":"noon"}'}}
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    "stop_sequences": ["\n"],
    "metadata": {"user_id": "u"},
    "tools": [{"name": "tide", "input_schema": {"type": "object"}, "description": "d"}],
    "tool_choice": {"type": "any"},
    "messages": [
        {"role": "user", "content": "when?"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "call_1", "name": "tide", "input": {"at": "noon"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "high"}]},
    ],
}
RESPONSES: dict[str, Any] = {
    "model": "m",
    "instructions": "be brief",
    "max_output_tokens": 5,
    "tools": [{"type": "function", "name": "tide", "parameters": {"type": "object"}, "strict": True}],
    "tool_choice": {"type": "function", "name": "tide"},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "when?"}]},
        {"type": "function_call", "call_id": "call_1", "name": "tide", "arguments": '{"at":"noon"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "high"},
    ],
}
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "when?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "high"},
]


def chunk(**delta: Any) -> bytes:
    finish = delta.pop("finish_reason", None)
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()


CHUNKS = [
    chunk(role="assistant", content="One "),
    chunk(content="moment."),
    chunk(tool_calls=[{"index": 0, "id": "call_1", "type": "function", "function": {"name": "tide", "arguments": ""}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"at":'}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": ' "noon"}'}}]),
    chunk(finish_reason="tool_calls"),
    json.dumps({"choices": [], "usage": USAGE}).encode(),
]


def events(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]


def test_messages_become_chat_turns_with_tools() -> None:
    chat = json.loads(Messages("req-1").request(json.dumps(MESSAGES).encode()))
    assert chat["messages"] == TURNS
    assert chat["tools"][0]["function"] == {"name": "tide", "parameters": {"type": "object"}, "description": "d"}
    assert (chat["tool_choice"], chat["stop"], chat["user"], chat["max_tokens"]) == ("required", ["\n"], "u", 5)


def test_a_chat_answer_becomes_a_message() -> None:
    messages = Messages("req-1")
    messages.request(json.dumps(MESSAGES).encode())
    choice = {"message": {"content": "One moment.", "tool_calls": [CALL]}, "finish_reason": "tool_calls"}
    said = json.loads(messages.answer(json.dumps({"choices": [choice], "usage": USAGE}).encode()))
    assert said["content"] == [
        {"type": "text", "text": "One moment."},
        {"type": "tool_use", "id": "call_1", "name": "tide", "input": {"at": "noon"}},
    ]
    assert said["stop_reason"] == "tool_use"
    assert said["usage"]["input_tokens"] == 5
    assert said["usage"]["cache_read_input_tokens"] == 4


def test_a_chat_stream_becomes_message_events() -> None:
    messages = Messages("req-1")
    messages.request(json.dumps(MESSAGES | {"stream": True}).encode())
    said = events(messages.ping() + b"".join(map(messages.event, CHUNKS)) + messages.done())
    assert [one["type"] for one in said] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert "".join(one["delta"]["partial_json"] for one in said if one.get("index") == 1 and "delta" in one) == (
        '{"at": "noon"}'
    )
    assert said[-2]["delta"]["stop_reason"] == "tool_use"
    assert said[-2]["usage"]["output_tokens"] == 3


def test_the_stop_string_an_engine_names_is_passed_on() -> None:
    messages = Messages("req-1")
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "stop_reason": "\n"}
    said = json.loads(messages.answer(json.dumps({"choices": [choice]}).encode()))
    assert (said["stop_reason"], said["stop_sequence"]) == ("stop_sequence", "\n")


def test_responses_become_chat_turns_with_tools() -> None:
    chat = json.loads(Responses("req-1").request(json.dumps(RESPONSES).encode()))
    assert chat["messages"] == TURNS
    function = {"name": "tide", "parameters": {"type": "object"}, "strict": True}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "tide"}}
    assert chat["response_format"]["json_schema"] == {"name": "n", "schema": {"type": "object"}}


def test_a_chat_stream_becomes_response_events() -> None:
    responses = Responses("req-1")
    responses.request(json.dumps(RESPONSES | {"stream": True}).encode())
    said = events(b"".join(map(responses.event, CHUNKS)) + responses.done())
    assert [one["sequence_number"] for one in said] == list(range(len(said)))
    final = said[-1]["response"]
    assert (said[-1]["type"], final["status"]) == ("response.completed", "completed")
    assert [item["type"] for item in final["output"]] == ["message", "function_call"]
    assert final["output"][0]["content"][0]["text"] == "One moment."
    assert final["output"][1]["arguments"] == '{"at": "noon"}'
    assert final["usage"]["input_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize(
    ("dialect", "body", "param"),
    [
        (Messages, MESSAGES | {"max_tokens": None}, "max_tokens"),
        (Messages, MESSAGES | {"temperature": 1.5}, "temperature"),
        (Messages, MESSAGES | {"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.type"),
        (Messages, MESSAGES | {"container": "c"}, "container"),
        (Responses, RESPONSES | {"input": [{"type": "function_call"}]}, "input.0"),
        (Responses, RESPONSES | {"reasoning": {"effort": "high"}}, "reasoning"),
        (Responses, RESPONSES | {"input": []}, "input"),
        (Score, {"model": "m", "text_1": ["a", "b"], "text_2": ["c", "d"]}, "text_1"),
        (Score, {"model": "m", "text_1": "a", "text_2": []}, "text_2"),
        (Score, {"model": "m", "text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_said_in_chat_is_refused_by_name(dialect: type[Any], body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        dialect("req-1").request(json.dumps(body).encode())
    assert refused.value.param is not None
    assert refused.value.param.startswith(param.split(".")[0])


def test_scores_are_a_rerank_in_the_order_of_the_texts() -> None:
    score = Score("req-1", 5)
    rerank = json.loads(score.request(b'{"model": "m", "text_1": "q", "text_2": ["a", "b"]}'))
    assert rerank == {"model": "m", "query": "q", "documents": ["a", "b"], "return_documents": False}
    results = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]
    usage = {"prompt_tokens": 4, "total_tokens": 4}
    said = json.loads(score.answer(json.dumps({"results": results, "usage": usage}).encode()))
    assert [(one["index"], one["score"]) for one in said["data"]] == [(0, 0.1), (1, 0.9)]
    assert (said["object"], said["created"], said["model"]) == ("list", 5, "m")
    assert said["usage"]["prompt_tokens"] == 4
