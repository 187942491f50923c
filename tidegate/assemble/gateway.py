"""The gateway process: ``python -m tidegate.assemble.gateway SETTINGS`` (JSON), started by the platform.

A module of its own because it must stay small (no SQL, pydantic, web framework or torch is imported) and because it
may die and come back without anything else noticing: the public socket and the lifeline are inherited, engines and
their sockets belong to others, and every start writes a journal of its own.
"""

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
import uvloop

from tidegate.domain.errors import Fault
from tidegate.gateway.app import Gateway
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.server import Server
from tidegate.stores.journal import SegmentJournal
from tidegate.transports.socket import connector


class GatewayProcess(msgspec.Struct, frozen=True):
    """What one gateway needs to know. Descriptors are inherited, addresses are ``unix:PATH``, nothing is secret."""

    listen_fd: int
    lifeline_fd: int
    region: str
    control_address: str
    admin_address: str
    journal_dir: str
    limits: GatewayLimits

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tidegate.assemble.gateway", msgspec.json.encode(self).decode()]


class _WallClock:
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


def boot_id() -> str:
    """New at each start, and in the order of starts."""
    return f"gw-{time.time_ns() // 1_000_000:x}-{secrets.token_hex(3)}"


async def serve(settings: GatewayProcess) -> None:
    """Until SIGTERM, or until the platform is gone (its end of the lifeline closes)."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    # Before uvicorn takes these signals over: when it is done it raises them again, for whoever had them before, and
    # without a handler that would end the process before the journal is closed.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(settings.lifeline_fd, stop.set)
    boot = boot_id()
    journal = SegmentJournal(Path(settings.journal_dir), boot)
    gateway = Gateway(
        gateway=boot,
        region=settings.region,
        connect=connector(settings.control_address),
        journal=journal,
        clock=_WallClock(),
        admin_address=settings.admin_address,
        limits=settings.limits,
    )
    server = Server(gateway)
    gc.collect()
    gc.freeze()  # what lives for ever need not be looked at by every collection during a stream
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


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    settings = msgspec.json.decode(sys.argv[1], type=GatewayProcess)
    try:
        uvloop.run(serve(settings))
    except Fault as fault:
        sys.exit(f"gateway: {fault.reason}")


if __name__ == "__main__":
    main()
