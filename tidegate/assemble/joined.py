"""Parts that join a running platform on its machine: one more node, one more gateway, of whatever region.

They reach the control plane over its Unix socket, as the platform's own do, and engines and gateways reach each other
over theirs, so everything must run as the same user on one machine.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from tidegate.assemble.engines import foreign_drivers
from tidegate.assemble.folders import take
from tidegate.assemble.gateway import GatewayProcess, serve
from tidegate.assemble.ground import WallClock
from tidegate.assemble.machine import machine_of
from tidegate.assemble.settings import gateway_limits, node_limits, node_of
from tidegate.assemble.sockets import StartError, listen_tcp, public_url
from tidegate.assemble.weights import node_weights
from tidegate.config import Config
from tidegate.engines.process import Lifeline
from tidegate.node.agent import NodeAgent
from tidegate.transports.socket import connector

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Platform:
    """Where a running platform is reached."""

    control_address: str
    admin_address: str
    journal: Path


def find(config: Config) -> Platform:
    """The platform whose data directory `config` names. Raises StartError when none runs there."""
    run = (config.data_dir / "run").resolve()  # a link where the data directory's own path is too long for sockets
    control = run / "control.sock"
    if not control.is_socket():
        raise StartError(
            f"no platform runs in {config.data_dir}: start `tidegate up` there first, or name another --join"
        )
    return Platform(f"unix:{control}", f"unix:{run / 'admin.sock'}", config.data_dir.resolve() / "journal")


async def run_node(config: Config, platform: Platform, name: str, on_ready: Callable[[str], None]) -> None:
    """A node until SIGINT or SIGTERM; its engines end with it. Raises StartError, Fault."""
    stop = _stopped_by_signal()
    async with AsyncExitStack() as stack:
        folders = take(config, stack, log_name="node.log")
        machine = machine_of(config, folders.run, folders.logs)
        stack.callback(machine.logs.close)
        stack.callback(machine.lifeline.close)
        foreign = foreign_drivers(
            config, folders.run, lifeline=machine.lifeline, threads=machine.threads, logs=machine.logs
        )
        agent = NodeAgent(
            node=node_of(config, machine.accelerators, name),
            drivers={"builtin": machine.driver, **foreign},
            connect=connector(platform.control_address),
            clock=WallClock(),
            limits=node_limits(config),
            weights=await asyncio.to_thread(node_weights, config, platform.journal.parent),
        )
        machine.driver.open()
        running, stopping = asyncio.create_task(agent.run()), asyncio.create_task(stop.wait())
        on_ready(f"node {name} of region {config.region} joins with {len(machine.accelerators)} accelerators")
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await agent.close()
        await running


async def run_gateway(config: Config, platform: Platform, on_ready: Callable[[str], None]) -> None:
    """A gateway until SIGINT or SIGTERM, with a journal of its own beside the platform's. Raises StartError, Fault."""
    listener, lifeline = listen_tcp(config.host, config.port), Lifeline()
    try:
        on_ready(f"gateway of region {config.region} serves on {public_url(listener, config.host)}/v1")
        await serve(
            GatewayProcess(
                listen_fd=listener.fileno(),
                lifeline_fd=lifeline.read_fd,
                region=config.region,
                control_address=platform.control_address,
                admin_address=platform.admin_address,
                journal_dir=str(platform.journal),
                limits=gateway_limits(config),
            )
        )
    finally:
        lifeline.close()
        listener.close()


def _stopped_by_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
