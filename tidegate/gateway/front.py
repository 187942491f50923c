"""uvicorn's httptools protocol with the bounds and the answers a public port needs.

What it adds: bounds on a request head's size, field count and time; refusals in OpenAI's shape where uvicorn answers
with plain text; a client that stops reading is given up; and the end of a connection is told to its relays at once,
without a task that waits for it on every request.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tidegate.domain.errors import REFUSALS, Refusal
from tidegate.gateway.limits import GatewayLimits
from tidegate.wire import openai

PEER = "tidegate.peer"  # key of the Peer in an ASGI scope


class Peer:
    """The client's side of one request. `on_lost` is called once when its connection ends before the answer does;
    `close` ends the connection (None where only the server can).
    """

    __slots__ = ("body_here", "close", "lost", "on_lost")

    def __init__(self, close: Callable[[], None] | None = None) -> None:
        self.close = close
        self.body_here = False
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class Front(HttpToolsProtocol):
    """Instances are made by uvicorn; `limits` is set on a subclass by `front_class`."""

    limits = GatewayLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers: list[Peer] = []
        self._in_head = True
        self._head_bytes = 0
        # Instants of the loop's clock in seconds; 0 when no message is half received, when nothing is left unread.
        self._message_since = self.loop.time()
        self._stalled_since = 0.0

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if not self._message_since:
                self._message_since = self.loop.time()
        super().data_received(data)
        if self._in_head and self._head_bytes > self.limits.head_bytes_max:
            self._refuse("invalid_request", f"the request head is over {self.limits.head_bytes_max} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        peers, self._peers = self._peers, []
        for peer in peers:
            peer.lose()

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = 0.0
        super().resume_writing()

    # --- parser -------------------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        if self._head_bytes > self.limits.head_bytes_max or len(self.headers) > self.limits.head_fields_max:
            self._check_head()
        self._in_head = False
        super().on_headers_complete()
        peer = Peer(self.transport.abort)
        self.scope[PEER] = peer  # type: ignore[literal-required]
        self._peers.append(peer)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0
        self._message_since = 0.0
        if self._peers:
            self._peers[-1].body_here = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._peers:
            self._peers.pop(0)

    def _check_head(self) -> None:
        """What was counted may include body bytes of the same segment; this is exact."""
        head_bytes = sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url)
        if head_bytes > self.limits.head_bytes_max or len(self.headers) > self.limits.head_fields_max:
            self._refuse("invalid_request", "the request head has too many bytes or fields")
            raise ValueError("request head over its bounds")  # stops the parser; uvicorn sees a malformed request

    # --- refusals -----------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse("invalid_request", "the request is not valid HTTP/1.1")

    def _refuse(self, code: str, message: str) -> None:
        """Answers without a request: the connection is closed, since where the next request begins is unknown."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = openai.refusal_body(Refusal(code, message))
            status = REFUSALS[code][0]
            self.transport.write(
                b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
                % (status, len(body))
                + body
            )
        self.transport.close()

    def sweep(self, now: float) -> None:
        """Gives up clients that send, or read, too slowly. `now` is the loop's clock in seconds."""
        since, limits = self._message_since, self.limits
        if self._stalled_since and now - self._stalled_since > limits.client_stall_ms_max / 1000:
            self.transport.abort()
        elif since and self._in_head and now - since > limits.head_ms_max / 1000:
            if self._head_bytes:
                self._refuse("request_timeout", f"the request head did not come within {limits.head_ms_max} ms")
            self.transport.close()
        elif since and now - since > (limits.head_ms_max + limits.body_ms_max) / 1000 and self.cycle.response_complete:
            # Refused before its body had come (413, 401): the rest is read and dropped, but not for ever.
            self.transport.abort()


def front_class(limits: GatewayLimits) -> type[Front]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("Front", (Front,), {"limits": limits})
