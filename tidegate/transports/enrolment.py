"""How a part of another machine gets its certificate: with a join token once, with the certificate itself from then on.

The token carries the digest of the platform's authority. The first connection trusts nobody and only asks for the
authority's certificate; if that has the digest, the second trusts it and nobody else, and only there is the token's
secret said (as kubeadm's discovery does it: https://kubernetes.io/docs/reference/setup-tools/kubeadm/kubeadm-join/).
"""

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509

from tidegate.domain.errors import LinkFault
from tidegate.transports.authority import CERTIFICATE_DAYS, Authority, keep_identity, new_request, read_token
from tidegate.transports.identity import CONTROL, Identity, Peer, peer_of
from tidegate.transports.secure import said, streams
from tidegate.transports.socket import SocketLink
from tidegate.transports.tls import CA_FILE, IDENTITY_FILE, JOIN, Dialer, Where, open_tls, parse
from tidegate.wire.joining import AskAuthority, AskRemoved, AuthorityTold, Enrol, Enrolled, NotEnrolled, RemovedTold

JOINED_FILE = "joined.json"
STEP_MS_MAX = 10_000
RENEW_AFTER = timedelta(days=CERTIFICATE_DAYS / 3)
JOINERS_MAX = 32

log = logging.getLogger(__name__)


class Joined(msgspec.Struct, frozen=True):
    """What a part remembers of the platform it has joined. `address` is the platform's ``HOST:PORT``, `token` the
    digest of the token that let it in: another one lets it in anew.
    """

    address: str
    role: str
    name: str
    region: str
    token: str = ""

    @property
    def identity(self) -> Identity:
        return Identity(self.role, self.name, self.region)

    @property
    def control(self) -> str:
        """The address of the control plane's links."""
        return f"tls:{self.address}/{CONTROL}/{CONTROL}"


# --- the platform's side ----------------------------------------------------------------------------------------------


