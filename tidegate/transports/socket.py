"""Links over Unix and TCP sockets: one message a line, in the encoding of `wire.internal`.

Addresses are ``unix:PATH`` (mode 0600: only the user that runs tidegate) or ``tcp:HOST:PORT``. A TCP link carries no
authentication of its own: listen on loopback only. Links between machines are those of `transports.secure`.
"""

import asyncio
import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tidegate.domain.errors import LinkFault
from tidegate.domain.ports import Connect
from tidegate.wire import internal

OUTGOING_BYTES_MAX = 64 << 20
ACCEPTED_MAX = 128
CONNECT_MS_MAX = 5_000


@dataclass(frozen=True, slots=True)
class Address:
    """Either `path` (Unix) or `host` and `port` (TCP)."""

    path: str = ""
    host: str = ""
    port: int = 0


def parse_address(text: str) -> Address:
    """Raises LinkFault for anything but ``unix:PATH`` and ``tcp:HOST:PORT``."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return Address(path=rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdecimal():
        return Address(host=host.strip("[]"), port=int(port))
    raise LinkFault(f"{text!r} is not an address; unix:PATH or tcp:HOST:PORT")


class SocketLink:
    """Implements `ports.Link` over a stream."""

    peer = ""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: object) -> None:
        """Never waits: a peer that does not read loses the link once `OUTGOING_BYTES_MAX` are queued."""
        if self._writer.is_closing():
            raise LinkFault("the link is closed")
        frame = internal.encode(cast(internal.Message, message))
        if self._writer.transport.get_write_buffer_size() + len(frame) > OUTGOING_BYTES_MAX:
            self._writer.transport.abort()
            raise LinkFault("the peer does not read: too much is queued for it")
        self._writer.write(frame)

    async def receive(self) -> object:
        return internal.decode(await self._frame())

    async def _frame(self) -> bytes:
        try:
            return await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            raise LinkFault("the peer closed the link") from error
        except asyncio.LimitOverrunError as error:
            self._writer.transport.abort()
            raise LinkFault("the peer sent a message over the limit") from error
        except OSError as error:
            raise LinkFault(f"the link broke: {error.strerror or type(error).__name__}") from error

    async def close(self) -> None:
        self._writer.close()
        # The other side may be gone already; closed is closed.
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def connector(address: str) -> Connect:
    """A `ports.Connect` to `address`."""
    where = parse_address(address)

    async def connect() -> SocketLink:
        try:
            async with asyncio.timeout(CONNECT_MS_MAX / 1000):
                if where.path:
                    streams = await asyncio.open_unix_connection(where.path, limit=internal.MESSAGE_BYTES_MAX)
                else:
                    streams = await asyncio.open_connection(where.host, where.port, limit=internal.MESSAGE_BYTES_MAX)
        except (OSError, TimeoutError) as error:
            raise LinkFault(f"cannot connect to {address.partition(':')[0]} link: {type(error).__name__}") from error
        return SocketLink(*streams)

    return connect


class SocketListener:
    """Implements `ports.Listener`; made by `listen`."""

    def __init__(self) -> None:
        self._accepted: asyncio.Queue[SocketLink] = asyncio.Queue(ACCEPTED_MAX)
        self._server: asyncio.Server | None = None
        self._path = ""

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def accept(self) -> SocketLink:
        return await self._accepted.get()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        while not self._accepted.empty():
            await self._accepted.get_nowait().close()
        if self._path:
            _remove_stale(self._path)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self._accepted.put_nowait(SocketLink(reader, writer))
        except asyncio.QueueFull:
            # Nobody accepts any more; the peer sees a closed link and comes back.
            writer.transport.abort()

    async def _start(self, where: Address) -> None:
        if where.path:
            _remove_stale(where.path)
            # Made 0600 from the first instant: between bind and chmod anybody could connect.
            before = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(
                    self._on_connection, where.path, limit=internal.MESSAGE_BYTES_MAX
                )
            finally:
                os.umask(before)
            self._path = where.path
        else:
            self._server = await asyncio.start_server(
                self._on_connection, where.host, where.port, limit=internal.MESSAGE_BYTES_MAX
            )


async def listen(address: str) -> SocketListener:
    """Raises LinkFault when the address cannot be listened on."""
    listener = SocketListener()
    try:
        await listener._start(parse_address(address))
    except OSError as error:
        raise LinkFault(f"cannot listen on {address}: {error.strerror or type(error).__name__}") from error
    return listener


def _remove_stale(path: str) -> None:
    """A socket file left by a process that was killed would make bind fail; anything else is not ours to remove."""
    file = Path(path)
    if file.exists() and stat.S_ISSOCK(file.stat().st_mode):
        file.unlink()
