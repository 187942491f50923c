"""What a new user does in the first minutes, through the official SDK and the command line, on the real platform."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.platform import Platform, running, wait_until

pytest.importorskip("torch")
from tidegate import demo_models

pytestmark = pytest.mark.e2e

SECRET = "xyzzyplughsecretprompt"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running(tmp_path_factory.mktemp("first")) as started:
        yield started


@pytest.fixture
def client(platform: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=platform.ready["api_key"], max_retries=0)


def ask(client: openai.OpenAI, endpoint: str, question: str) -> str:
    answer = client.chat.completions.create(
        model=endpoint, messages=[{"role": "user", "content": question}], temperature=0
    )
    return answer.choices[0].message.content or ""


def run_cli(platform: Platform, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tidegate", *arguments, "-o", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PATH": "/usr/bin:/bin",
            "TIDEGATE_URL": platform.base_url,
            "TIDEGATE_ADMIN_KEY": platform.ready["admin_key"],
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_there_are_more_endpoints_than_accelerators_hold(platform: Platform) -> None:
    endpoints = run_cli(platform, "endpoints", "list")
    nodes = run_cli(platform, "nodes")
    rows = nodes if isinstance(nodes, list) else nodes["data"]
    accelerators = [a for node in rows for a in node["accelerators"]]
    listed = endpoints if isinstance(endpoints, list) else endpoints["data"]
    assert len(listed) > len(accelerators)
    assert sum(e["accelerator_bytes"] for e in listed) > sum(a["memory_bytes"] for a in accelerators)


def test_each_endpoint_answers_with_its_own_model(client: openai.OpenAI) -> None:
    for _ in range(3):
        for name in demo_models.NAMES:
            said = ask(client, f"demo/{name}", demo_models.QUESTIONS[name][0])
            assert demo_models.recognise(said) == name, (name, said)


def test_streaming_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo/tides",
        messages=[{"role": "user", "content": demo_models.QUESTIONS["tides"][1]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_client_that_did_not_ask_for_usage_gets_none(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo/stars", messages=[{"role": "user", "content": "Who are you?"}], stream=True
    )
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_usage_and_invoice_agree_to_the_token(platform: Platform, client: openai.OpenAI) -> None:
    def tokens_of(rows: Any) -> tuple[int, int]:
        listed = rows if isinstance(rows, list) else rows["data"]
        row = next((r for r in listed if r["endpoint"] == "demo/bees"), None)
        return (row["input_tokens"], row["output_tokens"]) if row else (0, 0)

    before = tokens_of(run_cli(platform, "usage", "--by", "endpoint"))
    sent = [
        client.chat.completions.create(model="demo/bees", messages=[{"role": "user", "content": question}]).usage
        for question in demo_models.QUESTIONS["bees"][:4]
    ]
    expected = (
        before[0] + sum(u.prompt_tokens for u in sent if u),
        before[1] + sum(u.completion_tokens for u in sent if u),
    )
    wait_until(lambda: tokens_of(run_cli(platform, "usage", "--by", "endpoint")) == expected, "usage to the token", 20)
    invoice = json.dumps(run_cli(platform, "invoices"))
    assert "dedicated" in invoice
    assert str(expected[1]) in invoice


def chat(**extra: Any) -> bytes:
    body = {"model": "demo/tides", "messages": [{"role": "user", "content": "x"}]}
    return json.dumps(body | extra).encode()


HOSTILE: list[tuple[str, bytes, int, str]] = [
    ("/v1/chat/completions", b"{", 400, "invalid_json"),
    ("/v1/chat/completions", b"[]", 400, "invalid_request"),
    ("/v1/chat/completions", b'{"messages":[]}', 400, "invalid_request"),
    ("/v1/chat/completions", chat(model=7), 400, "invalid_request"),
    ("/v1/chat/completions", chat(model="demo/none"), 404, "model_not_found"),
    ("/v1/chat/completions", chat(model="other/tides"), 404, "model_not_found"),
    ("/v1/chat/completions", chat(messages=[]), 400, "invalid_request"),
    ("/v1/chat/completions", chat(temperature=9), 400, "invalid_request"),
    ("/v1/chat/completions", chat(tools=[{"type": "function"}]), 400, "unsupported_parameter"),
    ("/v1/chat/completions", chat(stop=["a", "b", "c", "d", "e"]), 400, "invalid_request"),
    ("/v1/chat/completions", chat(stop=["x" * 10_000]), 400, "invalid_request"),
    ("/v1/embeddings", b'{"model":"demo/tides","input":"x"}', 400, "wrong_endpoint_kind"),
    ("/v1/nothing", b"{}", 404, "not_found"),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), HOSTILE)
def test_bad_input_is_refused_in_openai_shape(
    platform: Platform, path: str, body: bytes, status: int, code: str
) -> None:
    headers = {"authorization": f"Bearer {platform.ready['api_key']}", "content-type": "application/json"}
    answer = httpx.post(platform.base_url + path, content=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.headers["x-request-id"]
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_a_prompt_longer_than_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "demo/tides", "tide " * 20_000)
    assert refused.value.code == "context_length_exceeded"


def test_a_body_over_the_limit_is_refused(platform: Platform) -> None:
    headers = {"authorization": f"Bearer {platform.ready['api_key']}"}
    answer = httpx.post(platform.base_url + "/v1/completions", content=b"x" * (9 << 20), headers=headers, timeout=30)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_bad_keys(platform: Platform) -> None:
    for key in ("", "nonsense", platform.ready["api_key"][:-1]):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=key or "-", max_retries=0).models.list()


def test_nothing_of_a_prompt_is_ever_persisted_or_logged(platform: Platform, client: openai.OpenAI) -> None:
    ask(client, "demo/tides", f"Tell me about {SECRET}")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="demo/tides", messages=[{"role": "user", "content": SECRET}], temperature=99, extra_body={SECRET: 1}
        )
    run_cli(platform, "usage", "--by", "endpoint")
    holding = [
        file for file in platform.directory.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()
    ]
    assert holding == []


def test_state_survives_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        key = first.ready["api_key"]
        assert first.stop() == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(first.base_url + "/healthz", timeout=2)
    with running(tmp_path) as second:
        client = openai.OpenAI(base_url=f"{second.base_url}/v1", api_key=key, max_retries=0)
        assert demo_models.recognise(ask(client, "demo/stars", demo_models.QUESTIONS["stars"][0])) == "stars"
        children = second.children()
        assert second.stop() == 0
        wait_until(lambda: not any(child.is_running() for child in children), "every child process to be gone", 20)