class Registrar:
    """What is behind the ALPN name `JOIN` of the platform's door. `enrolled` is told of each certificate given."""

    def __init__(self, authority: Authority, enrolled: Callable[[Identity, str], None] = lambda who, how: None) -> None:
        self._authority, self._enrolled = authority, enrolled
        self._serving: set[asyncio.Task[None]] = set()

    def serve(self, peer: Peer | None) -> asyncio.Protocol:
        return streams(lambda reader, writer: self._begin(SocketLink(reader, writer), peer))

    def _begin(self, link: SocketLink, peer: Peer | None) -> None:
        task = asyncio.create_task(self._serve(link, peer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, link: SocketLink, peer: Peer | None) -> None:
        try:
            async with asyncio.timeout(STEP_MS_MAX / 1000):
                await link.send(self._answer(await link.receive(), peer))
        except (LinkFault, TimeoutError) as error:
            log.info("somebody who wanted to join went away: %s", error)
        finally:
            await link.close()

    def _answer(self, message: object, peer: Peer | None) -> AuthorityTold | Enrolled | NotEnrolled | RemovedTold:
        match message:
            case AskAuthority():
                return AuthorityTold(self._authority.pem.decode())
            case Enrol(request, secret):
                try:
                    identity = self._who(secret, peer)
                    certificate = self._authority.issue(request.encode(), identity)
                except LinkFault as fault:
                    log.warning("somebody may not join: %s", fault.reason)
                    return NotEnrolled(fault.reason)
                self._enrolled(identity, "with a join token" if secret else "renewed its certificate")
                return Enrolled(certificate.decode())
            case AskRemoved() if peer is not None:
                return RemovedTold(self._authority.removed())
            case _:
                raise LinkFault(f"a {type(message).__name__} message is not for joining")

    def _who(self, secret: str, peer: Peer | None) -> Identity:
        if secret:
            return self._authority.redeem(secret)
        if peer is None:
            raise LinkFault("a join token is needed")
        return peer.identity  # the door has seen that it is still a member


# --- the side of whoever joins ----------------------------------------------------------------------------------------


def joined(folder: Path) -> Joined | None:
    """What `folder` says this machine is, None if it never joined. Raises LinkFault for a file nobody can read."""
    try:
        return msgspec.json.decode((folder / JOINED_FILE).read_bytes(), type=Joined)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise LinkFault(f"{folder / JOINED_FILE} cannot be read ({type(error).__name__})") from error


def is_new(known: Joined, text: str) -> bool:
    """Whether a token is another than the one that was used: after a removal, or too long away to renew."""
    return bool(text) and _digest(text) != known.token


async def join(folder: Path, text: str) -> Joined:
    """Redeems a join token and keeps what came of it in `folder`. Raises LinkFault, and says what to do."""
    token = read_token(text)
    where = parse(f"tls:{token.address}/{CONTROL}/{CONTROL}")
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE  # what it answers is held against the digest
    told = await _ask(where, AskAuthority(), _stranger(where, anyone))
    if not isinstance(told, AuthorityTold):
        raise LinkFault(f"{token.address} does not say who its authority is")
    if hashlib.sha256(_der(told.pem)).hexdigest() != token.authority:
        raise LinkFault(f"{token.address} is not the platform this token is for: its authority is another one")
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted.check_hostname = False
    trusted.load_verify_locations(cadata=told.pem)
    key, request = new_request()
    answer = await _ask(where, Enrol(request.decode(), token.secret), _stranger(where, trusted, of=CONTROL))
    _keep(folder, told.pem.encode(), key, answer)
    known = Joined(token.address, token.role, token.name, token.region, _digest(text))
    (folder / JOINED_FILE).write_bytes(msgspec.json.encode(known))
    return known


async def renew_when_due(folder: Path, known: Joined, dialer: Dialer) -> bool:
    """A new certificate once a third of the old one's time has passed; whether there is one. Raises LinkFault."""
    certificate = x509.load_pem_x509_certificate((folder / IDENTITY_FILE).read_bytes())
    if datetime.now(UTC) < certificate.not_valid_after_utc - timedelta(days=CERTIFICATE_DAYS) + RENEW_AFTER:
        return False
    key, request = new_request()
    where = parse(known.control)
    answer = await _ask(where, Enrol(request.decode()), lambda protocol: dialer.open(where, JOIN, protocol))
    _keep(folder, (folder / CA_FILE).read_bytes(), key, answer)
    return True


async def removed(known: Joined, dialer: Dialer) -> frozenset[int]:
    """Numbers of certificates that this part must not let in either. Raises LinkFault."""
    where = parse(known.control)
    match await _ask(where, AskRemoved(), lambda protocol: dialer.open(where, JOIN, protocol)):
        case RemovedTold(serials):
            return frozenset(int(serial, 16) for serial in serials)
        case answer:
            raise LinkFault(f"the platform answered with a {type(answer).__name__} message")


def _keep(folder: Path, ca: bytes, key: bytes, answer: object) -> None:
    match answer:
        case Enrolled(certificate):
            keep_identity(folder, ca, key, certificate.encode())
        case NotEnrolled(reason):
            raise LinkFault(reason)
        case _:
            raise LinkFault(f"the platform answered with a {type(answer).__name__} message")


Protocol = Callable[[], asyncio.Protocol]
Open = Callable[[Protocol], Awaitable[object]]


def _stranger(where: Where, tls: ssl.SSLContext, of: str = "") -> Open:
    """Connects without a certificate; with `of`, only to a part of that role."""
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.set_alpn_protocols([JOIN])

    async def connect(protocol: Protocol) -> None:
        transport, _ = await open_tls(where.host, where.port, tls, protocol)
        if of:
            peer = peer_of(transport.get_extra_info("ssl_object"))
            if peer is None or peer.identity.role != of:
                transport.abort()
                raise LinkFault(f"{where.host}:{where.port} is not a part of the role {of}")

    return connect


async def _ask(where: Where, message: object, connect: Open) -> object:
    """One question, one answer, on a connection of its own."""
    links: list[SocketLink] = []
    try:
        async with asyncio.timeout(STEP_MS_MAX / 1000):
            await connect(lambda: streams(lambda *both: links.append(SocketLink(*both))))
            await links[0].send(message)
            return await links[0].receive()
    except (OSError, TimeoutError) as error:
        raise LinkFault(f"the platform cannot be reached at {where.host}:{where.port}: {said(error)}") from error
    finally:
        for link in links:
            await link.close()


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _der(pem: str) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem)
    except ValueError as error:
        raise LinkFault("the platform's authority is not a certificate") from error
