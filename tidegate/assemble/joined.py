"""Parts that join a running platform: one more node, one more gateway, of whatever region.

On the platform's machine they reach the control plane over its Unix socket, as the platform's own parts do, and must
run as the same user. From another machine they come over mutual TLS with the certificate of a join token, and engines
are reached through their node's relay (`assemble.membership`).
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from tidegate.assemble.clock import SteadyClock
from tidegate.assemble.engines import foreign_drivers
from tidegate.assemble.folders import take
from tidegate.assemble.gateway import GatewayProcess, serve
from tidegate.assemble.machine import machine_of
from tidegate.assemble.membership import NodeLinks, member
from tidegate.assemble.settings import gateway_limits, node_limits, node_of
from tidegate.assemble.sockets import StartError, listen_tcp, public_url
from tidegate.assemble.weights import cache_folder, node_weights
from tidegate.config import Config
from tidegate.engines.process import Lifeline
from tidegate.engines.weights.sharing import Sharing
from tidegate.node.agent import NodeAgent
from tidegate.transports.identity import GATEWAY, NODE
from tidegate.transports.socket import connector

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Platform:
    """Where a platform that runs on this machine is reached."""

    control_address: str
    admin_address: str
    journal: Path


def find(config: Config) -> Platform:
    """The platform whose data directory `config` names. Raises StartError when none runs there."""
    run = (config.data_dir / "run").resolve()  # a link where the data directory's own path is too long for sockets
    control = run / "control.sock"
    if not control.is_socket():
        raise StartError(
            f"no platform runs in {config.data_dir}: start `tidegate up` there first, name another --join, or join "
            "from another machine with --token"
        )
    return Platform(f"unix:{control}", f"unix:{run / 'admin.sock'}", config.data_dir.resolve() / "journal")


async def run_node(
    config: Config, platform: Platform | None, name: str, token: str, on_ready: Callable[[str], None]
) -> None:
    """A node until SIGINT or SIGTERM; its engines end with it. Without a `platform` here, of one on another machine,
    which `token` lets it join unless it has before. Raises StartError, Fault.
    """
    stop = _stopped_by_signal()
    async with AsyncExitStack() as stack:
        folders = take(config, stack, log_name="node.log")
        links = None
        if platform is None:
            links = NodeLinks(config, await member(folders.data, NODE, name, config.region, token))
        data = platform.journal.parent if platform else folders.data
        machine = machine_of(config, folders.run, folders.logs)
        stack.callback(machine.logs.close)
        stack.callback(machine.lifeline.close)
        foreign = foreign_drivers(
            config, folders.run, lifeline=machine.lifeline, threads=machine.threads, logs=machine.logs
        )
        agent = NodeAgent(
            node=node_of(config, machine.accelerators, name),
            drivers={"builtin": machine.driver, **foreign},
            connect=links.connect if links is not None else connector(platform.control_address if platform else ""),
            clock=SteadyClock(links.clock.now_ms) if links is not None else SteadyClock(),
            limits=node_limits(config),
            weights=await asyncio.to_thread(
                node_weights, config, data, links.peers if links is not None else None, guest=platform is not None
            ),
            public=links.public if links is not None else lambda status: status.address,
        )
        machine.driver.open()
        parts = {asyncio.create_task(agent.run())}
        if links is not None:
            parts.add(asyncio.create_task(links.run(agent.address, Sharing(cache_folder(config, data)))))
        stopping = asyncio.create_task(stop.wait())
        on_ready(f"node {name} of region {config.region} joins with {len(machine.accelerators)} accelerators")
        try:
            await asyncio.wait({*parts, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await agent.close()
            for part in parts:
                part.cancel()
        for ended in await asyncio.gather(*parts, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


async def run_gateway(
    config: Config, platform: Platform | None, name: str, token: str, on_ready: Callable[[str], None]
) -> None:
    """A gateway until SIGINT or SIGTERM. With a `platform` here its journal is beside the platform's own; without, it
    joins one on another machine as `name`, and its journal is shipped there. Raises StartError, Fault.
    """
    async with AsyncExitStack() as stack:
        listener, lifeline = listen_tcp(config.host, config.port), Lifeline()
        stack.callback(listener.close)
        stack.callback(lifeline.close)
        settings = GatewayProcess(
            listen_fd=listener.fileno(),
            lifeline_fd=lifeline.read_fd,
            region=config.region,
            control_address=platform.control_address if platform else "",
            admin_address=platform.admin_address if platform else "",
            journal_dir=str(platform.journal) if platform else "",
            limits=gateway_limits(config),
        )
        if platform is None:
            folders = take(config, stack, log_name="gateway.log")
            membership = await member(folders.data, GATEWAY, name, config.region, token)
            renewing = asyncio.create_task(membership.renew())
            stack.callback(renewing.cancel)
            settings = structs.replace(
                settings,
                name=name,
                control_address=membership.known.control,
                admin_address=f"{membership.known.control}/admin",
                journal_dir=str(folders.data / "journal"),
                credentials=str(membership.credentials.folder),
            )
        on_ready(f"gateway of region {config.region} serves on {public_url(listener, config.host)}/v1")
        await serve(settings)


def _stopped_by_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
