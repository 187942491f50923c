"""Parts of the platform on other machines: the platform's side, and the side of a node that has joined from one."""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tidegate.assemble.settings import OWN_NODE
from tidegate.assemble.sockets import StartError, listen_tcp
from tidegate.assemble.weights import cache_folder
from tidegate.billing.receiving import Receiver
from tidegate.config import Config
from tidegate.domain.errors import LinkFault
from tidegate.domain.plan import ReplicaStatus
from tidegate.domain.ports import Clock
from tidegate.engines.weights.peers import Peers
from tidegate.engines.weights.sharing import Sharing
from tidegate.gateway.app import APIS
from tidegate.stores.journal_mirror import JournalMirror
from tidegate.transports.authority import Authority, open_authority
from tidegate.transports.door import Door, Service
from tidegate.transports.enrolment import JOINERS_MAX, Joined, Registrar, is_new, join, joined, removed, renew_when_due
from tidegate.transports.identity import CONTROL, GATEWAY, NODE, Identity, Peer
from tidegate.transports.relay import Relay
from tidegate.transports.secure import SecureListener, SharedClock, connector
from tidegate.transports.tls import (
    JOIN,
    JOURNAL,
    LINK,
    RELAY,
    UNREAD_MS_MAX,
    WEIGHTS,
    Credentials,
    Dialer,
    parse,
    prepare,
)

FOLDER, ADDRESS_FILE = "pki", "address"
LOCAL_GATEWAY = "platform"  # the certificate with which the platform's own gateway reaches nodes elsewhere
RENEW_S = 6 * 3_600.0
REMOVED_S = 10.0
PATHS = frozenset(path.encode() for path in APIS)
EVERYWHERE = frozenset(("0.0.0.0", "::", ""))

