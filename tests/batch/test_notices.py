"""Webhooks over real HTTP: signed so that OpenAI's SDK takes them, tried again, given up in the end."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tidegate.batch import notices
from tidegate.batch.ports import Webhook
from tidegate.config import ConfigError, load
from tidegate.wire import webhooks
from tidegate.wire.batch import Status, StoredBatch

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef").decode()


class Clock:
    def now_ms(self) -> int:
        import time

        return time.time_ns() // 1_000_000


def batch(status: Status) -> StoredBatch:
    return StoredBatch(
        id="batch_1",
        tenant="acme",
        key="k",
        url="/v1/embeddings",
        input_file_id="file-1",
        completion_window="24h",
        created_ms=1,
        expires_ms=2,
        status=status,
        ended_ms=5_000,
    )


async def told(statuses: list[int], status: Status) -> tuple[bool, list[tuple[dict[str, str], bytes]]]:
    """What a receiver that answers with `statuses`, one after the other, was sent."""
    received: list[tuple[dict[str, str], bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head)}
        received.append((headers, await reader.readexactly(int(headers["content-length"]))))
        answer = statuses[len(received) - 1]
        writer.write(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        taken = await notices.deliver(batch(status), Webhook(f"http://127.0.0.1:{port}/hook", SECRET), Clock())
    return taken, received


def test_the_sdk_takes_what_is_signed_and_a_copy_has_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "PAUSE_S_MIN", 0.01)
    taken, received = asyncio.run(told([500, 302, 204], Status.COMPLETED))
    assert taken
    assert len(received) == 3
    assert len({headers["webhook-id"] for headers, _ in received}) == 1
    sdk: Any = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    headers, body = received[-1]
    event = sdk.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id, event.created_at) == ("batch.completed", "batch_1", 5)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        sdk.webhooks.unwrap(body.replace(b"batch_1", b"batch_2"), headers)


def test_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "PAUSE_S_MIN", 0.001)
    monkeypatch.setattr(notices, "PAUSE_S_MAX", 0.001)
    taken, received = asyncio.run(told([503] * notices.TRIES_MAX, Status.EXPIRED))
    assert (taken, len(received)) == (False, notices.TRIES_MAX)
    assert json.loads(received[0][1])["type"] == "batch.expired"


@pytest.mark.parametrize("secret", ["whsec_", "whsec_!!", "0123456789abcdef", "whsec_YWJj"])
def test_a_secret_that_is_none_is_refused_without_being_shown(secret: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whsec_ and the base64"):
        webhooks.secret_bytes(secret)
    toml = tmp_path / "t.toml"
    toml.write_text(f"[batch.webhooks.acme]\nurl = 'ftp://x'\nsecret = '{secret}'\n")
    with pytest.raises(ConfigError) as refused:
        load(toml)
    assert {key for key, _ in refused.value.problems} == {"batch.webhooks.acme.url", "batch.webhooks.acme.secret"}
    assert secret == "whsec_" or secret not in str(refused.value)
