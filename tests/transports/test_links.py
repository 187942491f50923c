"""One contract for every transport: ordered, typed, bounded, and a dead peer is a LinkFault."""

import asyncio
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.transports.machines import ControlMachine
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.errors import LinkFault
from tidegate.domain.plan import DemandReported, FenceConfirmed, Route, Target
from tidegate.domain.ports import Connect, Link, Listener
from tidegate.transports import local, secure, socket
from tidegate.transports.tls import LINK, Dialer
from tidegate.wire.internal import Catalog, GatewayHello, KeyEntry

KINDS = ["local", "unix", "tcp", "tls"]
Scenario = Callable[[Listener, Connect], Awaitable[None]]


class _Door:
    """The listener of a control machine, which closes its door with it."""

    def __init__(self, machine: ControlMachine) -> None:
        self._machine, self.accept = machine, machine.links.accept

    async def close(self) -> None:
        await self._machine.close()


async def _open(kind: str, directory: Path) -> tuple[Listener, Connect]:
    if kind == "local":
        listener = local.LocalListener()
        return listener, listener.connect
    if kind == "unix":
        address = f"unix:{directory}/link.sock"
        return await socket.listen(address), socket.connector(address)
    if kind == "tls":
        machine = ControlMachine(directory)
        await machine.open()
        _, credentials = await machine.joined("gateway", "here")
        return _Door(machine), secure.connector(Dialer(credentials), machine.control, LINK)
    tcp = await socket.listen("tcp:127.0.0.1:0")
    return tcp, socket.connector(f"tcp:127.0.0.1:{tcp.port}")


def _run(kind: str, directory: Path, scenario: Scenario) -> None:
    async def main() -> None:
        listener, connect = await _open(kind, directory)
        try:
            async with asyncio.timeout(20):
                await scenario(listener, connect)
        finally:
            await listener.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_messages_arrive_whole_and_in_order_both_ways(kind: str, tmp_path: Path) -> None:
    async def scenario(listener: Listener, connect: Connect) -> None:
        here = await connect()
        there = await listener.accept()
        route = Route("acme/a", 7, EndpointState.READY, (Target("r1", "unix:/x\n", 4),), 0, "line\nbreak")
        catalog = Catalog(3, (KeyEntry("d" * 64, "k", None),), ())
        for message in [GatewayHello("g", "local"), FenceConfirmed("g", "r1"), DemandReported("g", "acme/a", 1, 2, 3)]:
            await here.send(message)
        await there.send(route)
        await there.send(catalog)
        assert await there.receive() == GatewayHello("g", "local")
        assert await there.receive() == FenceConfirmed("g", "r1")
        assert await there.receive() == DemandReported("g", "acme/a", 1, 2, 3)
        assert await here.receive() == route
        assert await here.receive() == catalog
        await here.close()
        await there.close()

    _run(kind, tmp_path, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_peer_is_a_fault_after_what_it_sent(kind: str, tmp_path: Path) -> None:
    async def scenario(listener: Listener, connect: Connect) -> None:
        here = await connect()
        there = await listener.accept()
        await there.send(GatewayHello("g", "local"))
        await there.close()
        assert await here.receive() == GatewayHello("g", "local")
        with pytest.raises(LinkFault):
            await here.receive()
        await here.close()
        with pytest.raises(LinkFault):
            await here.send(GatewayHello("g", "local"))

    _run(kind, tmp_path, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_there_is_a_fault(kind: str, tmp_path: Path) -> None:
    async def scenario(listener: Listener, connect: Connect) -> None:
        await listener.close()
        with pytest.raises(LinkFault):
            await connect()

    _run(kind, tmp_path, scenario)


async def _flood(link: Link) -> None:
    for _ in range(20_000):
        await link.send(GatewayHello("g" * 1000, "local"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_never_reads_loses_the_link(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MESSAGES_MAX", 50)
    monkeypatch.setattr(socket, "OUTGOING_BYTES_MAX", 100_000)

    async def scenario(listener: Listener, connect: Connect) -> None:
        here = await connect()
        await listener.accept()
        with pytest.raises(LinkFault):
            await _flood(here)
        with pytest.raises(LinkFault):
            await here.send(GatewayHello("g", "local"))

    _run(kind, tmp_path, scenario)


def test_unix_sockets_are_private_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "link.sock"

    async def main() -> None:
        first = await socket.listen(f"unix:{path}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        first._path = ""  # as if the process had been killed: the file stays
        await first.close()
        second = await socket.listen(f"unix:{path}")
        await second.close()
        assert not path.exists()
        path.write_text("not a socket")
        with pytest.raises(LinkFault):
            await socket.listen(f"unix:{path}")
        assert path.read_text() == "not a socket"

    asyncio.run(main())


def test_garbage_is_a_fault(tmp_path: Path) -> None:
    async def scenario(listener: Listener, connect: Connect) -> None:
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "link.sock"))
        there = await listener.accept()
        writer.write(b"Nonsense {}\nGatewayHello [1]\n")
        for _ in range(2):
            with pytest.raises(LinkFault):
                await there.receive()
        writer.close()

    _run("unix", tmp_path, scenario)


@pytest.mark.parametrize("text", ["", "unix:", "tcp:host", "tcp::1", "http://x", "tcp:h:port"])
def test_addresses(text: str) -> None:
    with pytest.raises(LinkFault):
        socket.parse_address(text)
