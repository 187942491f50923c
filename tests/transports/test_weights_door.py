"""What nodes ask each other about weights goes through a door of its own, for nodes only, by threads that block."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.transports.machines import ControlMachine
from tidegate.domain.errors import LinkFault
from tidegate.engines.weights.faults import SourceMissing, SourceUnavailable
from tidegate.engines.weights.peers import PeerModel
from tidegate.engines.weights.sharing import Sharing
from tidegate.transports.door import Service
from tidegate.transports.identity import CONTROL, GATEWAY, NODE
from tidegate.transports.tls import WEIGHTS, Dialer

DIGEST = "a" * 64


def play(scene: Callable[[ControlMachine], Awaitable[None]]) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="tg-") as folder:
            machine = ControlMachine(Path(folder))
            shared = Sharing(Path(folder) / "weights")
            await machine.open({WEIGHTS: Service(frozenset((NODE, CONTROL)), shared.serve)})
            try:
                await scene(machine)
            finally:
                await machine.close()

    asyncio.run(main())


def asked(machine: ControlMachine, dialer: Dialer, part: str = "control/control") -> Awaitable[PeerModel]:
    address = f"tls:{machine.address}/{part}"
    return asyncio.to_thread(PeerModel, lambda where: dialer.blocking(where, WEIGHTS), address, DIGEST)


def test_a_node_is_answered_and_a_gateway_is_not() -> None:
    async def scene(machine: ControlMachine) -> None:
        _, node = await machine.joined(NODE, "n1")
        with pytest.raises(SourceMissing, match="does not have these weights"):
            await asked(machine, Dialer(node))
        _, gateway = await machine.joined(GATEWAY, "g1")
        with pytest.raises(SourceUnavailable, match="another node does not answer"):
            await asked(machine, Dialer(gateway))

    play(scene)


def test_who_is_not_the_part_it_should_be_is_not_asked() -> None:
    async def scene(machine: ControlMachine) -> None:
        _, node = await machine.joined(NODE, "n1")
        with pytest.raises(LinkFault, match="is not node/n2"):
            await asyncio.to_thread(Dialer(node).blocking, f"tls:{machine.address}/node/n2", WEIGHTS)

    play(scene)
