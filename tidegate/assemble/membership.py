"""A part on another machine as a member of its platform: it has joined, keeps its certificate fresh, and has a port."""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tidegate.assemble.sockets import StartError, listen_tcp
from tidegate.config import Config
from tidegate.domain.errors import LinkFault
from tidegate.domain.plan import ReplicaStatus
from tidegate.engines.weights.peers import Peers
from tidegate.engines.weights.sharing import Sharing
from tidegate.gateway.app import APIS
from tidegate.transports.door import Door, Service
from tidegate.transports.enrolment import Joined, is_new, join, joined, removed, renew_when_due
from tidegate.transports.identity import CONTROL, GATEWAY, NODE, Identity
from tidegate.transports.relay import Relay
from tidegate.transports.secure import SharedClock, connector
from tidegate.transports.tls import LINK, RELAY, UNREAD_MS_MAX, WEIGHTS, Credentials, Dialer, parse, prepare

FOLDER = "pki"  # of the data directory: keys and certificates
RENEW_S = 6 * 3_600.0
REMOVED_S = 10.0
PATHS = frozenset(path.encode() for path in APIS)  # what gateways elsewhere may ask of an engine here
EVERYWHERE = frozenset(("0.0.0.0", "::", ""))

log = logging.getLogger(__name__)


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
