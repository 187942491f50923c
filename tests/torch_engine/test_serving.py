"""The engine over its socket: shapes, counting, refusals, impolite clients, sleep and wake."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import models
from tests.torch_engine.serving import Serving

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
LONG = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("e")
    with Serving(models.llama(), folder, slots=4, waiting_requests_max=2, prefill_tokens_max=32) as serving:
        yield serving
        assert serving.state()["live"] == 0


def test_state_and_socket(engine: Serving) -> None:
    state = engine.state()
    assert state["state"] == "ready"
    assert (state["kind"], state["slots"], state["context_tokens_max"]) == ("generative", 4, 256)
    assert 0 < state["accelerator_bytes"] <= state["weight_bytes"] + 65536
    assert stat.S_IMODE(os.stat(engine.path).st_mode) == 0o600


def test_stream_and_whole_answer_are_one_text(engine: Serving) -> None:
    fields = {"prompt": "the water", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = engine.complete(**fields)
    head, events = engine.stream("/v1/completions", **fields)
    assert "".join(e["choices"][0]["text"] for _, e in events) == whole["choices"][0]["text"]
    assert events[-1][1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    numbers = [number for number, _ in events]
    assert numbers == sorted(numbers)
    assert numbers[-1] == whole["usage"]["completion_tokens"] == 40
    assert int(head["x-tidegate-prompt-tokens"]) == whole["usage"]["prompt_tokens"]
    assert head["x-tidegate-cached-tokens"] == "0"
    assert head["content-type"].startswith("text/event-stream")
    assert all("usage" not in e for _, e in events)
    assert "\ufffd" not in whole["choices"][0]["text"][-1:]


def test_usage_only_when_asked(engine: Serving) -> None:
    fields = {**CHAT, "max_tokens": 5, "ignore_eos": True, "n": 2}
    _, events = engine.stream("/v1/chat/completions", stream_options={"include_usage": True}, **fields)
    number, last = events[-1]
    assert last["choices"] == []
    assert number == last["usage"]["completion_tokens"] == 10
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 10
    assert all(e["usage"] is None for _, e in events[:-1])
    assert {e["choices"][0]["index"] for _, e in events[:-1]} == {0, 1}
    _, always = engine.stream("/v1/chat/completions", stream_options={"continuous_usage_stats": True}, **fields)
    assert all(number == e["usage"]["completion_tokens"] for number, e in always)


def test_chat_shape_and_logprobs(engine: Serving) -> None:
    body = {"model": "m", **CHAT, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = engine.http.post("/v1/chat/completions", json=body | {"ignore_eos": True}).json()["choices"][0]
    assert choice["message"]["role"] == "assistant"
    content = choice["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0  # greedy: the chosen one is the top one
        assert len(entry["top_logprobs"]) == 2
    _, events = engine.stream(
        "/v1/chat/completions", **{k: v for k, v in body.items() if k != "model"}, ignore_eos=True
    )
    streamed = [entry for _, e in events for entry in e["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert events[0][1]["choices"][0]["delta"]["role"] == "assistant"


def test_seeds(engine: Serving) -> None:
    asked = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    one, two = (engine.complete(seed=11, **asked)["choices"][0]["text"] for _ in range(2))
    assert one == two
    assert engine.complete(seed=12, **asked)["choices"][0]["text"] != one


def test_stop_strings_never_show(engine: Serving) -> None:
    text = engine.complete(**LONG)["choices"][0]["text"]
    stop = text[30:36]
    _, events = engine.stream("/v1/completions", prompt="the water", stop=[stop], **LONG)
    assert "".join(e["choices"][0]["text"] for _, e in events) == text[: text.index(stop)]
    assert events[-1][1]["choices"][0]["finish_reason"] == "stop"


def test_prompts_as_token_ids_and_lists(engine: Serving) -> None:
    answer = engine.complete(prompt=[[5, 6, 7], [5, 6, 7]], max_tokens=3, temperature=0)
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["text"] == answer["choices"][1]["text"]
    assert answer["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize(
    ("path", "fields", "status", "code", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "tools": [{}]}, 400, "unsupported_parameter", "tools"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 255}, 400, "context_length_exceeded", "messages"),
        ("/v1/completions", {"prompt": "the " * 300}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"prompt": "the " * 30_000}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "invalid_request", "prompt"),
        ("/v1/completions", {"prompt": [70_000]}, 400, "invalid_request", "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 5}, 400, "invalid_request", "n"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 400, "invalid_request", "logit_bias"),
        ("/v1/embeddings", {"input": "a"}, 400, "wrong_endpoint_kind", None),
        ("/v1/nothing", {}, 404, "not_found", None),
        ("/v1/models", {}, 405, "method_not_allowed", None),
        ("/control/unknown", {}, 404, "not_found", None),
    ],
)
def test_refusals(
    engine: Serving, path: str, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    assert engine.refused(path, status, code, **fields)["param"] == param


def test_a_refused_stream_has_a_proper_status(engine: Serving) -> None:
    engine.refused("/v1/completions", 400, "context_length_exceeded", prompt="the " * 300, stream=True)


def test_a_client_that_leaves_frees_its_row_at_once(engine: Serving) -> None:
    before = engine.state()["completion_tokens_total"]
    for _ in range(6):  # more than there are slots: a leak would block the next one
        with engine.http.stream(
            "POST", "/v1/completions", json={"model": "m", "prompt": "a", "stream": True} | LONG
        ) as s:
            next(s.iter_lines())
    engine.until(lambda: engine.state()["live"] == 0)
    assert engine.state()["running"] == 0
    assert engine.state()["completion_tokens_total"] - before < 6 * 150


def test_a_client_that_half_closes_is_gone(engine: Serving) -> None:
    connection = engine.raw()
    body = json.dumps({"model": "m", "prompt": "a", "stream": True} | LONG).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert connection.recv(10).startswith(b"HTTP/1.1")
    connection.shutdown(1)
    engine.until(lambda: engine.state()["live"] == 0)
    connection.close()


def test_pipelined_requests_are_answered_in_order(engine: Serving) -> None:
    connection = engine.raw()
    parts = []
    for tokens in (9, 1):
        body = json.dumps({"model": f"m{tokens}", "prompt": "a", "max_tokens": tokens}).encode()
        parts.append(b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    connection.sendall(b"".join(parts))
    seen = b""
    while b'"m1"' not in seen:
        piece = connection.recv(65536)
        assert piece
        seen += piece
    assert seen.index(b'"m9"') < seen.index(b'"m1"')
    connection.close()


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n"]
)
def test_garbage_ends_the_connection_only(engine: Serving, garbage: bytes) -> None:
    connection = engine.raw()
    connection.sendall(garbage)
    answer = connection.recv(65536)
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
    connection.close()
    assert engine.state()["state"] == "ready"


def test_a_body_beyond_the_bound_is_refused(engine: Serving) -> None:
    connection = engine.raw()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: 99999999\r\n\r\n")
    piece, answer = b"x" * (1 << 20), b""
    try:
        for _ in range(20):
            connection.sendall(piece)
        answer = connection.recv(4096)
    except (BrokenPipeError, ConnectionResetError):
        answer = connection.recv(4096)
    assert b" 413 " in answer.split(b"\r\n")[0]
    connection.close()


def test_the_waiting_room_is_bounded(engine: Serving) -> None:
    connections = [engine.raw() for _ in range(6)]  # 4 slots and 2 that wait
    body = json.dumps({"model": "m", "prompt": "a", "stream": True} | LONG).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: %d\r\n\r\n" % len(body)
    for connection in connections:
        connection.sendall(head + body)
    refused: list[httpx.Response] = []

    def full() -> bool:
        answer = engine.http.post("/v1/completions", json={"model": "m", "prompt": "a", "max_tokens": 1})
        refused.extend([answer] if answer.status_code != 200 else [])
        return bool(refused) or engine.state()["live"] == 0

    engine.until(full)
    if refused:  # on a slow machine all six may be done before the seventh is asked
        assert refused[0].status_code == 503
        assert refused[0].json()["error"]["code"] == "capacity"
        assert int(refused[0].headers["retry-after"]) >= 1
    for connection in connections:
        connection.close()
    engine.until(lambda: engine.state()["live"] == 0)


def test_sleep_frees_wake_answers_the_same(engine: Serving) -> None:
    canary = engine.control("canary")
    assert len(canary["tokens"]) == 8
    text = engine.complete(**LONG)["choices"][0]["text"]
    held = engine.state()["accelerator_bytes"]
    slept = engine.control("sleep")
    assert slept["accelerator_bytes"] < held / 4
    assert engine.state()["state"] == "asleep"
    assert engine.control("sleep")["accelerator_bytes"] == slept["accelerator_bytes"]  # idempotent
    error = engine.refused("/v1/completions", 503, "asleep", prompt="a")
    assert error["type"] == "server_error"
    assert engine.http.post("/control/canary").status_code == 409
    assert engine.control("wake")["wake_ms"] >= 0
    assert engine.control("canary") == canary
    assert engine.complete(**LONG)["choices"][0]["text"] == text


def test_sleep_is_refused_while_work_runs(engine: Serving) -> None:
    with engine.http.stream("POST", "/v1/completions", json={"model": "m", "prompt": "a", "stream": True} | LONG) as s:
        lines = s.iter_lines()
        next(lines)
        refused = engine.http.post("/control/sleep")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert "data: [DONE]" in list(lines)
    assert engine.state()["state"] == "ready"


def test_drain_waits_refuses_and_resumes(engine: Serving) -> None:
    with engine.http.stream("POST", "/v1/completions", json={"model": "m", "prompt": "a", "stream": True} | LONG) as s:
        lines = s.iter_lines()
        next(lines)
        assert engine.control("drain") == {"running": 0, "waiting": 0}
        assert "data: [DONE]" in list(lines)
    engine.refused("/v1/completions", 503, "draining", prompt="a")
    engine.control("resume")
    assert engine.complete(max_tokens=1)


def test_the_official_sdk(engine: Serving) -> None:
    with openai.OpenAI(base_url="http://engine/v1", api_key="k", http_client=engine.http, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="m", messages=CHAT["messages"], max_tokens=6, extra_body={"top_k": 1}
        )
        assert answer.usage is not None
        chunks = list(
            client.chat.completions.create(
                model="m",
                messages=CHAT["messages"],
                max_tokens=6,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"top_k": 1},
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answer.choices[0].message.content
        assert chunks[-1].usage == answer.usage
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="m", prompt="the " * 300)
        assert caught.value.code == "context_length_exceeded"
        engine.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=engine.path), base_url="http://engine", timeout=60
        )  # leaving the SDK's block closed the first one


def test_no_chat_template(tmp_path: Path) -> None:
    with Serving(models.llama(chat_template=False), tmp_path) as serving:
        error = serving.refused("/v1/chat/completions", 400, "invalid_request", **CHAT)
        assert "chat template" in error["message"]
        assert serving.complete(max_tokens=2)
