"""The gateway process: ``python -m tidegate.assemble.gateway SETTINGS`` (JSON), started by the platform.

A module of its own because it must stay small (no SQL, pydantic, web framework or torch is imported) and because it
may die and come back without anything else noticing: the public socket and the lifeline are inherited, engines and
their sockets belong to others, and every start writes a journal of its own.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import uvloop

from tidegate.assemble.clock import SteadyClock
from tidegate.domain.errors import Fault
from tidegate.domain.ports import Clock
from tidegate.gateway.app import Gateway
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.server import Server
from tidegate.gateway.shipping import Shipper
from tidegate.stores.journal import SegmentJournal
from tidegate.stores.journal_tail import JournalTail
from tidegate.transports import secure
from tidegate.transports import socket as sockets
from tidegate.transports.tls import JOURNAL, LINK, Credentials, Dialer

OTHER_DESCRIPTORS = 256  # the journal, links, idle connections to engines
SHIP_S_MAX = 5.0  # at the end: what is not over there by then is shipped after the next start


class GatewayProcess(msgspec.Struct, frozen=True):
    """What one gateway needs to know. Descriptors are inherited, nothing is secret.

    Addresses are ``unix:PATH``, or ``tls:…`` for a gateway that has joined as `name` from another machine: then its
    journal is shipped to the platform. `credentials` is the folder of its certificate, empty while there are no links
    between machines.
    """

    listen_fd: int
    lifeline_fd: int
    region: str
    control_address: str
    admin_address: str
    journal_dir: str
    limits: GatewayLimits
    credentials: str = ""
    name: str = ""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tidegate.assemble.gateway", msgspec.json.encode(self).decode()]


def boot_id(name: str) -> str:
    """New at each start, and in the order of starts. It says whose journal it is: ``NAME+`` of a gateway elsewhere."""
    return f"{name + '+' if name else 'gw-'}{time.time_ns() // 1_000_000:x}-{secrets.token_hex(3)}"


def connections_max() -> int:
    """How many clients this process has descriptors for, each with its stream to an engine, once it has taken all that
    it may have: the usual soft limit of 1,024 is less than one service keeps open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * GatewayLimits().connections_max + OTHER_DESCRIPTORS
    if soft < wanted and soft != resource.RLIM_INFINITY:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max((min(soft, wanted) - OTHER_DESCRIPTORS) // 2, 1) if soft != resource.RLIM_INFINITY else wanted // 2


async def serve(settings: GatewayProcess) -> None:
    """Until SIGTERM, or until the platform is gone (its end of the lifeline closes)."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    # Before uvicorn takes these signals over: when it is done it raises them again, for whoever had them before, and
    # without a handler that would end the process before the journal is closed.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    boot = boot_id(settings.name)
    dialer = Dialer(Credentials(Path(settings.credentials))) if settings.credentials else None
    clock: Clock = SteadyClock()
    shipper: Shipper | None = None
    if dialer is not None and settings.name:
        shared = secure.SharedClock()
        clock = SteadyClock(shared.now_ms)
        connect = secure.connector(dialer, settings.control_address, LINK, shared)
        ship = secure.connector(dialer, settings.control_address, JOURNAL)
        shipper = Shipper(JournalTail(Path(settings.journal_dir)), ship)
    else:
        connect = sockets.connector(settings.control_address)
    journal = SegmentJournal(Path(settings.journal_dir), boot)
    gateway = Gateway(
        gateway=boot,
        region=settings.region,
        connect=connect,
        journal=journal,
        clock=clock,
        admin_address=settings.admin_address,
        limits=replace(settings.limits, connections_max=connections_max()),
        dial=dialer.relay if dialer is not None else None,
    )
    server = Server(gateway)
    gc.collect()
    gc.freeze()  # what lives for ever need not be looked at by every collection during a stream
    # Not before all is there that may be refused: whoever closes this descriptor while it is read aborts the process.
    loop.add_reader(settings.lifeline_fd, stop.set)
    shipping = asyncio.create_task(shipper.run()) if shipper is not None else None
    serving = asyncio.create_task(server.serve(socket.socket(fileno=os.dup(settings.listen_fd))))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(settings.lifeline_fd)
    stopping.cancel()
    server.stop()
    try:
        await serving
    finally:
        journal.close()
        if shipper is not None and shipping is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(shipper.done.wait(), SHIP_S_MAX)
            shipping.cancel()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    settings = msgspec.json.decode(sys.argv[1], type=GatewayProcess)
    try:
        uvloop.run(serve(settings))
    except Fault as fault:
        sys.exit(f"gateway: {fault.reason}")


if __name__ == "__main__":
    main()
