"""One TLS port a machine: what a connection is for is its ALPN name (RFC 7301), who it is its certificate."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from tidegate.domain.errors import LinkFault
from tidegate.transports.identity import Peer, peer_of
from tidegate.transports.tls import HANDSHAKE_S_MAX, Credentials

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """What is behind one ALPN name: a protocol for each connection of a part with one of `roles`, at most
    `connections_max` at once.

    Where `roles` is empty, connections without a certificate are served too, with None for the peer.
    """

    roles: frozenset[str]
    serve: Callable[[Peer | None], asyncio.Protocol]
    connections_max: int = 4_096


class Door:
    """Listens until `close`. `admitted` says whether a certificate that verifies is still wanted."""

    def __init__(
        self,
        credentials: Credentials,
        services: Mapping[str, Service],
        admitted: Callable[[Peer], bool] = lambda peer: True,
    ) -> None:
        self._credentials, self._services, self._admitted = credentials, services, admitted
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Transport, tuple[str, Peer | None]] = {}

    async def listen(self, listener: socket.socket) -> None:
        """Serves on a listening socket made by `transports.tls.prepare`."""
        loop = asyncio.get_running_loop()
        tls = self._credentials.server()
        self._server = await loop.create_server(
            lambda: _Entrance(self), sock=listener, ssl=tls, ssl_handshake_timeout=HANDSHAKE_S_MAX
        )

    async def close(self) -> None:
        """Ends every connection with it."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for transport in list(self._open):
            transport.abort()

    def look_again(self) -> None:
        """Ends the connections of parts that are not admitted any more."""
        for transport, (_, peer) in list(self._open.items()):
            if peer is not None and not self._admitted(peer):
                log.warning("a connection of %s is ended: it was removed from the platform", peer.identity)
                transport.abort()

    def enter(self, transport: asyncio.Transport) -> asyncio.Protocol:
        """Raises LinkFault for a connection that may not be here."""
        tls = cast(ssl.SSLObject, transport.get_extra_info("ssl_object"))
        purpose, peer = tls.selected_alpn_protocol() or "", peer_of(tls)
        service = self._services.get(purpose)
        if service is None:
            raise LinkFault(f"asked for {purpose!r}, which is not served here")
        if sum(other == purpose for other, _ in self._open.values()) >= service.connections_max:
            raise LinkFault(f"more than {service.connections_max} connections for {purpose}")
        if service.roles and (peer is None or peer.identity.role not in service.roles):
            raise LinkFault(f"{peer.identity if peer else 'a stranger'} may not ask for this")
        if peer is not None and not self._admitted(peer):
            raise LinkFault(f"{peer.identity} was removed from the platform, or has joined anew since")
        self._open[transport] = purpose, peer
        return service.serve(peer)

    def left(self, transport: asyncio.Transport) -> None:
        self._open.pop(transport, None)


class _Entrance(asyncio.Protocol):
    """Stands in until it is known what a connection is for, and is told of its end."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        try:
            self._inner = self._door.enter(self._transport)
        except LinkFault as fault:
            log.warning("a connection from another machine was refused: %s", fault.reason)
            self._transport.abort()
            return
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._transport is not None
        self._door.left(self._transport)
        if self._inner is not None:
            self._inner.connection_lost(exc)
