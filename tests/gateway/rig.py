"""A whole gateway on a real port: stand-in engines behind it, a scripted control, a journal in memory, raw clients."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from tests.gateway.engine import StandInEngine
from tests.loop import until
from tidegate.assemble.clock import SteadyClock
from tidegate.assemble.sockets import listen_tcp
from tidegate.domain.endpoint import EndpointState, Mode, ModelKind
from tidegate.domain.errors import StoreFault
from tidegate.domain.plan import DemandReported, Drain, FenceConfirmed, Reason, Resume, Route, Target
from tidegate.domain.ports import Link
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.gateway.app import Gateway
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.server import Server
from tidegate.transports.local import LocalListener
from tidegate.wire.internal import Catalog, EndpointEntry, GatewayHello, KeyEntry

KEY, OTHER_KEY, ADMIN_KEY, OLD_KEY, REVOKED_KEY = "tg-acme", "tg-other", "tg-admin", "tg-old", "tg-revoked"
T = TypeVar("T")


class MemoryJournal:
    """Implements `ports.Journal`. `delay_s` holds every append back; `broken` makes it fail."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.durable: list[UsageRecord] = []
        self.gate: asyncio.Event | None = None
        self.broken = False
        self.healthy = True

    async def append(self, record: UsageRecord) -> None:
        self.records.append(record)
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise StoreFault("disk full")
        self.durable.append(record)

    @property
    def final(self) -> list[UsageRecord]:
        return [r for r in self.records if r.outcome is not Outcome.OPEN]


def key(secret: str, tenant: str | None, **more: Any) -> KeyEntry:
    return KeyEntry(hashlib.sha256(secret.encode()).hexdigest(), f"key-{secret}", tenant, **more)


KEYS = (
    key(KEY, "acme"),
    key(OTHER_KEY, "other"),
    key(ADMIN_KEY, None),
    key(OLD_KEY, "acme", expires_ms=1),
    key(REVOKED_KEY, "acme", revoked=True),
)


def endpoint(name: str = "acme/chat", **more: Any) -> EndpointEntry:
    tenant, created_ms = name.split("/")[0], 1_700_000_000_000
    entry = EndpointEntry(
        name, tenant, "model-digest", ModelKind.GENERATIVE, Mode.DEDICATED_SERVERLESS, 1, 2048, created_ms
    )
    return replace(entry, **more)


ENDPOINTS = (
    endpoint(),
    endpoint("acme/embed", kind=ModelKind.EMBEDDING),
    endpoint("other/secret"),
    endpoint("house/common", shared=True, mode=Mode.SERVERLESS),
)


@dataclass
class Control:
    """The other end of the link. `messages` is everything the gateway ever said, over all links."""

    listener: LocalListener = field(default_factory=LocalListener)
    messages: list[object] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    endpoints: tuple[EndpointEntry, ...] = ENDPOINTS
    version: int = 0
    routes: dict[str, Route] = field(default_factory=dict)
    _readers: list["asyncio.Task[None]"] = field(default_factory=list)

    async def accept(self) -> None:
        link = await self.listener.accept()
        self.links.append(link)
        hello = await link.receive()
        assert isinstance(hello, GatewayHello)
        await self.publish()
        for route in self.routes.values():
            await link.send(route)
        self._readers.append(asyncio.create_task(self._read(link)))

    async def _read(self, link: Link) -> None:
        while True:
            self.messages.append(await link.receive())

    async def publish(self) -> None:
        self.version += 1
        await self.links[-1].send(Catalog(self.version, KEYS, self.endpoints))

    async def route(
        self, *targets: Target, name: str = "acme/chat", state: EndpointState = EndpointState.READY, **more: Any
    ) -> None:
        self.version += 1
        self.routes[name] = Route(name, self.version, state, targets, **more)
        await self.links[-1].send(self.routes[name])

    async def drain(self, replica: str, name: str = "acme/chat") -> None:
        await self.links[-1].send(Drain(replica, "node", name, Reason("test")))

    async def resume(self, replica: str, name: str = "acme/chat") -> None:
        await self.links[-1].send(Resume(replica, "node", name, Reason("test")))

    def demand(self, name: str = "acme/chat") -> list[DemandReported]:
        return [m for m in self.messages if isinstance(m, DemandReported) and m.endpoint == name]

    def fences(self) -> list[str]:
        return [m.replica for m in self.messages if isinstance(m, FenceConfirmed)]

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for link in self.links:
            await link.close()
        await self.listener.close()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])

    @property
    def events(self) -> list[bytes]:
        return [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]


