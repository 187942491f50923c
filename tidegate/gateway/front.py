"""uvicorn's httptools protocol with the bounds and the answers a public port needs.

What it adds: bounds on a request head's size, field count and time; refusals in OpenAI's shape where uvicorn answers
with plain text; a client that stops reading is given up; and the end of a connection is told to its relays at once,
without a task that waits for it on every request.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tidegate.domain.errors import REFUSALS, Refusal
from tidegate.gateway.cycle import Cycle
from tidegate.gateway.limits import GatewayLimits
from tidegate.quota.admission import KINDS
from tidegate.wire import openai

SESSIONS = b"/v1/realtime"
PEER = "tidegate.peer"  # key of the Peer in an ASGI scope
LOOKED_AT_MAX = 256  # connections, when one must go for a new one
_BODY = (b"content-length", b"transfer-encoding")
_PLAIN = {f"/v1/{api}".encode(): f"/v1/{api}" for api in KINDS}  # targets that need no parsing

# Java's HTTP client offers HTTP/2 with every request in the clear (RFC 7540 3.2), and the parser would take what
# follows the head for that protocol: the body would be lost. An offer may be ignored; here it is never seen.
_H2C = b"pgrade: h2c\r\n"
_OFFER_BYTES = 4096  # a head that begins with more than this before its offer is refused like any other upgrade
_OFFER = re.compile(rb"\r\n[Uu]pgrade: h2c(?=\r\n(?![ \t]))")  # a line that goes on is none to be cut out


def _without_offer(data: bytes) -> bytes:
    head, end, rest = data.partition(b"\r\n\r\n")
    return _OFFER.sub(b"", head + b"\r\n")[:-2] + end + rest if end else data


class Peer:
    """What a relay knows of its client behind a server other than our front; the front's is its `Cycle`."""

    def __init__(self) -> None:
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()

    def close(self) -> None:
        """Only the server can close its connection: it does when the application ends in the middle of an answer."""


class Front(HttpToolsProtocol):
    """Instances are made by uvicorn; `limits` is set on a subclass by `front_class`."""

    limits = GatewayLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cycles: deque[Cycle] = deque()  # not yet answered: more than one when a client pipelines
        self._in_head = True
        self._head_bytes = 0
        # Instants of the loop's clock in seconds; 0 when no message is half received, when nothing is left unread.
        self._message_since = self.loop.time()
        self._stalled_since = 0.0
        self._idle_since = 0.0

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections_max:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if not self._head_bytes and _H2C in data[:_OFFER_BYTES]:
                data = _without_offer(data)
            self._head_bytes += len(data)
            if not self._message_since:
                self._message_since = self.loop.time()
        super().data_received(data)
        if self._in_head and self._head_bytes > self.limits.head_bytes_max:
            self._refuse("invalid_request", f"the request head is over {self.limits.head_bytes_max} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        while self._cycles:
            self._cycles.popleft().lose()

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
        parser, scope = self.parser, self.scope
        if parser.should_upgrade():
            if self._should_upgrade():
                scope["method"] = parser.get_method().decode("ascii")
                return  # to be handed over to the WebSocket protocol once the parser has stopped
            if any(name in _BODY for name, _ in self.headers):
                # The parser takes what follows for another protocol: the body would be lost without a word.
                self._refuse("invalid_request", "a request with a body cannot ask for an upgrade; send it without")
                raise ValueError("an upgrade with a body")
        http_version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = http_version
        self._set_target()
        cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=http_version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.cycle = scope[PEER] = cycle  # type: ignore[literal-required]
        self._cycles.append(cycle)
        if len(self._cycles) == 1:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _set_target(self) -> None:
        scope, url = self.scope, self.url
        path = _PLAIN.get(url)
        if path is not None:
            scope["path"], scope["raw_path"], scope["query_string"] = path, url, b""
            return
        parsed = httptools.parse_url(url)
        scope["raw_path"] = parsed.path
        scope["path"] = unquote(parsed.path.decode("ascii"))
        scope["query_string"] = parsed.query or b""

    def _should_upgrade(self) -> bool:
        """Everywhere but there, a request that offers an upgrade is answered as if it did not (RFC 9110 7.8)."""
        is_get = self.parser.get_method() == b"GET"
        return is_get and self.url.split(b"?", 1)[0] == SESSIONS and super()._should_upgrade()

    def handle_websocket_upgrade(self) -> None:
        if self._cycles:
            self._refuse("invalid_request", "an upgrade cannot be pipelined behind another request")
        else:
            super().handle_websocket_upgrade()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0
        self._message_since = 0.0

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._cycles.popleft()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = self.loop.time()

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
        """Answers what is no request. The connection is closed, since where the next one would begin is unknown; an
        answer that is under way is not written into.
        """
        if self.transport.is_closing():
            return
        if len(self._cycles) == 1 and not self._cycles[0].response_started:
            self._cycles.popleft().lose()
        if not self._cycles:
            body = openai.refusal_body(Refusal(code, message))
            status = REFUSALS[code][0]
            self.transport.write(
                b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
                % (status, len(body))
                + body
            )
        self.transport.close()

    def _make_room(self) -> None:
        """Descriptors are few: a segment of the journal and a connection to an engine need one, too. Of those that ask
        nothing the one goes that has done so for longest; where all work, it is this one that is refused.
        """
        some = [c for c in islice(self.connections, LOOKED_AT_MAX) if isinstance(c, Front) and c is not self]
        waiting = [c for c in some if not (c._cycles or c.transport.is_closing())]
        if waiting:
            min(waiting, key=lambda c: c._message_since or c._idle_since).transport.close()
        else:
            self._refuse("not_ready", f"{self.limits.connections_max} connections are open and all of them at work")

    def sweep(self, now: float) -> None:
        """Gives up clients that send, or read, too slowly. `now` is the loop's clock in seconds."""
        since, limits = self._message_since, self.limits
        if self._stalled_since and now - self._stalled_since > limits.client_stall_ms_max / 1000:
            self.transport.abort()
        elif since and self._in_head and now - since > limits.head_ms_max / 1000:
            if self._head_bytes:
                self._refuse("request_timeout", f"the request head did not come within {limits.head_ms_max} ms")
            self.transport.close()
        elif since and now - since > (limits.head_ms_max + self._body_ms_max()) / 1000:
            # The data plane has refused it by now (408); this ends what is refused but goes on sending, and slow bodies
            # on their way to the admin socket.
            self.transport.abort()
        elif not since and not self._cycles and now - self._idle_since > limits.keep_alive_ms_max / 1000:
            self.transport.close()

    def _body_ms_max(self) -> int:
        upload = not self._in_head and self.url.startswith(b"/v1/files")
        return self.limits.upload_ms_max if upload else self.limits.body_ms_max


def front_class(limits: GatewayLimits) -> type[Front]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("Front", (Front,), {"limits": limits})
