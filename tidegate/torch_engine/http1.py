"""A small HTTP/1.1 server protocol on httptools, for a trusted peer on a Unix socket.

Why not uvicorn: a streamed token is one `transport.write` here, and a closed connection is one synchronous call, so an
abandoned sequence leaves the batch before the next step. Bounds: header bytes, body bytes, unread response bytes,
pipelined requests. A peer that half-closes is gone.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import cast

import httptools

BODY_BYTES_MAX = 16 << 20  # the gateway's limit is lower and answered there; this one protects the process
HEADER_BYTES_MAX = 64 << 10
ADAPTER_HEADER = b"x-tidegate-adapter"
UNREAD_BYTES_MAX = 8 << 20
PIPELINED_MAX = 16

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

Handler = Callable[["Exchange"], None]


class Exchange:
    """One request and its answer. Every method may be called after the peer left; it then does nothing."""

    def __init__(self, connection: "Connection", method: str, path: str) -> None:
        self.method = method
        self.path = path
        self.adapter = b""
        self.body = b""
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self._connection = connection
        self._started = False
        self._ended = False

    @property
    def started(self) -> bool:
        return self._started

    def respond(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        """The whole answer at once."""
        assert not self._started, "a second answer to one request"
        self._started = self._ended = True
        head = _head(status, kind, headers) + b"content-length: %d\r\n\r\n" % len(body)
        self._connection.send(self, head + body)
        self._connection.finish(self)

    def start(self, status: int, kind: str, headers: Mapping[str, str] | None = None) -> None:
        """The head of a streamed answer, sent with its first piece."""
        assert not self._started, "a second answer to one request"
        self._started = True
        self._connection.send(self, _head(status, kind, headers) + b"transfer-encoding: chunked\r\n\r\n")

    def write(self, piece: bytes) -> None:
        assert self._started
        self._connection.send(self, b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self, piece: bytes = b"") -> None:
        """The last piece and the end of the stream, in one write."""
        assert self._started
        if self._ended:
            return
        self._ended = True
        last = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        self._connection.send(self, last + b"0\r\n\r\n")
        self._connection.finish(self)

    def lost(self) -> None:
        if not self.gone:
            self.gone = True
            if self.on_gone is not None and not self._ended:
                self.on_gone()


def _head(status: int, kind: str, headers: Mapping[str, str] | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}", f"content-type: {kind}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n").encode("latin-1")


class Connection(asyncio.Protocol):
    """One peer. Answers leave in the order the requests came."""

    def __init__(self, handler: Handler, connections: set["Connection"]) -> None:
        self._handler = handler
        self._connections = connections
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Exchange] = deque()
        self._current: Exchange | None = None
        self._reading: Exchange | None = None
        self._url = b""
        self._adapter = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._header_bytes = 0
        self._in_head = True
        self._close_after = False

    # ---- transport --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._connections.discard(self)
        for exchange in ([self._current] if self._current else []) + list(self._queue):
            exchange.lost()
        self._queue.clear()

    def eof_received(self) -> None:
        return None  # closes the transport: a peer that sends no more has left

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
            if self._in_head:
                self._header_bytes += len(data)
                if self._header_bytes > HEADER_BYTES_MAX:
                    self.close()
        except httptools.HttpParserUpgrade:
            self.close()
        except httptools.HttpParserError:
            self._refuse(400, b'{"error":{"message":"malformed HTTP request","type":"invalid_request_error",'
                         b'"param":null,"code":"invalid_request"}}')  # fmt: skip

    # ---- httptools callbacks ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._body, self._body_bytes, self._in_head = b"", [], 0, True
        self._adapter = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == ADAPTER_HEADER:
            self._adapter = value

    def on_headers_complete(self) -> None:
        self._in_head, self._header_bytes = False, 0
        path = self._url.split(b"?", 1)[0].decode("latin-1")
        self._reading = Exchange(self, self._parser.get_method().decode("latin-1"), path)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > BODY_BYTES_MAX:
            self._refuse(413, b'{"error":{"message":"the request body is too large","type":"invalid_request_error",'
                         b'"param":null,"code":"body_too_large"}}')  # fmt: skip
            return
        self._body.append(body)

    def on_message_complete(self) -> None:
        exchange, self._reading = self._reading, None
        if exchange is None or self._close_after:
            return
        exchange.adapter = self._adapter
        exchange.body = b"".join(self._body)
        self._body = []
        if not self._parser.should_keep_alive():
            self._close_after = True
        self._queue.append(exchange)
        if len(self._queue) > PIPELINED_MAX:
            self.close()
        self._next()

    # ---- answers ----------------------------------------------------------------------------------------------------

    def send(self, exchange: Exchange, data: bytes) -> None:
        if self._transport is None or exchange.gone or exchange is not self._current:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            self._transport.abort()  # it does not read what it asked for

    def finish(self, exchange: Exchange) -> None:
        if exchange is not self._current:
            return
        self._current = None
        if self._close_after and not self._queue:
            self.close()
        else:
            self._next()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _next(self) -> None:
        if self._current is None and self._queue:
            self._current = self._queue.popleft()
            self._handler(self._current)

    def _refuse(self, status: int, body: bytes) -> None:
        """A request that cannot be parsed: answered if nothing else is in the way, and the connection ends."""
        self._reading, self._close_after = None, True
        if self._transport is not None and self._current is None:
            head = _head(status, "application/json", {"connection": "close"})
            self._transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.close()
