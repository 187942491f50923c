"""uvicorn on a socket that is already listening, with the platform (not uvicorn) deciding when it ends."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

HEADER_BYTES_MAX = 64 << 10


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would take over SIGINT and SIGTERM; the process that holds it ends its parts in an order of its own.
        yield


class Server:
    """Serves `app` until `stop`. Requests in flight get `drain_s_max` seconds to finish."""

    def __init__(self, app: Any, listener: socket.socket, *, drain_s_max: int) -> None:
        self._listener = listener
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=drain_s_max,
            timeout_keep_alive=75,
            h11_max_incomplete_event_size=HEADER_BYTES_MAX,
        )
        self._server = _Server(config)
        self._stopping = False

    async def run(self) -> None:
        """Returns after `stop`, once nothing is in flight; RuntimeError when the app could not start."""
        await self._server.serve(sockets=[self._listener])
        if not self._stopping:
            raise RuntimeError("the server ended by itself")

    async def started(self) -> None:
        """Returns once connections are taken."""
        await self._server.up.wait()

    def stop(self) -> None:
        self._stopping = True
        self._server.should_exit = True
