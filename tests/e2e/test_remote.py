"""An endpoint served by an API elsewhere: asked and billed like any other, its key on no disk."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest

from tests.e2e.platform import Platform, running, wait_until

pytest.importorskip("torch")
from tidegate import demo_models

pytestmark = pytest.mark.e2e

SECRET = "sk-far-xyzzyplugh-0123456789"


class Provider(BaseHTTPRequestHandler):
    """A stand-in for a provider: whole answers and streams of four tokens, to whoever has the key."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        if self.headers["authorization"] != f"Bearer {SECRET}":
            self._send(401, {"error": {"message": "wrong key"}})
        elif body.get("max_tokens") == 429:
            self._send(429, {"error": {"message": "slow down"}}, {"retry-after": "9"})
        elif body.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for text in ("far ", "away ", "and ", "well"):
                self._event({"choices": [{"index": 0, "delta": {"content": text}}]})
            if (body.get("stream_options") or {}).get("include_usage"):
                self._event({"choices": [], "usage": USAGE})
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            message = {"role": "assistant", "content": "far away and well"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            self._send(200, {"id": "c", "object": "chat.completion", "choices": choices, "usage": USAGE})

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n")

    def _send(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


USAGE = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("remote")
    key_file = folder / "key"
    key_file.write_text(SECRET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = [
        "demo = false",
        f'[remotes.far]\nurl = "http://127.0.0.1:{server.server_port}/api/v1"\nkey_file = "{key_file}"',
        '[[tenants]]\nid = "acme"\napi_key = "key-of-acme-0123456789"',
        '[[endpoints]]\nname = "acme/big"\nmodel = "remote://far/their/big-model"\nengine = "remote"',
    ]
    try:
        with running(folder / "up", config="\n".join(lines)) as started:
            yield started
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def client(platform: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key="key-of-acme-0123456789", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="big", messages=[{"role": "user", "content": "where are you"}], **more)


def test_it_is_asked_and_billed_like_any_other(platform: Platform, client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "far away and well"
    chunks = list(ask(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "far away and well"
    assert all(chunk.usage is None for chunk in chunks)
    assert Provider.seen[-1]["model"] == "their/big-model"

    def billed() -> bool:
        with platform.admin() as admin:
            rows = admin.get("/api/v1/usage", params={"by": "endpoint"}).json()["rows"]
        return [(row["group"], row["input_tokens"], row["output_tokens"]) for row in rows] == [("acme/big", 14, 8)]

    wait_until(billed, "both to be billed", 20)
    with platform.admin() as admin:
        view = admin.get("/api/v1/endpoints/acme%2Fbig").json()
    assert (view["state"], view["engine"], view["replicas"]) == ("ready", "remote", [])


def test_its_limit_is_told_with_its_own_retry_after(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, max_tokens=429)
    assert refused.value.response.headers["retry-after"] == "9"
    assert "slow down" not in str(refused.value)


def test_a_busy_endpoint_overflows_to_it_where_residency_allows(platform: Platform, client: openai.OpenAI) -> None:
    overflow = {"to": "acme/big", "above_concurrency": 1}
    body = {"model": str(demo_models.path("tides")), "overflow": overflow}
    with platform.admin() as admin:
        refused = admin.put("/api/v1/endpoints/acme%2Fsmall", json=body)
        assert refused.json()["error"]["code"] == "residency_denied"
        applied = admin.put("/api/v1/endpoints/acme%2Fsmall", json={**body, "regions": ["local", "remote"]})
        assert applied.status_code == 200, applied.text
    question = [{"role": "user", "content": demo_models.QUESTIONS["tides"][0]}]

    def one(_: int) -> tuple[str, str]:
        raw = client.chat.completions.with_raw_response.create(model="small", messages=question)  # type: ignore[arg-type]
        return raw.headers.get("x-tidegate-overflow", ""), raw.parse().choices[0].message.content or ""

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(one, range(8)))
    there = [text for reason, text in answers if reason]
    here = [text for reason, text in answers if not reason]
    assert here
    assert set(there) == {"far away and well"}
    assert "far away and well" not in here


def test_its_key_is_in_no_file_of_the_platform(platform: Platform) -> None:
    files = [path for path in Path(platform.directory).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path.name for path in files if SECRET.encode() in path.read_bytes()]


def test_an_endpoint_cannot_name_a_place_of_its_own(platform: Platform) -> None:
    with platform.admin() as admin:
        for model in ("remote://elsewhere/model", "https://mine.example/v1"):
            refused = admin.put("/api/v1/endpoints/acme%2Fother", json={"model": model, "engine": "remote"})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] in ("model", "engine")
