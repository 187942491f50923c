"""Mutual TLS between the parts of a platform: their credentials, and connections to a part that must be who it should.

Addresses are ``tls:HOST:PORT/ROLE/NAME`` (links), and ``tls:HOST:PORT/ROLE/NAME/WHAT`` where a connection is for one
thing behind that port, which its first line says (`transports.relay`). Names of machines are not checked, names of
parts are: an address may move, and a certificate of another part of the same platform is refused.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tidegate.domain.errors import LinkFault
from tidegate.transports.identity import peer_of

CA_FILE = "ca.pem"
IDENTITY_FILE = "identity.pem"  # key and certificate in one file, so that both are replaced at once
LINK, JOURNAL, RELAY, JOIN = "tidegate-link", "tidegate-journal", "tidegate-relay", "tidegate-join"
WEIGHTS = "tidegate-weights"
HANDSHAKE_S_MAX = 5.0
CONNECT_MS_MAX = 5_000
# A peer whose cable was cut says nothing, not even that it is gone: probes find out in idle + interval × count.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 2, 1, 3
# Probes are not sent while data waits to be acknowledged, so that wait has a bound of its own. Linux counts a peer that
# does not read (a closed window) towards it, too: where answers are sent, it must be longer than a client may stall.
UNACKNOWLEDGED_MS_MAX, UNREAD_MS_MAX = 5_000, 75_000

P = TypeVar("P", bound=asyncio.Protocol)


class Credentials:
    """The files `ca.pem` and `identity.pem` of one part. A renewed certificate is used from the next handshake on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._stamp: object = None

    def server(self) -> ssl.SSLContext:
        """Verifies certificates it is shown; whether one is needed is for what is asked (ALPN) to say."""
        return self._context("", ssl.PROTOCOL_TLS_SERVER, [LINK, JOURNAL, RELAY, JOIN, WEIGHTS], ssl.CERT_OPTIONAL)

    def client(self, purpose: str) -> ssl.SSLContext:
        return self._context(purpose, ssl.PROTOCOL_TLS_CLIENT, [purpose], ssl.CERT_REQUIRED)

    def refresh(self) -> None:
        """Takes up files that were replaced. Raises LinkFault when they cannot be used."""
        try:
            found = (self.folder / IDENTITY_FILE).stat()
            stamp = (found.st_ino, found.st_mtime_ns)
            if stamp != self._stamp:
                for context in self._contexts.values():
                    context.load_cert_chain(self.folder / IDENTITY_FILE)
                self._stamp = stamp
        except OSError as error:  # ssl.SSLError is one
            raise LinkFault(f"{self.folder / IDENTITY_FILE} cannot be used: {error.strerror or error}") from error

    def _context(self, key: str, protocol: int, purposes: list[str], verify: ssl.VerifyMode) -> ssl.SSLContext:
        self.refresh()
        if (context := self._contexts.get(key)) is None:
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = verify
            context.set_alpn_protocols(purposes)
            try:
                context.load_verify_locations(self.folder / CA_FILE)
                context.load_cert_chain(self.folder / IDENTITY_FILE)
            except OSError as error:
                raise LinkFault(f"{self.folder} holds no usable certificate: {error.strerror or error}") from error
            self._contexts[key] = context
        return context


@dataclass(frozen=True, slots=True)
class Where:
    """A parsed address. `part` is ``ROLE/NAME``; `what` is empty for links."""

    host: str
    port: int
    part: str
    what: str = ""


def parse(address: str) -> Where:
    """Raises LinkFault for anything but ``tls:HOST:PORT/ROLE/NAME`` with or without ``/WHAT``."""
    kind, _, rest = address.partition(":")
    authority, _, path = rest.partition("/")
    host, _, port = authority.rpartition(":")
    role, _, more = path.partition("/")
    name, _, what = more.partition("/")
    if kind != "tls" or not (host and port.isdecimal() and int(port) < 65_536 and role and name):
        raise LinkFault(f"{address!r} is not an address; tls:HOST:PORT/ROLE/NAME")
    return Where(host.strip("[]"), int(port), f"{role}/{name}", what)


class Dialer:
    """Connects to parts as the part whose `credentials` it has."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def relay(self, address: str, protocol: Callable[[], asyncio.Protocol]) -> None:
        """`gateway.upstream.Dial`: connects `protocol` to what is behind a relay port. Raises OSError, LinkFault."""
        where = parse(address)
        transport, _ = await self.open(where, RELAY, protocol)
        transport.write(where.what.encode() + b"\n")

    def blocking(self, address: str, purpose: str) -> ssl.SSLSocket:
        """A connection for a thread of its own. Raises OSError (ssl.SSLError is one), LinkFault as `open`."""
        where = parse(address)
        self._credentials.refresh()
        plain = prepare(socket.create_connection((where.host, where.port), CONNECT_MS_MAX / 1000))
        try:
            found = self._credentials.client(purpose).wrap_socket(plain)
        except BaseException:
            plain.close()
            raise
        peer = peer_of(found)
        if peer is None or f"{peer.identity.role}/{peer.identity.name}" != where.part:
            found.close()
            raise LinkFault(f"{where.host}:{where.port} is not {where.part}")
        return found

    async def open(self, where: Where, purpose: str, protocol: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        """Raises OSError (ssl.SSLError is one), or LinkFault for a peer that is not the part it should be."""
        self._credentials.refresh()
        transport, made = await open_tls(where.host, where.port, self._credentials.client(purpose), protocol)
        peer = peer_of(transport.get_extra_info("ssl_object"))
        if peer is None or f"{peer.identity.role}/{peer.identity.name}" != where.part:
            transport.abort()
            raise LinkFault(f"{where.host}:{where.port} is not {where.part}")
        return transport, made


async def open_tls(host: str, port: int, tls: ssl.SSLContext, protocol: Callable[[], P]) -> tuple[asyncio.Transport, P]:
    """Raises OSError. A peer that vanishes is noticed by the kernel (`prepare`)."""
    loop = asyncio.get_running_loop()
    connection = await _connected(host, port)
    try:
        transport, made = await loop.create_connection(
            protocol, sock=connection, ssl=tls, server_hostname="", ssl_handshake_timeout=HANDSHAKE_S_MAX
        )
    except BaseException:
        connection.close()
        raise
    return transport, made


async def _connected(host: str, port: int) -> socket.socket:
    """To the first of a name's addresses that answers. Raises OSError, the last one's."""
    loop, problem = asyncio.get_running_loop(), OSError(f"{host} has no address")
    for family, kind, _, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = prepare(socket.socket(family, kind))
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            problem = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise problem


def prepare(connection: socket.socket, unacknowledged_ms_max: int = UNACKNOWLEDGED_MS_MAX) -> socket.socket:
    """Options that connections accepted on a listening socket inherit (tcp(7))."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged_ms_max)
    return connection
