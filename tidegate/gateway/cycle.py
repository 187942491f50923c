"""One request and its answer on uvicorn's connection, with a leaner `send` than uvicorn's own.

uvicorn writes the head of an answer and its body apart and checks every header with two regular expressions, which on a
small answer is most of the front's cost. Here a head waits for the first write of its body, and headers are taken as
they are: ours are made of ids and numbers, passed-through ones came out of an HTTP parser that allows no line breaks.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from tidegate.wire import openai

_BUG = openai.encode(openai.error_object("the gateway failed; it is logged", "server_error", "internal_error"))
_BUG_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BUG))]


class Cycle(RequestResponseCycle):
    """Also what a relay knows of its client: `on_lost` is called once if the connection ends before the answer does."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on_lost: Callable[[], None] | None = None
        self._head = b""

    @property
    def lost(self) -> bool:
        return self.disconnected

    def take_body(self) -> bytes | None:
        """The whole body of the request if it has come already, which saves waiting for it; else None."""
        if self.more_body:
            return None
        self.flow.resume_reading()
        body, self.body = bytes(self.body), bytearray()
        return body

    def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer at once."""
        if not self.disconnected:
            headers.append((b"content-length", b"%d" % len(body)))
            self._begin(status, headers)
            self._send_body(body, False)

    def close(self) -> None:
        """Breaks the connection: the only way to say that an answer is not whole."""
        self.transport.abort()

    def lose(self) -> None:
        """The connection has ended."""
        if not self.response_complete:
            self.disconnected = True
        self.message_event.set()
        if self.on_lost is not None:
            self.on_lost()

    async def send_500_response(self) -> None:
        """uvicorn calls it when the application raised: a bug, which is logged; its text is not for clients."""
        await self.send({"type": "http.response.start", "status": 500, "headers": _BUG_HEADERS})
        await self.send({"type": "http.response.body", "body": _BUG})

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.body":
            self._send_body(message.get("body", b""), message.get("more_body", False))
        elif self.response_started:
            raise RuntimeError("an answer begins once")
        else:
            self._begin(message["status"], message["headers"])

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        lines = [STATUS_LINE[status]]
        for name, value in (*self.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def _send_body(self, body: bytes, more_body: bool) -> None:
        if not self.response_started or self.response_complete:
            raise RuntimeError("a body belongs between the head and the end of an answer")
        head, self._head = self._head, b""
        if self.scope["method"] == "HEAD":
            data = head
            self.expected_content_length = 0
        elif self.chunked_encoding:
            data = b"%b%x\r\n%b\r\n" % (head, len(body), body) if body else head
            if not more_body:
                data += b"0\r\n\r\n"
        else:
            data = head + body
            self.expected_content_length -= len(body)
        if data:
            self.transport.write(data)
        if not more_body:
            self._finish()

    def _finish(self) -> None:
        if self.expected_content_length != 0:
            raise RuntimeError("the body is not as long as its content-length")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
