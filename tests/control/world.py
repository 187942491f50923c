"""The control plane with all real but the machines: SQLite, the capacity core, links in memory, a scripted node."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from tests.loop import until
from tidegate.control import keys
from tidegate.control.api import build_app
from tidegate.control.service import Control
from tidegate.control.settings import ControlSettings
from tidegate.domain import plan
from tidegate.domain.endpoint import ApiKey, ModelKind, ModelProfile
from tidegate.domain.errors import LinkFault, Refusal
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.ports import Change, Link
from tidegate.domain.replica import ReplicaState
from tidegate.domain.units import MIB
from tidegate.policy.reconcile import CoreSettings, FleetCore
from tidegate.stores.database import migrate, open_database
from tidegate.stores.service_counts import SqlServiceCounts
from tidegate.stores.state import SqlStateStore
from tidegate.transports.local import LocalListener
from tidegate.wire.internal import BudgetLeases, Catalog, GatewayHello, Gateways, PriceList

ADMIN_SECRET = "tg-admin-secret-of-the-tests"
TIDES = ModelProfile("file:///models/tides", "d-tides", ModelKind.GENERATIVE, 4 * MIB, 4_096, 512, params=1_000_000)
MODELS = {
    "/models/tides": TIDES,
    "/models/stars": replace(TIDES, source="/models/stars", digest="d-stars"),
    "/models/huge": replace(TIDES, source="/models/huge", digest="d-huge", weight_bytes=200 * MIB),
    "/models/embed": replace(
        TIDES, source="/models/embed", digest="d-embed", kind=ModelKind.EMBEDDING, kv_bytes_per_token=0
    ),
}
S = ReplicaState


class Clock:
    """Real time plus what a test adds."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_ms(self) -> int:
        return 1_800_000_000_000 + round(asyncio.get_running_loop().time() * 1_000) + self.ahead_ms


class Inspector:
    """Knows `MODELS`; everything else is missing."""

    def inspect(self, source: str) -> ModelProfile:
        if source not in MODELS:
            raise Refusal("invalid_configuration", f"`model`: {source!r} does not exist", param="model")
        return MODELS[source]


class Adapters:
    """Knows ``/adapters/NAME`` for any name, of 1 MiB each; fits the base /models/tides only."""

    def inspect(self, source: str, base: str) -> ModelProfile:
        if not source.startswith("/adapters/") or base != TIDES.source:
            raise Refusal("invalid_configuration", f"model: {source!r} is for another base than {base}", param="model")
        return replace(TIDES, source=source, digest=f"d{source}", weight_bytes=MIB, kv_bytes_per_token=0)


@dataclass
class FakeNode:
    """Carries out commands at once and reports them, unless `broken` names the model digest that cannot start."""

    node: Node
    link: Link
    log: list[str]
    commands: list[plan.NodeCommand] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    replicas: dict[str, plan.ReplicaStatus] = field(default_factory=dict)

    async def run(self) -> None:
        with contextlib.suppress(LinkFault):
            await self.link.send(plan.NodeJoined(self.node, tuple(self.replicas.values())))
            while True:
                command = await self.link.receive()
                assert isinstance(command, plan.NodeCommand)
                self.commands.append(command)
                self.log.append(f"node {type(command).__name__} {command.replica.rsplit('-', 1)[0]}")
                for status in self._carry_out(command):
                    self.replicas[status.replica] = status
                    await self.link.send(plan.ReplicaChanged(status))

    def _carry_out(self, command: plan.NodeCommand) -> list[plan.ReplicaStatus]:
        match command:
            case plan.Start():
                wanted = command.deployment
                status = plan.ReplicaStatus(
                    command.replica, wanted.endpoint, self.node.id, wanted.generation, S.STARTING, command.accelerators,
                    command.accelerator_bytes,
                )  # fmt: skip
                if wanted.model.digest in self.broken:
                    reason = "weights are truncated"
                    stopped = replace(status, state=S.STOPPED, accelerator_bytes=0, reason=reason)
                    return [status, replace(status, state=S.FAILED, reason=reason), stopped]
                return [status, self._ready(status, 700)]
            case plan.Wake():
                status = self.replicas[command.replica]
                waking = replace(status, state=S.WAKING, accelerators=command.accelerators, took_ms=0)
                return [waking, self._ready(replace(waking, accelerator_bytes=command.accelerator_bytes), 20)]
            case plan.Sleep():
                status = replace(self.replicas[command.replica], state=S.SLEEPING, address="", took_ms=0)
                return [status, replace(status, state=S.ASLEEP, accelerator_bytes=0, host_bytes=4 * MIB, took_ms=5)]
            case plan.Stop():
                status = self.replicas[command.replica]
                return [replace(status, state=S.STOPPED, accelerator_bytes=0, host_bytes=0, address="")]
            case plan.Pause():
                return [replace(self.replicas[command.replica], paused=command.on, took_ms=0)]

    def _ready(self, status: plan.ReplicaStatus, took_ms: int) -> plan.ReplicaStatus:
        return replace(status, state=S.READY, address=f"unix:/run/{status.replica}.sock", took_ms=took_ms)


