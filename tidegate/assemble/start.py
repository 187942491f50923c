"""The first steps of `up`: the port, the data directory, and the engine template, whose imports take longest of all.

So nothing heavy is imported here before the template runs: SQL and the web framework are loaded while it loads torch.
"""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tidegate.assemble.folders import take
from tidegate.assemble.machine import machine_of
from tidegate.assemble.sockets import listen_tcp
from tidegate.config import Config


async def run_platform(
    config: Config,
    ready_file: Path | None,
    on_ready: Callable[[dict[str, Any]], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or `stop`; returns once everything it started is gone.

    Raises StartError when it cannot start here, Fault when the outside fails at start or a part ends by itself.
    """
    stop = stop or asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listener = listen_tcp(config.host, config.port)
    async with AsyncExitStack() as stack:
        stack.callback(listener.close)
        folders = take(config, stack, log_name="platform.log")
        machine = machine_of(config, folders.run, folders.logs)
        stack.callback(machine.logs.close)
        stack.callback(machine.lifeline.close)
        stack.push_async_callback(machine.driver.close)
        machine.driver.open()
        await asyncio.sleep(0)  # the template's process is started in this turn of the loop, not after the imports
        from tidegate.assemble.platform import serve

        await serve(config, folders, machine, listener, ready_file, on_ready, stop)
