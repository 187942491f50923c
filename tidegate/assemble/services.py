"""Builds the services of the `up` process on their ports, runs them as tasks, and ends them in order."""

import asyncio
import logging
import socket
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from tidegate.assemble.advice import advice_routes
from tidegate.assemble.batch import batch_service, runner_secret
from tidegate.assemble.billing import billing_service
from tidegate.assemble.engines import foreign_drivers
from tidegate.assemble.gateway import GatewayProcess
from tidegate.assemble.ground import Ground
from tidegate.assemble.machine import Machine
from tidegate.assemble.server import Server
from tidegate.assemble.settings import (
    control_settings,
    core_settings,
    gateway_limits,
    node_limits,
    node_of,
)
from tidegate.assemble.sockets import listen_unix, public_url
from tidegate.assemble.weights import inspector, node_weights
from tidegate.batch.api import routes as batch_routes
from tidegate.batch.jobs import routes as job_routes
from tidegate.batch.service import BatchService
from tidegate.billing.api import routes
from tidegate.billing.service import Billing
from tidegate.config import Config
from tidegate.control.api import build_app
from tidegate.control.keys import digest
from tidegate.control.service import Control
from tidegate.domain.errors import Fault, StoreFault
from tidegate.domain.fleet import Node
from tidegate.domain.ports import Clock
from tidegate.engines.adapters import AdapterFiles
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Child, Restart
from tidegate.node.agent import NodeAgent
from tidegate.policy.reconcile import FleetCore
from tidegate.transports.socket import connector, listen

if TYPE_CHECKING:
    from tidegate.assemble.links import PlatformLinks
    from tidegate.transports.identity import Identity

log = logging.getLogger(__name__)

GATEWAY_SLACK_MS = 2_000  # beyond its own bound, until it is killed
ADMIN_DRAIN_S_MAX = 2


@dataclass(slots=True)
class Services:
    """The parts, and the tasks they run in once started."""

    node: Node
    control: Control
    agent: NodeAgent
    billing: Billing
    batch: BatchService
    admin: Server
    admin_path: Path
    gateway: Child
    links: "PlatformLinks | None"
    logs: LogRing
    tasks: dict[str, asyncio.Task[None]]

    def start(self) -> list[asyncio.Task[None]]:
        """One task a part; none of them ends before `close`."""
        parts = {
            "control plane": self.control.run(),
            "node": self.agent.run(),
            "billing": self.billing.run(),
            "batch": self.batch.run(),
            "admin server": self.admin.run(),
            "gateway": self.gateway.run(),
        }
        if self.links is not None:
            self.control.meters.registry.register(self.links.receiver)
            parts["links"] = self.links.run(self.control.loop.address, self.admin_path, self._enrolled)
        self.tasks = {name: asyncio.create_task(part, name=name) for name, part in parts.items()}
        return list(self.tasks.values())

    def _enrolled(self, who: "Identity", how: str) -> None:
        self.control.activity.note("links", "enrolled", f"{who.role} {who.name}", f"{how} region={who.region}")

    @property
    def last_gateway_line(self) -> str:
        """What the gateway process printed last: why it does not start, if it does not."""
        return self.logs.tail[-1] if self.logs.tail else "it printed nothing"

    async def close(self) -> None:
        """No new requests, then no engines, then the last records into the ledger. Each step is bounded."""
        await self._end("batch")
        await self._end("links")
        await self._step("gateway", self.gateway.stop())
        await self._step("node", self.agent.close())
        self.admin.stop()
        await self._end("billing")
        try:
            await self.billing.drain(checkpoint=True)
        except StoreFault as fault:
            log.warning("usage records wait in the journal for the next start: %s", fault.reason)
        await self._end("control plane")
        for name in ("admin server", "node", "gateway"):
            await self._end(name, wait_s=ADMIN_DRAIN_S_MAX + 1)
        self.admin_path.unlink(missing_ok=True)
        if self.links is not None:
            self.links.mirror.close()  # not before the ledger is done: it would take gateways elsewhere for gone
        self.logs.close()

    async def _step(self, name: str, ending: Awaitable[object]) -> None:
        """One part that does not end well must not keep the others from ending."""
        try:
            await ending
        except Fault as fault:
            log.warning("%s: %s", name, fault.reason)

    async def _end(self, name: str, wait_s: float = 0) -> None:
        task = self.tasks.get(name)
        if task is None:
            return
        if wait_s:
            await asyncio.wait({task}, timeout=wait_s)
        task.cancel()
        await asyncio.wait({task})


