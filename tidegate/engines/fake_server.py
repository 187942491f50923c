"""The fake engine's HTTP side: OpenAI on a Unix socket in the built-in engine's dialect (`id: N` lines, token headers).

Its "model" answers with the words ``t1 t2 …``, one per token, as many as `max_tokens` asks for (4 when it does not); a
prompt counts one token per word of the body's texts. Deliberately plain: asyncio streams, one request a connection.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tidegate.wire import openai

BODY_BYTES_MAX = 16 << 20


class FakeServer:
    """`running` counts requests in flight; `refuses` says whether new ones get 503 (asleep or draining)."""

    def __init__(self, path: Path, *, token_ms: int = 0) -> None:
        self._path, self._token_ms = path, token_ms
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.refuses: Callable[[], bool] = lambda: False
        self.running = 0
        self.prompt_tokens_total = 0
        self.completion_tokens_total = 0

    @property
    def address(self) -> str:
        return f"unix:{self._path}"

    async def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        os.chmod(self._path, 0o600)

    async def close(self) -> None:
        self.abort()
        self._path.unlink(missing_ok=True)

    def abort(self) -> None:
        """As a killed process looks from outside: connections cut, nobody listens."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client left: nothing to say and nobody to say it to
        finally:
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        _, path, _ = head[0].split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        length = min(int(headers.get("content-length", "0")), BODY_BYTES_MAX)
        raw = await reader.readexactly(length)
        if self.refuses():
            _reply(writer, 503, openai.error_body("not_ready", "the engine takes no requests now"))
            return
        if path == "/v1/models":
            _reply(writer, 200, openai.encode({"object": "list", "data": [{"id": "fake", "object": "model"}]}))
            return
        self.running += 1
        try:
            await self._complete(path, msgspec.json.decode(raw), writer)
        finally:
            self.running -= 1

    async def _complete(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        prompt_tokens = _count_words(body)
        self.prompt_tokens_total += prompt_tokens
        metering = {"x-tidegate-prompt-tokens": str(prompt_tokens), "x-tidegate-cached-tokens": "0"}
        tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or 4)
        if path == "/v1/embeddings":
            embedding = {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}
            usage = openai.usage(prompt_tokens, 0)
            shape = {"object": "list", "model": body["model"], "data": [embedding], "usage": usage}
            _reply(writer, 200, openai.encode(shape), metering)
        elif path in ("/v1/chat/completions", "/v1/completions"):
            chat = path == "/v1/chat/completions"
            if body.get("stream"):
                await self._stream(body, chat, prompt_tokens, tokens, metering, writer)
            else:
                await self._whole(body, chat, prompt_tokens, tokens, metering, writer)
        else:
            _reply(writer, 404, openai.error_body("not_found", "no such path"))

    async def _whole(
        self,
        body: dict[str, Any],
        chat: bool,
        prompt_tokens: int,
        tokens: int,
        metering: dict[str, str],
        writer: asyncio.StreamWriter,
    ) -> None:
        await asyncio.sleep(self._token_ms * tokens / 1000)
        self.completion_tokens_total += tokens
        text = "".join(_word(n) for n in range(1, tokens + 1))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        _reply(
            writer,
            200,
            openai.encode(_shape(body, chat, [choice], openai.usage(prompt_tokens, tokens), chunk=False)),
            metering,
        )

    async def _stream(
        self,
        body: dict[str, Any],
        chat: bool,
        prompt_tokens: int,
        tokens: int,
        metering: dict[str, str],
        writer: asyncio.StreamWriter,
    ) -> None:
        headers = {"content-type": openai.SSE_CONTENT_TYPE, "transfer-encoding": "chunked", "connection": "close"}
        writer.write(_head(200, headers | metering))
        for number in range(1, tokens + 1):
            await asyncio.sleep(self._token_ms / 1000)
            self.completion_tokens_total += 1
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if number == tokens else None}
            choice |= {"delta": {"content": _word(number)}} if chat else {"text": _word(number)}
            _chunk(writer, openai.sse_event(openai.encode(_shape(body, chat, [choice], None)), number))
            await writer.drain()
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = openai.usage(prompt_tokens, tokens)
            _chunk(writer, openai.sse_event(openai.encode(_shape(body, chat, [], usage)), tokens))
        _chunk(writer, openai.SSE_DONE)
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _word(number: int) -> str:
    return f"t{number} "


def _count_words(body: dict[str, Any]) -> int:
    texts = [str(message.get("content", "")) for message in body.get("messages", [])]
    return max(1, sum(len(text.split()) for text in [*texts, str(body.get("prompt", "")), str(body.get("input", ""))]))


def _shape(
    body: dict[str, Any], chat: bool, choices: list[dict[str, Any]], usage: openai.Usage | None, *, chunk: bool = True
) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    shape: dict[str, Any] = {"id": "fake-1", "object": kind, "created": 0, "model": body["model"], "choices": choices}
    return shape if usage is None else shape | {"usage": usage}


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _reply(writer: asyncio.StreamWriter, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    writer.write(_head(status, headers | (extra or {})) + body)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n" % len(data) + data + b"\r\n")