Enrolled = Callable[[Identity, str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlatformLinks:
    """Everything behind the platform's door. `address` (``HOST:PORT``) is where other machines find it."""

    authority: Authority
    address: str
    links: SecureListener
    journals: SecureListener
    receiver: Receiver
    mirror: JournalMirror
    listener: socket.socket
    control: Credentials
    gateway: Credentials
    region: str
    shared: Sharing

    @property
    def relay_address(self) -> str:
        return f"tls:{self.address}/{CONTROL}/{CONTROL}"

    @property
    def peers(self) -> Peers:
        """Nodes of other machines, as this machine's node fetches from them. Turns are given out here."""
        dialer = Dialer(self.control)
        return Peers(lambda address: dialer.blocking(address, WEIGHTS), self.relay_address, self.relay_address)

    async def run(self, resolve: Callable[[str], str | None], admin: Path, enrolled: Enrolled) -> None:
        """Serves until it is cancelled. `resolve` says where an engine of this machine listens; `enrolled` is told of
        each certificate given.
        """
        gateways, anybody = frozenset((GATEWAY,)), frozenset((GATEWAY, NODE))
        services = {
            LINK: Service(anybody, self.links.serve),
            JOURNAL: Service(gateways, self.journals.serve),
            RELAY: Service(gateways, Relay(resolve, PATHS, str(admin)).serve),
            JOIN: Service(frozenset(), Registrar(self.authority, enrolled).serve, connections_max=JOINERS_MAX),
            WEIGHTS: Service(frozenset((NODE, CONTROL)), self.shared.serve),
        }
        door = Door(self.control, services, self.admitted)
        await door.listen(self.listener)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.receiver.run())
                group.create_task(self._renew())
        finally:
            await door.close()

    def admitted(self, peer: Peer) -> bool:
        return self.authority.admitted(peer.identity, peer.serial)

    async def _renew(self) -> None:
        """The platform's own certificates, long before they end."""
        while True:
            await asyncio.sleep(RENEW_S)
            for identity, credentials in own_parts(self.region).items():
                self.authority.own(identity, self.authority.folder / credentials)
            self.control.refresh()


def own_parts(region: str) -> dict[Identity, str]:
    """Parts of the platform's own machine that speak to others, and the folder of each."""
    return {Identity(CONTROL, CONTROL, region): CONTROL, Identity(GATEWAY, LOCAL_GATEWAY, region): GATEWAY}


def platform_links(config: Config, data: Path, journal: Path, clock: Clock) -> PlatformLinks:
    """Listening on `links.listen`, nothing served yet. Raises StartError, LinkFault."""
    mirror = JournalMirror(journal)  # before anybody reads: what gateways shipped here that may come back is not over
    host, _, port = config.links.listen.rpartition(":")
    if not config.links.address and host.strip("[]") in EVERYWHERE:
        raise StartError(
            f"links.address is not set: links.listen = {config.links.listen!r} is every address of this machine, "
            'and others must be told one, e.g. links.address = "10.0.0.5:7443"'
        )
    folder = data / FOLDER
    authority = open_authority(folder, config.links.ca_file, config.links.ca_key_file)
    listener = prepare(listen_tcp(host.strip("[]"), int(port)), UNREAD_MS_MAX)
    address = config.links.address or f"{host}:{listener.getsockname()[1]}"
    own = {identity.role: authority.own(identity, folder / name) for identity, name in own_parts(config.region).items()}
    (folder / ADDRESS_FILE).write_text(address)

    def admitted(peer: Peer) -> bool:
        return authority.admitted(peer.identity, peer.serial)

    journals = SecureListener(admitted)
    return PlatformLinks(
        authority=authority,
        address=address,
        links=SecureListener(admitted),
        journals=journals,
        receiver=Receiver(journals, mirror, clock),
        mirror=mirror,
        listener=listener,
        control=own[CONTROL],
        gateway=own[GATEWAY],
        region=config.region,
        shared=Sharing(cache_folder(config, data), f"tls:{address}/{CONTROL}/{CONTROL}"),
    )


# --- what an operator asks of it, whether or not the platform runs ----------------------------------------------------


def give_token(config: Config, role: str, name: str, region: str, valid_ms: int) -> str:
    """A join token for one part on another machine. Raises StartError, LinkFault."""
    if (role, name) == (NODE, OWN_NODE):
        raise StartError(f"{OWN_NODE} is the node of the platform's own machine; choose another name")
    return _authority(config).token(
        Identity(role, name, region), (config.data_dir / FOLDER / ADDRESS_FILE).read_text(), valid_ms
    )


def members(config: Config) -> list[Identity]:
    """Parts on other machines that may come in. Raises StartError, LinkFault."""
    own = own_parts(config.region)
    return [one for one in _authority(config).members() if one not in own]


def send_away(config: Config, role: str, name: str) -> None:
    """Raises StartError for a part that never joined."""
    if not _authority(config).remove(role, name):
        known = ", ".join(f"{one.role} {one.name}" for one in members(config)) or "none"
        raise StartError(f"no {role} {name!r} has joined; there are: {known}")


def _authority(config: Config) -> Authority:
    folder = config.data_dir / FOLDER
    if not (folder / ADDRESS_FILE).exists():
        raise StartError(
            f"the platform of {config.data_dir} lets no other machine in: set links.listen, e.g. [links] "
            'listen = "0.0.0.0:7443" and address = "10.0.0.5:7443", and start it'
        )
    return open_authority(folder, config.links.ca_file, config.links.ca_key_file)


# --- the side of whoever joins ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Membership:
    """What a part on another machine has of the platform it joined."""

    known: Joined
    credentials: Credentials
    dialer: Dialer

    async def renew(self) -> None:
        """Keeps the certificate fresh until it is cancelled; while the platform is away, the one before does."""
        while True:
            try:
                if await renew_when_due(self.credentials.folder, self.known, self.dialer):
                    self.credentials.refresh()
                    log.info("%s has a new certificate", self.known.identity)
            except LinkFault as fault:
                log.warning("no new certificate: %s", fault.reason)
            await asyncio.sleep(RENEW_S)


def has_joined(config: Config) -> bool:
    """Whether this data directory has joined a platform on another machine. Raises LinkFault."""
    return joined(config.data_dir / FOLDER) is not None


async def member(data: Path, role: str, name: str, region: str, token: str) -> Membership:
    """Joins with `token`, or is found to have joined before. Raises StartError, LinkFault."""
    folder = data / FOLDER
    known = joined(folder)
    if known is None or is_new(known, token):
        if not token:
            raise StartError(
                f"{data} has joined no platform: run `tidegate join token {role} {name} --region {region}` on the "
                "platform's machine and give what it prints with --token or TIDEGATE_JOIN_TOKEN"
            )
        known = await join(folder, token)
    if known.identity != (wanted := Identity(role, name, region)):
        raise StartError(f"{data} has joined as {known.identity}, not as {wanted}: a join token is for one part only")
    credentials = Credentials(folder)
    return Membership(known, credentials, Dialer(credentials))


class NodeLinks:
    """A node's links to a platform on another machine, and its relay port for gateways."""

    def __init__(self, config: Config, membership: Membership) -> None:
        anywhere = "[::]:0" if ":" in parse(membership.known.control).host else "0.0.0.0:0"
        host, _, port = (config.links.listen or anywhere).rpartition(":")
        self._membership = membership
        self._listener = prepare(listen_tcp(host.strip("[]"), int(port)), UNREAD_MS_MAX)
        found = (self._listener.getsockname()[1], host.strip("[]"))
        self.address = config.links.address or f"{_reached_from(membership.known, found[1])}:{found[0]}"
        self._removed: frozenset[int] = frozenset()
        self.clock = SharedClock()
        self.connect = connector(membership.dialer, membership.known.control, LINK, self.clock)

    def public(self, status: ReplicaStatus) -> str:
        return f"tls:{self.address}/{NODE}/{self._membership.known.name}/replica:{status.replica}"

    @property
    def peers(self) -> Peers:
        """Nodes of other machines, and the platform's own, which gives out turns."""
        dial, own = self._membership.dialer.blocking, f"tls:{self.address}/{NODE}/{self._membership.known.name}"
        return Peers(lambda address: dial(address, WEIGHTS), self._membership.known.control, own)

    async def run(self, resolve: Callable[[str], str | None], shared: Sharing) -> None:
        """Serves the relay port until it is cancelled."""
        services = {
            RELAY: Service(frozenset((GATEWAY,)), Relay(resolve, PATHS).serve),
            WEIGHTS: Service(frozenset((NODE, CONTROL)), shared.serve),
        }
        door = Door(self._membership.credentials, services, lambda peer: peer.serial not in self._removed)
        await door.listen(self._listener)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._membership.renew())
                group.create_task(self._watch_removed(door))
        finally:
            await door.close()

    async def _watch_removed(self, door: Door) -> None:
        """Who was sent away is not let in here either. While the platform is away, what it said last counts."""
        while True:
            try:
                self._removed = await removed(self._membership.known, self._membership.dialer)
                door.look_again()
            except LinkFault as fault:
                log.debug("who was removed is not known: %s", fault.reason)
            await asyncio.sleep(REMOVED_S)


def _reached_from(known: Joined, host: str) -> str:
    """The address of this machine on the way to the platform, unless it listens on one only."""
    if host not in EVERYWHERE:
        return f"[{host}]" if ":" in host else host
    where = parse(known.control)
    try:
        family, kind, _, _, address = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # nothing is sent: a datagram socket only looks the way up
            found = str(probe.getsockname()[0])
    except OSError as error:
        raise StartError(f"no way to the platform at {known.address}: {error.strerror}; set links.address") from error
    return f"[{found}]" if ":" in found else found
