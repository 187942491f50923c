"""Builds the services of the `up` process on their ports, runs them as tasks, and ends them in order."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tidegate.assemble.gateway import GatewayProcess
from tidegate.assemble.ground import Ground
from tidegate.assemble.server import Server
from tidegate.assemble.settings import control_settings, core_settings, engine_threads, node_limits, node_of
from tidegate.assemble.sockets import StartError, listen_unix
from tidegate.billing.api import routes
from tidegate.billing.service import Billing
from tidegate.config import Config
from tidegate.control.service import Control
from tidegate.domain.errors import Fault, Refusal, StoreFault
from tidegate.domain.ledger import EndpointFacts
from tidegate.domain.ports import Clock
from tidegate.engines.builtin import BuiltinDriver
from tidegate.engines.discover import discover
from tidegate.engines.inspect import FileInspector
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Child, Lifeline
from tidegate.node.agent import NodeAgent
from tidegate.policy.reconcile import FleetCore
from tidegate.transports.socket import SocketListener, connector, listen

log = logging.getLogger(__name__)

GATEWAY_DRAIN_S_MAX = 10
ADMIN_DRAIN_S_MAX = 2


@dataclass(slots=True)
class Services:
    """The parts, and the tasks they run in once started."""

    control: Control
    agent: NodeAgent
    billing: Billing
    admin: Server
    gateway: Child
    lifeline: Lifeline
    logs: list[LogRing]
    tasks: dict[str, asyncio.Task[None]]

    def start(self) -> list[asyncio.Task[None]]:
        """One task a part; none of them ends before `close`."""
        parts = {
            "control plane": self.control.run(),
            "node": self.agent.run(),
            "billing": self.billing.run(),
            "admin server": self.admin.run(),
            "gateway": self.gateway.run(),
        }
        self.tasks = {name: asyncio.create_task(part, name=name) for name, part in parts.items()}
        return list(self.tasks.values())

    async def close(self) -> None:
        """No new requests, then no engines, then the last records into the ledger. Each step is bounded."""
        await self._step("gateway", self.gateway.stop())
        await self._step("node", self.agent.close())
        self.admin.stop()
        await self._end("billing")
        try:
            await self.billing.drain()
        except StoreFault as fault:
            log.warning("usage records wait in the journal for the next start: %s", fault.reason)
        await self._end("control plane")
        for name in ("admin server", "node", "gateway"):
            await self._end(name, wait_s=ADMIN_DRAIN_S_MAX + 1)
        self.lifeline.close()
        for ring in self.logs:
            ring.close()

    async def _step(self, name: str, ending: object) -> None:
        """One part that does not end well must not keep the others from ending."""
        try:
            await ending  # type: ignore[misc]
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


async def build(config: Config, ground: Ground, listener: socket.socket, clock: Clock) -> Services:
    """Everything plugged together and listening, nothing running yet. Raises StartError, LinkFault."""
    accelerators = _accelerators(config)
    limits = node_limits(config)
    lifeline = Lifeline()
    engine_logs, gateway_logs = LogRing(ground.logs / "engines.log"), LogRing(ground.logs / "gateway.log")
    address = f"unix:{ground.run / 'control.sock'}"
    control = Control(
        store=ground.state,
        inspector=FileInspector(),
        core=FleetCore(core_settings(config, limits)),
        listener=await listen(address),
        clock=clock,
        settings=control_settings(config),
        price_plans=lambda: {version.plan for version in ground.prices.versions()},
    )
    billing = Billing(
        reader=ground.journal_reader,
        ledger=ground.ledger,
        prices=ground.prices,
        clock=clock,
        endpoint_facts=lambda: endpoint_facts(control),
    )
    driver = BuiltinDriver(...)
    agent = NodeAgent(
        node=node_of(config, accelerators),
        drivers={"builtin": driver},
        connect=connector(address),
        clock=clock,
        limits=limits,
    )
    admin_path = ground.run / "admin.sock"
    admin = Server(build_app(control, routes(billing, ...)), listen_unix(admin_path), drain_s_max=ADMIN_DRAIN_S_MAX)
    return Services(control, agent, billing, admin, gateway, lifeline, [engine_logs, gateway_logs], {})
