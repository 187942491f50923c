"""The gateway's own connection pool, through another machine's relay: exchanges pass, and whatever fails is a fault."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.transports.machines import ControlMachine
from tidegate.domain.errors import EngineFault
from tidegate.gateway.upstream import Pool
from tidegate.transports.door import Service
from tidegate.transports.relay import Relay
from tidegate.transports.tls import RELAY, Dialer

PATH = b"/v1/chat/completions"
ASK = b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: 2\r\n\r\n{}"


async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with `ok`, and goes in the middle of its third answer."""
    for number in range(3):
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" + (b"ok" if number < 2 else b"o"))
    await writer.drain()
    writer.close()


def run(directory: Path, scenario: Callable[[Pool, str], Awaitable[None]]) -> None:
    async def main() -> None:
        server = await asyncio.start_unix_server(engine, directory / "e.sock")
        machine = ControlMachine(directory)
        relay = Relay({"r1": f"unix:{directory}/e.sock"}.get, frozenset([PATH]))
        await machine.open({RELAY: Service(frozenset(["gateway"]), relay.serve)})
        _, credentials = await machine.joined("gateway", "here")
        pool = Pool(4, 2_000, Dialer(credentials).relay)
        try:
            async with asyncio.timeout(20):
                await scenario(pool, machine.control)
        finally:
            pool.close()
            await machine.close()
            server.close()

    asyncio.run(main())


def test_exchanges_share_a_connection_and_a_dying_engine_is_a_fault(tmp_path: Path) -> None:
    async def scenario(pool: Pool, control: str) -> None:
        address = f"{control}/replica:r1"
        connection = await pool.connect(address)
        for _ in range(2):
            connection.start(ASK)
            assert await connection.head() == 200
            assert await connection.read_all(10) == b"ok"
            connection.release()
            kept = pool.take(address)
            assert kept is connection
        connection.start(ASK)
        assert await connection.head() == 200
        with pytest.raises(EngineFault, match="closed the connection"):
            await connection.read_all(10)
        connection.release()
        assert pool.take(address) is None, "half an answer is nothing to keep"

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda control: control.replace("/control/control", "/node/us-1") + "/replica:r1", "is not node/us-1"),
        (lambda control: "tls:127.0.0.1:9/node/us-1/replica:r1", "does not accept connections"),
        (lambda control: "tls:nonsense", "is not an address"),
    ],
)
def test_what_cannot_be_reached_is_a_fault(change: Callable[[str], str], said: str, tmp_path: Path) -> None:
    async def scenario(pool: Pool, control: str) -> None:
        with pytest.raises(EngineFault, match=said):
            await pool.connect(change(control))

    run(tmp_path, scenario)


def test_a_gateway_without_a_certificate_says_so() -> None:
    async def main() -> None:
        with pytest.raises(EngineFault, match="no certificate for other machines"):
            await Pool(4, 2_000).connect("tls:h:1/node/a/replica:r")

    asyncio.run(main())
