"""Parts on other machines, on the side of the platform: one door for all of them, and who is let in."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tidegate.assemble.membership import EVERYWHERE, FOLDER, PATHS, RENEW_S
from tidegate.assemble.settings import OWN_NODE
from tidegate.assemble.sockets import StartError, listen_tcp
from tidegate.assemble.weights import cache_folder
from tidegate.billing.receiving import Receiver
from tidegate.config import Config
from tidegate.domain.ports import Clock
from tidegate.engines.weights.peers import Peers
from tidegate.engines.weights.sharing import Sharing
from tidegate.stores.journal_mirror import JournalMirror
from tidegate.transports.authority import Authority, open_authority
from tidegate.transports.door import Door, Service
from tidegate.transports.enrolment import JOINERS_MAX, Registrar
from tidegate.transports.identity import CONTROL, GATEWAY, NODE, Identity, Peer
from tidegate.transports.relay import Relay
from tidegate.transports.secure import SecureListener
from tidegate.transports.tls import JOIN, JOURNAL, LINK, RELAY, UNREAD_MS_MAX, WEIGHTS, Credentials, Dialer, prepare

ADDRESS_FILE = "address"
LOCAL_GATEWAY = "platform"  # the certificate with which the platform's own gateway reaches nodes elsewhere

Enrolled = Callable[[Identity, str], None]


@dataclass(frozen=True, slots=True)
class PlatformLinks:
    """Everything behind the platform's door. `address` (``HOST:PORT``) is where other machines find it;
    `admitted` says whether a certificate is one of a part that may come in.
    """

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
    admitted: Callable[[Peer], bool]

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
        admitted=admitted,
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
