"""A stand-in engine over a real Unix socket, in the built-in engine's dialect, that can be told to misbehave."""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 7
DONE = b"data: [DONE]\n\n"


@dataclass
class Exchange:
    """One request as the engine saw it."""

    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    written: list[bytes] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    async def write(self, data: bytes) -> None:
        self.written.append(data)
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int = 200, kind: str = "text/event-stream", length: int | None = None) -> None:
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        head = (
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\nx-tidegate-prompt-tokens: {PROMPT_TOKENS}\r\n"
            f"x-tidegate-cached-tokens: 2\r\n{framing}\r\n\r\n"
        )
        self.writer.write(head.encode())
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.write(b"0\r\n\r\n")


Behaviour = Callable[[Exchange], Awaitable[None]]


def event(number: int, text: str) -> bytes:
    data = {"object": "chat.completion.chunk", "id": "c", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}  # fmt: skip
    return b"id: %d\ndata: %b\n\n" % (number, json.dumps(data).encode())


def usage(tokens: int) -> dict[str, Any]:
    details = {"cached_tokens": 2}
    total = PROMPT_TOKENS + tokens
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": total,
            "prompt_tokens_details": details}  # fmt: skip


def answer(tokens: int) -> bytes:
    message = {"role": "assistant", "content": "t " * tokens}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices,
                       "usage": usage(tokens)}).encode()  # fmt: skip


async def serve_well(exchange: Exchange) -> None:
    """`max_tokens` tokens, `pause` seconds apart."""
    request = exchange.json
    tokens = request.get("max_tokens", 3)
    if exchange.path == "/v1/embeddings":
        body = json.dumps({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}],
                           "model": "m", "usage": {"prompt_tokens": 4, "total_tokens": 4}}).encode()  # fmt: skip
        await exchange.head(kind="application/json", length=len(body))
        await exchange.write(body)
        return
    if not request.get("stream"):
        body = answer(tokens)
        await exchange.head(kind="application/json", length=len(body))
        await exchange.write(body)
        return
    await exchange.head()
    for number in range(1, tokens + 1):
        if number > 1 and request.get("pause"):
            await asyncio.sleep(request["pause"])
        await exchange.chunk(event(number, f"t{number} "))
    if (request.get("stream_options") or {}).get("include_usage"):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
                 "usage": usage(tokens)}  # fmt: skip
        await exchange.chunk(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await exchange.chunk(DONE)
    await exchange.end()


def refuse(status: int, code: str, message: str = "no") -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}}).encode()
        await exchange.head(status, "application/json", len(body))
        await exchange.write(body)

    return behave


async def die(exchange: Exchange) -> None:
    """Without a byte."""
    exchange.writer.transport.abort()


async def hang(exchange: Exchange) -> None:
    """Says nothing until the gateway hangs up."""
    await exchange.gone.wait()


class StandInEngine:
    """Uses the next of `script` for each request, `serve_well` when it is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = f"unix:{path}"
        self.script: deque[Behaviour] = deque()
        self.exchanges: list[Exchange] = []
        self.open = 0
        self.opened = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def kill(self) -> None:
        """As SIGKILL would: nothing accepts, every connection breaks."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.opened += 1
        self._writers.add(writer)
        try:
            while await self._serve_one(reader, writer):
                continue
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        exchange = Exchange(lines[0].split()[1], headers, body, writer)
        self.exchanges.append(exchange)
        behaviour = self.script.popleft() if self.script else serve_well
        watch = asyncio.create_task(self._watch(reader, exchange))
        try:
            await behaviour(exchange)
        except ConnectionError:
            exchange.gone.set()
            raise
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return not (exchange.gone.is_set() or writer.is_closing())

    @staticmethod
    async def _watch(reader: asyncio.StreamReader, exchange: Exchange) -> None:
        # Stops short of reading: what comes next on the connection is the next request, or its end.
        while not reader.at_eof():  # noqa: ASYNC110 — a StreamReader has no event for it
            await asyncio.sleep(0.005)
        exchange.gone.set()
        exchange.writer.transport.abort()
