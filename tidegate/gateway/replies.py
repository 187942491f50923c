"""Answers of the gateway's own: refusals in OpenAI's shape, small JSON, and the head of a relayed answer."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tidegate.domain.errors import Refusal
from tidegate.wire import openai

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")
SSE: Header = (b"content-type", openai.SSE_CONTENT_TYPE.encode())
# A proxy that buffers would turn a stream into one late answer.
STREAM_HEADERS: tuple[Header, ...] = (SSE, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


async def reply(send: Send, status: int, body: bytes, headers: list[Header]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def reply_refusal(send: Send, refusal: Refusal, headers: list[Header]) -> None:
    headers.append(JSON)
    headers += [(name.encode(), value.encode()) for name, value in openai.refusal_headers(refusal).items()]
    await reply(send, refusal.status, openai.refusal_body(refusal), headers)


async def reply_json(send: Send, body: bytes, headers: list[Header], status: int = 200) -> None:
    headers.append(JSON)
    await reply(send, status, body, headers)
