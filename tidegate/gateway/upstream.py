"""Connections to engines (and to the admin socket): pooled, one exchange at a time, the body in pieces as they come.

One `Connection` is both the protocol and what a relay reads from. Any end of the connection before the message is whole
is an `EngineFault`; nothing here retries.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import httptools

from tidegate.domain.errors import EngineFault, LinkFault
from tidegate.gateway.secrets import Keys
from tidegate.wire.internal import RemoteTarget

# A relay that does not read (its client is slow) stops the engine's socket here instead of filling memory.
UNREAD_BYTES_MAX = 256 << 10
# Connects a protocol to what is at a ``tls:`` address, on another machine. Raises OSError, LinkFault.
Dial = Callable[[str, Callable[[], asyncio.Protocol]], Awaitable[None]]


class Connection(asyncio.Protocol):
    """`status` and `headers` (names in lower case) are there once `head()` has returned."""

    def __init__(self, pool: "Pool", address: str) -> None:
        self._pool = pool
        self.address = address
        self.idle_since_ms = 0
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.whole = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._unread = 0
        self._paused = False
        self._has_head = False
        self._keep_alive = False
        self._ended = ""
        self._waiter: asyncio.Future[None] | None = None
        self._unwritten: asyncio.Future[None] | None = None

    @property
    def awaited(self) -> bool:
        """Whether a relay waits for the engine right now."""
        return self._waiter is not None

    # --- for relays ---------------------------------------------------------------------------------------------------

    def start(self, request: bytes) -> None:
        """Begins an exchange: `request` is a whole HTTP/1.1 request, or the beginning of one continued with `write`."""
        self.status = 0
        self.headers = {}
        self.whole = False
        self._has_head = False
        self._pieces.clear()
        self._unread = 0
        self.write(request)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._ended:
            self._transport.write(data)

    async def drain(self) -> None:
        """Waits while the other side does not take what was written."""
        if self._unwritten is not None:
            await asyncio.shield(self._unwritten)

    async def head(self) -> int:
        """The status. EngineFault when the engine closed the connection or answered nonsense instead."""
        while not self._has_head:
            if self._ended:
                raise EngineFault(self._ended)
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """All of the body that has come since the last call, at least one byte; empty at its end. EngineFault when the
        connection ended before the body did.
        """
        while not self._pieces:
            if self.whole:
                return b""
            if self._ended:
                raise EngineFault(self._ended)
            await self._wait()
        return self._take()

    async def answer(self, stream: bool, bytes_max: int) -> bytes:
        """Waits for the head, then for the first piece of a stream (with status 200), or else for the whole body."""
        while not self._pieces and not self.whole:
            if self._ended:
                raise EngineFault(self._ended)
            await self._wait()
        if self.whole or (stream and self.status == 200):
            return self._take()
        return await self.read_all(bytes_max)

    def _take(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._unread = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def read_all(self, bytes_max: int) -> bytes:
        """The whole body. EngineFault when it is longer than `bytes_max`."""
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > bytes_max:
                raise EngineFault(f"the answer is longer than {bytes_max} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def release(self) -> None:
        """The relay is done with it: kept for the next one if the exchange is whole, closed if not."""
        if self.whole and self._keep_alive and not self._ended and not self._paused:
            self._pool.put(self)
        else:
            self.abort("the exchange was given up")

    def abort(self, reason: str) -> None:
        """Closes the connection at once; a waiting `head` or `read` raises EngineFault(`reason`)."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._unwritten = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        unwritten, self._unwritten = self._unwritten, None
        if unwritten is not None and not unwritten.done():
            unwritten.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort("the engine's answer is not HTTP")
            return
        if self._unread > UNREAD_BYTES_MAX and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        framed = b"content-length" in self.headers or b"transfer-encoding" in self.headers
        if self._has_head and not framed and exc is None:
            self.whole = True  # a body without a length ends with its connection (RFC 9112 6.3)
        self._end("the engine closed the connection")
        self.resume_writing()
        self._pool.forget(self)

    # --- httptools ----------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self.headers = {}
            return
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        if self.status < 200:
            return
        if self.whole or not self._has_head:
            self.abort("the engine sent more than one answer")
            return
        self.whole = True
        self._keep_alive = self._parser.should_keep_alive()  # says so only inside this call

    # --- inside -------------------------------------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = reason
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Pool:
    """Idle connections by address, at most `idle_max` each."""

    def __init__(self, idle_max: int, connect_ms_max: int, dial: Dial | None = None) -> None:
        self._dial = dial
        self._idle: dict[str, deque[Connection]] = {}
        self._idle_max = idle_max
        self._connect_s = connect_ms_max / 1000
        self._now_ms = 0
        self._open: set[Connection] = set()
        self._tls: dict[str, ssl.SSLContext] = {}
        self.keys = Keys()
        self.adapters: set[tuple[str, str]] = set()  # (address, name) of those loaded there: see runtime_lora

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def idle_count(self) -> int:
        return sum(len(idle) for idle in self._idle.values())

    def take(self, address: str) -> Connection | None:
        """An idle connection to `address`, the one used last, so that the others can grow old and be closed."""
        idle = self._idle.get(address)
        if not idle:
            return None
        return idle.pop()

    async def connect(self, address: str, remote: RemoteTarget | None = None) -> Connection:
        """A new connection; with ``https:`` verified against the provider's certificate authorities. EngineFault when
        the engine does not accept one in time.
        """
        kind, _, rest = address.partition(":")
        loop = asyncio.get_running_loop()
        connection = Connection(self, address)
        try:
            async with asyncio.timeout(remote.connect_ms_max / 1000 if remote is not None else self._connect_s):
                if kind == "unix":
                    await loop.create_unix_connection(lambda: connection, rest)
                elif kind == "tls":
                    if self._dial is None:
                        raise LinkFault("this gateway has no certificate for other machines")
                    await self._dial(address, lambda: connection)
                else:
                    host, _, port = rest.rpartition(":")
                    tls = self._tls_of(remote.ca_file if remote is not None else "") if kind == "https" else None
                    await loop.create_connection(lambda: connection, host.strip("[]"), int(port), ssl=tls)
        except ssl.SSLCertVerificationError as error:
            raise EngineFault(f"its certificate is not to be trusted: {error.verify_message}") from error
        except LinkFault as fault:
            raise EngineFault(fault.reason) from fault
        except (OSError, TimeoutError, ValueError) as error:
            raise EngineFault("the engine does not accept connections") from error
        self._open.add(connection)
        return connection

    def _tls_of(self, ca_file: str) -> ssl.SSLContext:
        """The machine's certificate authorities, or those of one file. Made once: reading them takes milliseconds."""
        context = self._tls.get(ca_file)
        if context is None:
            context = self._tls[ca_file] = ssl.create_default_context(cafile=ca_file or None)
        return context

    def put(self, connection: Connection) -> None:
        idle = self._idle.setdefault(connection.address, deque())
        if len(idle) >= self._idle_max:
            connection.abort("too many idle connections")
            return
        connection.idle_since_ms = self._now_ms
        idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        idle = self._idle.get(connection.address)
        if idle is None:
            return
        with contextlib.suppress(ValueError):  # it was in use, not idle
            idle.remove(connection)
        if not idle:
            del self._idle[connection.address]

    def sweep(self, now_ms: int, idle_ms_max: int) -> None:
        """Closes what has been idle for longer than `idle_ms_max`."""
        self._now_ms = now_ms
        for idle in list(self._idle.values()):
            while idle and idle[0].idle_since_ms + idle_ms_max <= now_ms:
                idle.popleft().abort("idle for too long")

    def close(self) -> None:
        for connection in list(self._open):
            connection.abort("the gateway stops")
