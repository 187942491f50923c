"""The `up` process: control, node and billing on one loop; the gateway as a child process, engines as its children.

It starts in the order in which parts need each other and ends in the reverse: first no new requests, then no engines,
then the last usage records into the ledger. A part that ends by itself ends the platform: nothing runs half.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tidegate import demo_models
from tidegate.assemble import garbage
from tidegate.assemble.clock import SteadyClock
from tidegate.assemble.credentials import DEMO_TENANT, Credentials, ensure, write_private
from tidegate.assemble.declared import apply_endpoints, set_prices
from tidegate.assemble.folders import Folders
from tidegate.assemble.ground import Ground, prepare
from tidegate.assemble.machine import Machine
from tidegate.assemble.services import Services, build
from tidegate.assemble.settings import demo_endpoints
from tidegate.assemble.sockets import StartError, public_url
from tidegate.config import Config
from tidegate.control.service import Control
from tidegate.domain.endpoint import EndpointState, Mode
from tidegate.domain.errors import Fault

OnReady = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)

READY_FILE = "ready.json"
READY_S_MAX = 30.0
FIRST_MODEL_S_MAX = 10.0  # a large model takes minutes: the platform does not wait for it to say that it is there
FIRST_MODELS_S_MAX = 2.0  # nor for all of many
FIRST_MODEL_POLL_S = 0.02
COMING = (EndpointState.CREATING, EndpointState.LOADING)


async def serve(
    config: Config,
    folders: Folders,
    machine: Machine,
    listener: socket.socket,
    ready_file: Path | None,
    on_ready: OnReady,
    stop: asyncio.Event,
) -> None:
    """Everything but the first steps, which `start` has made. Raises as `start.run_platform`."""
    async with AsyncExitStack() as stack:
        ground = prepare(config, folders, stack)
        clock = SteadyClock()
        await asyncio.to_thread(set_prices, ground.prices, config, clock.now_ms())
        credentials = await asyncio.to_thread(ensure, ground.state, config, ground.data, clock.now_ms())
        services = await build(config, ground, machine, listener, clock)
        garbage.tune()
        try:
            starting = asyncio.create_task(
                _announce(
                    config, ground, services, credentials, public_url(listener, config.host), ready_file, on_ready
                )
            )
            await _until_stopped(services, starting, stop, ground)
        finally:
            for path in (ground.data / READY_FILE, ready_file):
                if path is not None:
                    path.unlink(missing_ok=True)
            await services.close()


async def _until_stopped(services: Services, starting: asyncio.Task[None], stop: asyncio.Event, ground: Ground) -> None:
    """Runs every part until a signal. A part that ends, or a start that fails, is raised."""
    stopping = asyncio.create_task(stop.wait())
    parts = services.start()
    waiting: set[asyncio.Task[Any]] = {stopping, starting, *parts}
    try:
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is stopping:
                    return
                if task is starting:
                    task.result()
                    continue
                raise _ended(task, ground)
    finally:
        for task in (stopping, starting):
            task.cancel()


def _ended(part: asyncio.Task[None], ground: Ground) -> Fault:
    cause = None if part.cancelled() else part.exception()
    log.error("%s ended by itself", part.get_name(), exc_info=cause)
    why = cause.reason if isinstance(cause, Fault) else "see " + str(ground.log_file)
    return Fault(f"the platform stopped because its {part.get_name()} ended: {why}")


async def _announce(
    config: Config,
    ground: Ground,
    services: Services,
    credentials: Credentials,
    url: str,
    ready_file: Path | None,
    on_ready: OnReady,
) -> None:
    """Applies what is declared, waits until a first question would be answered, then says so to files and people."""
    try:
        async with asyncio.timeout(READY_S_MAX):
            await services.control.until_ready(gateways=1)
    except TimeoutError:
        why = f"the gateway said: {services.last_gateway_line}"
        raise StartError(f"not ready after {READY_S_MAX:.0f} s ({why}); see {ground.logs}") from None
    wanted = list(config.endpoints)
    if credentials.demo_is_new:
        # In the order in which they are listed: so the one that a person is shown first is loaded first.
        wanted += demo_endpoints(services.node, demo_models.path, tuple(sorted(demo_models.NAMES)), DEMO_TENANT)
    for endpoint, reason in await apply_endpoints(services.control, wanted):
        log.warning("endpoint %s is refused: %s", endpoint, reason)
    await _first_models(services.control)
    tenant = next(iter(credentials.api_keys), "")
    ready = {
        "base_url": url,
        "admin_key": credentials.admin_key,
        "api_key": credentials.api_keys.get(tenant, ""),
        "endpoints": sorted(d.endpoint for d in services.control.desired.state.deployments),
    }
    text = json.dumps(ready, indent=2) + "\n"
    for path in (ground.data / READY_FILE, ready_file):
        if path is not None:
            await asyncio.to_thread(write_private, path, text)
    on_ready(ready)


async def _first_models(control: Control) -> None:
    """Returns once every endpoint has been loaded once, or will not be: until then a question may wait for the load of
    another model. At most `FIRST_MODELS_S_MAX` after the first one is ready, and `FIRST_MODEL_S_MAX` in any case.
    """
    ours = [d for d in control.desired.state.deployments if d.engine != "remote" and d.mode is not Mode.BATCH]
    names = [deployment.endpoint for deployment in ours if not deployment.base]
    now = asyncio.get_running_loop().time
    due, first = now() + FIRST_MODEL_S_MAX, False
    while now() < due:
        routes = [control.loop.route(name) for name in names]
        if all(route is not None and route.state not in COMING for route in routes):
            return
        if not first and any(route is not None and route.targets for route in routes):
            due, first = min(due, now() + FIRST_MODELS_S_MAX), True
        await asyncio.sleep(FIRST_MODEL_POLL_S)
