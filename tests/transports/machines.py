"""Machines of one platform on loopback: an authority, doors, and parts that have joined."""

import socket
from collections.abc import Mapping
from pathlib import Path

from tidegate.transports.authority import Authority, open_authority
from tidegate.transports.door import Door, Service
from tidegate.transports.enrolment import Joined, Registrar, join
from tidegate.transports.identity import CONTROL, GATEWAY, NODE, Identity, Peer
from tidegate.transports.secure import SecureListener
from tidegate.transports.tls import JOIN, LINK, UNREAD_MS_MAX, Credentials, prepare

EVERYBODY = frozenset((CONTROL, NODE, GATEWAY))
CONTROL_PLANE = Identity(CONTROL, CONTROL, "hub")


def listening() -> socket.socket:
    found = prepare(socket.socket(), UNREAD_MS_MAX)
    found.bind(("127.0.0.1", 0))
    found.listen()
    found.setblocking(False)
    return found


class ControlMachine:
    """The platform's own machine: links and joining behind one door. `address` is ``HOST:PORT``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority: Authority = open_authority(folder / "pki")
        self.credentials = self.authority.own(CONTROL_PLANE, folder / "control")
        self.links = SecureListener(self.admitted)
        self.address = ""
        self._door: Door | None = None

    def admitted(self, peer: Peer) -> bool:
        return self.authority.admitted(peer.identity, peer.serial)

    async def open(self, more: Mapping[str, Service] | None = None) -> None:
        listener = listening()
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        services = {
            LINK: Service(frozenset((NODE, GATEWAY)), self.links.serve),
            JOIN: Service(frozenset(), Registrar(self.authority).serve),
        }
        self._door = Door(self.credentials, {**services, **(more or {})}, self.admitted)
        await self._door.listen(listener)

    async def close(self) -> None:
        await self.links.close()
        if self._door is not None:
            await self._door.close()

    @property
    def control(self) -> str:
        return f"tls:{self.address}/{CONTROL}/{CONTROL}"

    def token(self, role: str, name: str, region: str = "us", valid_ms: int = 60_000) -> str:
        return self.authority.token(Identity(role, name, region), self.address, valid_ms)

    async def joined(self, role: str, name: str, region: str = "us") -> tuple[Joined, Credentials]:
        folder = self.folder / f"{role}-{name}"
        return await join(folder, self.token(role, name, region)), Credentials(folder)
