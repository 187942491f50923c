"""What is behind a machine's relay port: engines' OpenAI API for gateways elsewhere, and nothing else of an engine.

A connection's first line says what it is for. ``replica:NAME`` reaches that replica's engine: each request is read,
checked against the few paths a gateway asks for, and written anew with nothing but the headers it needs; so an engine's
control API, which may be on the same socket, cannot be reached, by whatever trick of framing. ``admin`` (on the
control plane's machine) is the admin API, which asks for its own keys. Answers pass as they come.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import httptools

from tidegate.transports.identity import Peer

FIRST_LINE_BYTES_MAX = 512
BACKLOG_BYTES_MAX = 64 << 20  # of one request whose engine is being connected to
CONNECT_MS_MAX = 2_000
HEADERS = frozenset((b"content-type", b"x-request-id", b"x-tidegate-adapter"))

log = logging.getLogger(__name__)

Resolve = Callable[[str], str | None]


class Relay:
    """`resolve` says where a replica's engine listens (``unix:PATH``, ``tcp:HOST:PORT``), None for one that is not
    here; `paths` are what may be asked of it; `admin` is the path of the admin socket, if it is on this machine.
    """

    def __init__(self, resolve: Resolve, paths: frozenset[bytes], admin: str = "") -> None:
        self.resolve, self.paths, self.admin = resolve, paths, admin and f"unix:{admin}"

    def serve(self, peer: Peer | None) -> asyncio.Protocol:
        return _Inbound(self)


class _Inbound(asyncio.Protocol):
    """The gateway's side of one connection."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._first = b""
        self._filter: _Filter | None = None
        self._outbound: _Outbound | None = None
        self._connecting: asyncio.Task[None] | None = None

    # --- asyncio.Protocol -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._outbound is None:
            self._first += data
            line, end, rest = self._first.partition(b"\n")
            if len(line) > FIRST_LINE_BYTES_MAX:
                self.abort()
            elif end:
                self._begin(line.decode("ascii", "replace"))
                if rest and self._outbound is not None:
                    self._pass(rest)
            return
        self._pass(data)

    def pause_writing(self) -> None:
        if self._outbound is not None:
            self._outbound.pause()

    def resume_writing(self) -> None:
        if self._outbound is not None:
            self._outbound.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._outbound is not None:
            self._outbound.abort()  # the engine sees it and generates no further

    # --- for the other side ---------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """After what was written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _begin(self, line: str) -> None:
        kind, _, name = line.partition(":")
        address: str | None = None
        if line == "admin":
            address = self._relay.admin
        elif kind == "replica":
            address, self._filter = self._relay.resolve(name), _Filter(self._relay.paths)
        if not address:
            log.info("a gateway asked for %s, which is not here", line[:100])
            self.abort()
            return
        self._outbound = _Outbound(self)
        self._connecting = asyncio.create_task(self._connect(address, self._outbound))

    async def _connect(self, address: str, outbound: "_Outbound") -> None:
        loop = asyncio.get_running_loop()
        kind, _, rest = address.partition(":")
        try:
            async with asyncio.timeout(CONNECT_MS_MAX / 1000):
                if kind == "unix":
                    await loop.create_unix_connection(lambda: outbound, rest)
                else:
                    host, _, port = rest.rpartition(":")
                    await loop.create_connection(lambda: outbound, host, int(port))
        except (OSError, TimeoutError) as error:
            log.info("an engine does not accept a relayed connection: %s", type(error).__name__)
            self.abort()

    def _pass(self, data: bytes) -> None:
        if self._filter is not None:
            try:
                data = self._filter.feed(data)
            except _NotAllowed as refused:
                log.warning("a gateway's request was refused: %s", refused)
                self.abort()
                return
        assert self._outbound is not None
        self._outbound.write(data)


class _Outbound(asyncio.Protocol):
    """The engine's side."""

    def __init__(self, inbound: _Inbound) -> None:
        self._inbound = inbound
        self._transport: asyncio.Transport | None = None
        self._backlog = bytearray()  # what comes before the connection is there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._backlog)
        self._backlog = bytearray()

    def data_received(self, data: bytes) -> None:
        self._inbound.write(data)

    def pause_writing(self) -> None:
        self._inbound.pause()

    def resume_writing(self) -> None:
        self._inbound.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inbound.close()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
            return
        self._backlog += data
        if len(self._backlog) > BACKLOG_BYTES_MAX:
            self._inbound.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()


class _NotAllowed(Exception):
    """What a gateway of ours never sends."""


class _Filter:
    """HTTP requests in, the same requests out: POST on one of `paths`, its body of a stated length, three headers."""

    def __init__(self, paths: frozenset[bytes]) -> None:
        self._paths = paths
        self._parser = httptools.HttpRequestParser(self)
        self._out: list[bytes] = []
        self._url = b""
        self._headers: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> bytes:
        """What of `data` may pass. Raises _NotAllowed."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # What a callback raises arrives as the cause of the parser's own error.
            raise _NotAllowed(str(error.__context__ or "it is not HTTP")) from error
        out, self._out = self._out, []
        return b"".join(out)

    # --- httptools ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in self._headers:
            raise _NotAllowed("a header came twice")
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        length = self._headers.get(b"content-length", b"")
        if self._parser.get_method() != b"POST" or self._url not in self._paths:
            raise _NotAllowed(f"{self._parser.get_method()!r} {self._url[:100]!r} is not for gateways")
        if b"transfer-encoding" in self._headers or not length.isdigit():
            raise _NotAllowed("a body needs a length")
        head = b"POST %b HTTP/1.1\r\nhost: engine\r\n" % self._url
        kept = b"".join(b"%b: %b\r\n" % item for item in self._headers.items() if item[0] in HEADERS)
        self._out.append(b"%b%bcontent-length: %d\r\n\r\n" % (head, kept, int(length)))

    def on_body(self, body: bytes) -> None:
        self._out.append(body)