async def build(config: Config, ground: Ground, machine: Machine, listener: socket.socket, clock: Clock) -> Services:
    """Everything plugged together and listening, nothing running yet. Raises StartError, LinkFault."""
    accelerators, lifeline, threads = machine.accelerators, machine.lifeline, machine.threads
    node, limits = node_of(config, accelerators), node_limits(config)
    secret, gateway_logs = runner_secret(), LogRing(ground.logs / "gateway.log")
    control_address, admin_path = f"unix:{ground.run / 'control.sock'}", ground.run / "admin.sock"
    links = await asyncio.to_thread(_links, config, ground, clock) if config.links.listen else None
    relay = links.relay_address if links is not None else ""
    control = Control(
        store=ground.state,
        inspector=inspector(config, ground.data),
        adapter_inspector=AdapterFiles(),
        core=FleetCore(core_settings(config, limits, accelerators)),
        listener=await listen(control_address),
        clock=clock,
        settings=replace(control_settings(config, accelerators), runner_digest=digest(secret), relay_address=relay),
        price_plans=lambda: {version.plan for version in ground.prices.versions()} - {""},
        time_marks=await asyncio.to_thread(ground.ledger.time_marks),
        spent=lambda: billing.spent,
        contracts=lambda: billing.refusing,
        prices=ground.prices.versions,
        load_counts=ground.service_counts.load,
        save_counts=ground.service_counts.save,
        distant=links.links if links is not None else None,
    )
    billing = billing_service(config, ground, control, clock)
    foreign = foreign_drivers(config, ground.run, lifeline=lifeline, threads=threads, logs=machine.logs)
    agent = NodeAgent(
        node=node,
        drivers={"builtin": machine.driver, **foreign},
        connect=connector(control_address),
        clock=clock,
        limits=limits,
        weights=await asyncio.to_thread(node_weights, config, ground.data, links.peers if links is not None else None),
    )
    batch = await batch_service(config, ground, control, public_url(listener, config.host), secret, clock)
    gateway = GatewayProcess(
        listen_fd=listener.fileno(),
        lifeline_fd=lifeline.read_fd,
        region=config.region,
        control_address=control_address,
        admin_address=f"unix:{admin_path}",
        journal_dir=str(ground.journal),
        limits=gateway_limits(config),
        credentials=str(links.gateway.folder) if links is not None else "",
    )
    server = Server(_admin_app(control, billing, batch), listen_unix(admin_path), drain_s_max=ADMIN_DRAIN_S_MAX)
    return Services(
        node=node,
        control=control,
        agent=agent,
        billing=billing,
        batch=batch,
        admin=server,
        admin_path=admin_path,
        gateway=_child(gateway, gateway_logs),
        links=links,
        logs=gateway_logs,
        tasks={},
    )


def _links(config: Config, ground: Ground, clock: Clock) -> "PlatformLinks":
    """Imported only here: on a single machine nobody waits for what makes certificates."""
    from tidegate.assemble.links import platform_links

    return platform_links(config, ground.data, ground.journal, clock)


def _admin_app(control: Control, billing: Billing, batch: BatchService) -> Starlette:
    authorize = control.authorize
    for metrics in (billing.metrics, batch.metrics):  # one scrape for all
        control.meters.registry.register(metrics.registry)
    extra = [
        *routes(billing, authorize),
        *batch_routes(batch, authorize),
        *job_routes(batch, authorize),
        *advice_routes(billing, authorize),
    ]
    return build_app(control, extra)


def _child(gateway: GatewayProcess, logs: LogRing) -> Child:
    return Child(
        "gateway",
        gateway.command(),
        logs=logs,
        pass_fds=(gateway.listen_fd, gateway.lifeline_fd),
        restart=Restart(wait_ms_min=20, wait_ms_max=1_000, stable_ms_min=1_000),
        grace_ms_max=gateway.limits.shutdown_ms_max + GATEWAY_SLACK_MS,
    )
