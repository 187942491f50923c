"""What of an engine can be reached through a relay port, over real TLS: its OpenAI API, and nothing by any trick."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transports.machines import ControlMachine
from tidegate.domain.errors import LinkFault
from tidegate.transports import relay as relay_module
from tidegate.transports.door import Service
from tidegate.transports.relay import Relay
from tidegate.transports.tls import RELAY, Dialer

CHAT = b"/v1/chat/completions"
ASK = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"


class Engine:
    """A Unix socket that keeps what it is sent and answers each request with its count."""

    def __init__(self) -> None:
        self.heard = b""
        self.lost = asyncio.Event()
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.heard += data
                writer.write(self.answer)
        except ConnectionError:
            return
        finally:
            self.lost.set()
            writer.close()


class Client(asyncio.Protocol):
    """The gateway's end, raw."""

    def __init__(self) -> None:
        self.heard = b""
        self.news = asyncio.Event()
        self.lost = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    async def hears(self, what: bytes) -> None:
        while what not in self.heard:
            self.news.clear()
            await self.news.wait()


Scenario = Callable[[Callable[[str], Awaitable[Client]], Engine], Awaitable[None]]


def run(directory: Path, scenario: Scenario, role: str = "gateway") -> None:
    async def main() -> None:
        engine, path = Engine(), directory / "engine.sock"
        server = await asyncio.start_unix_server(engine.serve, path)
        admin, admin_path = Engine(), directory / "admin.sock"
        admin_server = await asyncio.start_unix_server(admin.serve, admin_path)
        relay = Relay(
            {"r1": f"unix:{path}", "gone": f"unix:{directory}/no.sock"}.get, frozenset([CHAT]), str(admin_path)
        )
        machine = ControlMachine(directory)
        await machine.open({RELAY: Service(frozenset(["gateway"]), relay.serve)})
        _, credentials = await machine.joined(role, "here")
        dialer = Dialer(credentials)

        async def connect(what: str) -> Client:
            client = Client()
            await dialer.relay(f"{machine.control}/{what}", lambda: client)
            return client

        try:
            async with asyncio.timeout(20):
                await scenario(connect, engine)
        finally:
            await machine.close()
            server.close()
            admin_server.close()

    asyncio.run(main())


def test_requests_and_answers_pass_and_the_connection_is_used_again(tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        client = await connect("replica:r1")
        client.write(ASK + b"x-request-id: req-1\r\n\r\n{}")
        await client.hears(b"\r\n\r\nok")
        client.write(ASK + b"\r\n[]")
        await client.hears(b"okHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        kept = b"content-type: application/json\r\n"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\n" + kept
        first = head + b"x-request-id: req-1\r\ncontent-length: 2\r\n\r\n{}"
        assert engine.heard == first + head + b"content-length: 2\r\n\r\n[]", "said anew, nothing else passed on"

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /control/sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/chat/completions/../../control/sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        b"POST /v1/load_lora_adapter HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
        b"POST http://engine/control/sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ASK + b"transfer-encoding: chunked\r\n\r\n{}POST /control/sleep HTTP/1.1\r\n\r\n",
        ASK + b"content-length: 60\r\n\r\n{}POST /control/sleep HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        ASK + b"\r\n{}POST /control/sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: +2\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
        ASK + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n{}",
        b"\x00\x01\x02 nonsense\r\n\r\n",
    ],
)
def test_nothing_but_the_openai_api_gets_through(request_bytes: bytes, tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        client = await connect("replica:r1")
        client.write(request_bytes)
        await client.lost.wait()
        assert b"control" not in engine.heard
        assert b"lora" not in engine.heard
        assert b"GET" not in engine.heard

    run(tmp_path, scenario)


def test_smuggled_bytes_are_body_or_nothing(tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        client = await connect("replica:r1")
        inner = b"POST /control/sleep HTTP/1.1\r\ncontent-length: 0\r\n\r\n"
        length = b"content-length: %d\r\n\r\n" % len(inner)
        client.write(b"POST /v1/chat/completions HTTP/1.1\r\nx-odd: a\tb\r\n" + length + inner)
        await client.hears(b"ok")
        assert engine.heard == b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\n" + length + inner

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "what", ["replica:nobody", "replica:gone", "engine", "admin:x", "replica:" + "r" * 600, "../r1"]
)
def test_what_is_not_there_ends_the_connection(what: str, tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        client = await connect(what)
        client.write(ASK + b"\r\n{}")
        await client.lost.wait()
        assert engine.heard == b""

    run(tmp_path, scenario)


def test_the_engine_hears_that_the_gateway_is_gone(tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        client = await connect("replica:r1")
        client.write(ASK + b"\r\n{}")
        await client.hears(b"ok")
        assert client.transport is not None
        client.transport.abort()
        await engine.lost.wait()

    run(tmp_path, scenario)


def test_the_admin_api_is_there_for_gateways(tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        client = await connect("admin")
        client.write(b"GET /api/v1/nodes HTTP/1.1\r\n\r\n")
        await client.hears(b"ok")
        assert engine.heard == b"", "and reaches no engine"

    run(tmp_path, scenario)


def test_nodes_may_not_use_each_others_engines(tmp_path: Path) -> None:
    async def scenario(connect: Callable[[str], Awaitable[Client]], engine: Engine) -> None:
        try:
            client = await connect("replica:r1")
        except (OSError, LinkFault):
            return
        client.write(ASK + b"\r\n{}")
        await client.lost.wait()
        assert engine.heard == b""

    run(tmp_path, scenario, role="node")


class Heard:
    """What an engine's parser makes of bytes: (method, path) of each request."""

    def __init__(self, data: bytes) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self._url = b""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_headers_complete(self) -> None:
        self.requests.append((self._parser.get_method(), self._url))


PIECES = [
    ASK + b"\r\n{}",
    b"POST /control/sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"content-length: 5\r\n",
    b"transfer-encoding: chunked\r\n",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b" HTTP/1.1\n",
    CHAT,
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8)), max_size=8), st.data())
def test_whatever_comes_an_engine_hears_only_what_is_allowed(pieces: list[bytes], data: st.DataObject) -> None:
    """Also cut anywhere: a request is what is said, not how it arrives."""
    said, allowed, passed = b"".join(pieces), relay_module._Filter(frozenset([CHAT])), b""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=4)))
    with contextlib.suppress(relay_module._NotAllowed):  # it ends the connection; what passed before has passed
        for start, end in itertools.pairwise([0, *cuts, len(said)]):
            passed += allowed.feed(said[start:end])
    assert {*Heard(passed).requests} <= {(b"POST", CHAT)}