@dataclass
class FakeGateway:
    """Keeps what it is told; confirms fences at once while `obliging`."""

    name: str
    link: Link
    log: list[str]
    region: str = "local"
    obliging: bool = True
    catalog: Catalog = field(default_factory=lambda: Catalog(-1, (), ()))
    routes: dict[str, plan.Route] = field(default_factory=dict)
    first: str = ""
    drains: list[plan.Drain] = field(default_factory=list)
    arrivals: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        with contextlib.suppress(LinkFault):
            await self.link.send(GatewayHello(self.name, self.region))
            while True:
                message = await self.link.receive()
                self.first = self.first or type(message).__name__
                match message:
                    case Catalog():
                        self.catalog = message
                    case plan.Route():
                        self.routes[message.endpoint] = message
                        names = [target.replica.rsplit("-", 1)[0] for target in message.targets]
                        self.log.append(f"{self.name} Route {message.endpoint} {names}")
                    case plan.Drain():
                        self.drains.append(message)
                        self.log.append(f"{self.name} Drain {message.endpoint}")
                        if self.obliging:
                            await self.confirm(message)
                    case plan.Resume():
                        self.log.append(f"{self.name} Resume {message.endpoint}")
                    case Gateways() | PriceList() | BudgetLeases():
                        continue  # money: not what these tests are about
                    case _:
                        raise AssertionError(f"a gateway got {message!r}")

    async def confirm(self, drain: plan.Drain) -> None:
        self.log.append(f"{self.name} fenced {drain.endpoint}")
        await self.link.send(plan.FenceConfirmed(self.name, drain.replica, drain.fence))

    async def demand(self, endpoint: str, *, queued: int = 0, in_flight: int = 0, arrived: int = 0) -> None:
        self.arrivals[endpoint] = self.arrivals.get(endpoint, 0) + arrived
        await self.link.send(
            plan.DemandReported(self.name, endpoint, queued, in_flight, self.arrivals[endpoint], 1 if queued else 0)
        )

    def targets(self, endpoint: str) -> tuple[plan.Target, ...]:
        return self.routes[endpoint].targets if endpoint in self.routes else ()


@dataclass
class World:
    control: Control
    clock: Clock
    listener: LocalListener
    store: SqlStateStore
    http: httpx.AsyncClient
    admin_key: ApiKey
    group: asyncio.TaskGroup
    log: list[str] = field(default_factory=list)  # what nodes and gateways saw, in one order
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    async def node(self, name: str = "n1", *, accelerators: int = 1, memory_bytes: int = 24 * MIB) -> FakeNode:
        cards = tuple(Accelerator(f"cpu-{i}", "cpu", memory_bytes) for i in range(accelerators))
        node = FakeNode(Node(name, "local", cards, 1 << 30, 1 << 40), await self.listener.connect(), self.log)
        self._start(node)
        await until(lambda: any(session.node.id == name for session in self.control.loop.nodes), "node joined")
        return node

    async def gateway(self, name: str = "g1", *, obliging: bool = True) -> FakeGateway:
        gateway = FakeGateway(name, await self.listener.connect(), self.log, obliging=obliging)
        self._start(gateway)
        await until(lambda: gateway.catalog.version >= 0, "catalog")
        return gateway

    async def lose(self, peer: FakeNode | FakeGateway) -> None:
        await peer.link.close()
        await self.tasks[id(peer)]

    def _start(self, peer: FakeNode | FakeGateway) -> None:
        self.tasks[id(peer)] = self.group.create_task(peer.run())

    async def apply(self, endpoint: str, model: str = "/models/tides", **body: object) -> dict[str, Any]:
        await self.control.tenancy.create_tenant(endpoint.split("/")[0], "test")
        response = await self.http.put(f"/api/v1/endpoints/{endpoint}", json={"model": model, **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def endpoint(self, endpoint: str) -> dict[str, Any]:
        return dict((await self.http.get(f"/api/v1/endpoints/{endpoint}")).json())

    async def tenant_key(self, tenant: str) -> tuple[ApiKey, dict[str, str]]:
        await self.control.tenancy.create_tenant(tenant, "test")
        key, secret = await self.control.tenancy.create_key(tenant, "test")
        return key, {"authorization": f"Bearer {secret}"}


@contextlib.asynccontextmanager
async def running(
    directory: Path, settings: ControlSettings | None = None, core: CoreSettings | None = None
) -> AsyncIterator[World]:
    """A control plane serving its app in process, with an administrator's key, and no node or gateway yet."""
    engine = open_database(f"sqlite:///{directory}/control.sqlite")
    migrate(engine)
    clock, listener, store, counts = Clock(), LocalListener(), SqlStateStore(engine), SqlServiceCounts(engine)
    if not store.load().keys:
        key, _ = keys.new_key(None, 1, secret=ADMIN_SECRET)
        store.commit(store.load().version, Change(put=(key,)))
    control = Control(
        store=store,
        inspector=Inspector(),
        adapter_inspector=Adapters(),
        core=FleetCore(core or CoreSettings(first_load=False, residency_ms_min=0, wait_ms_max=200)),
        listener=listener,
        clock=clock,
        settings=settings or ControlSettings(),
        load_counts=counts.load,
        save_counts=counts.save,
    )
    transport = httpx.ASGITransport(app=build_app(control), raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {ADMIN_SECRET}"}
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://admin", headers=headers) as http,
        asyncio.TaskGroup() as group,
    ):
        serving = group.create_task(control.run())
        world = World(control, clock, listener, store, http, store.load().keys[0], group)
        await until(lambda: control.desired.state.version > 0, "desired state loaded")
        try:
            yield world
        finally:
            serving.cancel()
            await listener.close()
            for task in world.tasks.values():
                task.cancel()
    engine.dispose()