class Client:
    """One raw connection, so that a test decides which bytes are sent when, and when it hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, path: str, body: bytes | dict[str, Any], key: str | None = KEY, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(data)}"]
        lines += [f"authorization: Bearer {key}"] if key else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode() + data)

    async def get(self, path: str, key: str | None = KEY) -> None:
        auth = f"authorization: Bearer {key}\r\n" if key else ""
        await self.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n{auth}\r\n".encode())

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:] if line)

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body, empty at its end."""
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size)
        await self.reader.readexactly(2)
        return data

    async def reply(self) -> Reply:
        status, headers = await self.head()
        if "content-length" in headers:
            return Reply(status, headers, await self.reader.readexactly(int(headers["content-length"])))
        body = b""
        while data := await self.chunk():
            body += data
        return Reply(status, headers, body)

    def hang_up(self) -> None:
        self.writer.transport.abort()

    def half_close(self) -> None:
        self.writer.write_eof()


@dataclass
class Rig:
    gateway: Gateway
    port: int
    control: Control
    journal: MemoryJournal
    engines: list[StandInEngine]
    admin: StandInEngine
    stop: Callable[[], None]
    _clients: list[Client] = field(default_factory=list)

    @property
    def engine(self) -> StandInEngine:
        return self.engines[0]

    def target(self, index: int = 0, slots: int = 4) -> Target:
        return Target(f"r{index}", self.engines[index].address, slots)

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def ask(self, body: bytes | dict[str, Any], path: str = "/v1/chat/completions", **more: Any) -> Reply:
        client = await self.client()
        await client.post(path, body, **more)
        return await client.reply()

    async def get(self, path: str, key: str | None = KEY) -> Reply:
        client = await self.client()
        await client.get(path, key)
        return await client.reply()

    async def record(self) -> UsageRecord:
        """The one final record of the one request of this test."""
        await until(lambda: self.journal.final, "a record")
        assert len(self.journal.final) == 1
        return self.journal.final[0]

    async def at_rest(self) -> None:
        """Nothing is left behind: no relay, no slot, no connection that is not idle in the pool."""
        parts = self.gateway.parts
        await until(lambda: not parts.relays and not parts.room.in_flight and not parts.room.held, "relays to end")
        await until(lambda: parts.pool.open_count == parts.pool.idle_count, "connections to be given back")


@contextlib.asynccontextmanager
async def rig(directory: Path, *, engines: int = 1, routed: bool = True, **limits: int) -> AsyncIterator[Rig]:
    """Everything runs on this event loop; `routed` publishes the first engine for acme/chat."""
    behind = [StandInEngine(directory / f"e{i}.sock") for i in range(engines)]
    admin = StandInEngine(directory / "admin.sock")
    for engine in [*behind, admin]:
        await engine.start()
    control, journal = Control(), MemoryJournal()
    gateway = Gateway(
        gateway="g1", region="local", connect=control.listener.connect, journal=journal, clock=SteadyClock(),
        admin_address=admin.address, limits=replace(GatewayLimits(), **limits),
    )  # fmt: skip
    listener = listen_tcp("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(gateway)
    ready = asyncio.Event()
    serving = asyncio.create_task(server.serve(listener, ready.set))
    await control.accept()  # it takes no connections before control has spoken
    await asyncio.wait_for(ready.wait(), 10)
    made = Rig(gateway, port, control, journal, behind, admin, server.stop)
    if routed:
        await control.route(made.target())
    await until(lambda: gateway.ready, "the catalog")
    await asyncio.sleep(0)
    try:
        yield made
        await made.at_rest()
    finally:
        for client in made._clients:
            client.writer.close()
        server.stop()
        await serving
        await control.close()
        for engine in [*behind, admin]:
            await engine.kill()
    leftover = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "StandInEngine" not in repr(t)]
    assert not leftover, f"tasks left behind: {leftover}"


def run(main: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop it has in production
        return runner.run(bounded())


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "acme/chat", "messages": [{"role": "user", "content": "hello"}], **more}
