"""Text sessions on the real platform, by the synchronous SDK: capacity that is held, given up when idle, and lost."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import websockets

from tests.e2e.platform import Platform, running, wait_until

pytest.importorskip("torch")
from tests import models

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KEY = "tg-acme-0123456789"
CONFIG = f"""
demo = false
[accelerators]
kind = "cpu"
count = 1
memory = "60MiB"
[capacity]
residency_ms_min = 200
wait_ms_max = 1000
[gateway]
session_idle_ms_max = 4000
[[tenants]]
id = "acme"
api_key = "{KEY}"
"""
HELLO: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the water"}]}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One accelerator with room for one of two endpoints."""
    endpoints = "".join(
        f"[[endpoints]]\nname = 'acme/{name}'\nmodel = '{models.llama(seed=seed)}'\naccelerator_memory = '48MiB'\n"
        for seed, name in enumerate(("agent", "other"))
    )
    with running(tmp_path_factory.mktemp("realtime"), config=CONFIG + endpoints) as platform:
        yield platform


@contextlib.contextmanager
def session(platform: Platform, **options: Any) -> Iterator[Any]:
    client = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=KEY, max_retries=0)
    with client.realtime.connect(model="agent", **options) as connection:
        assert connection.recv().type == "session.created"
        connection.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        assert connection.recv().type == "session.updated"
        yield connection


def respond(connection: Any, tokens: int = 8) -> Any:
    connection.conversation.item.create(item=HELLO)
    connection.response.create(response={"max_output_tokens": tokens})
    while (event := connection.recv()).type not in ("response.done", "error"):
        pass
    assert event.type == "response.done", event
    return event.response


def stay(connection: Any) -> None:
    """A sign of life."""
    connection.session.update(session={"type": "realtime"})
    assert connection.recv().type == "session.updated"


def ask_other(platform: Platform) -> int:
    client = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=KEY, max_retries=0)
    answer = client.completions.create(model="other", prompt="the", max_tokens=2)
    return answer.usage.completion_tokens if answer.usage else 0


def used(platform: Platform) -> tuple[int, int]:
    """(requests, output tokens) of the sessions' endpoint in the ledger."""
    with platform.admin() as admin:
        rows = admin.get("/api/v1/usage", params={"by": "endpoint"}).json()
    found = [row for row in (rows["data"] if "data" in rows else rows["rows"]) if row["group"] == "acme/agent"]
    return (found[0]["requests"], found[0]["output_tokens"]) if found else (0, 0)


def test_no_victim_while_active_and_given_up_when_idle(platform: Platform) -> None:
    requests, tokens = used(platform)
    with ThreadPoolExecutor(1) as pool, session(platform) as connection:
        said = [respond(connection)]
        waiting = pool.submit(ask_other, platform)
        with platform.admin() as admin:
            drained = "somebody else waits past the bound and has it drained"
            wait_until(lambda: _drained(admin) or stay(connection), drained)
        for _ in range(3):
            said.append(respond(connection))
        assert not waiting.done(), "its accelerator is the session's"
        *_, last = connection
        assert last.error.code == "session_idle"
        assert waiting.result(60) > 0, "the idle session gave its place up"
    assert all(response.status in ("completed", "incomplete") for response in said)
    total = sum(response.usage.output_tokens for response in said)
    wait_until(lambda: used(platform) == (requests + 4, tokens + total), "one record a response", 20)


def test_a_killed_gateway_ends_sessions_and_the_next_one_takes_them(platform: Platform) -> None:
    requests, tokens = used(platform)
    with session(platform) as connection:
        before = respond(connection)
        connection.conversation.item.create(item=HELLO)
        connection.response.create(response={"max_output_tokens": 200, "temperature": 2})
        while connection.recv().type != "response.created":
            pass
        chat = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=KEY, max_retries=0).completions
        stream = chat.create(model="agent", prompt="the", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        (gateway,) = platform.gateways()
        gateway.kill()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        with pytest.raises(websockets.ConnectionClosedError):
            list(connection)
    with session(platform) as connection:
        after = respond(connection)
        for engine in platform.engines():
            engine.kill()
        again = respond(connection)
        assert again.status in ("completed", "incomplete"), "the session outlives its replica"
    least = sum(response.usage.output_tokens for response in (before, after, again))
    found = wait_until(lambda: (u := used(platform))[0] >= requests + 3 and u, "the finished responses", 30)
    assert requests + 3 <= found[0] <= requests + 5, "and what the killed gateway had written of the two it was in"
    assert found[1] >= tokens + least


def _drained(admin: Any) -> bool:
    view = admin.get("/api/v1/endpoints/acme/agent").raise_for_status().json()
    return view["state"] not in ("ready", "idle")
