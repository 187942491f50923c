"""Serving a gateway on its public port: uvicorn, uvloop, our front."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from tidegate.gateway.app import Gateway
from tidegate.gateway.front import Front, front_class
from tidegate.gateway.websocket import WebSocket, websocket_class

SWEEP_MS = 1_000


class _Uvicorn(uvicorn.Server):
    on_ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_ready is not None:
            self.on_ready()


class Server:
    """One gateway on one listening socket. `serve` returns after SIGINT, SIGTERM or `stop`."""

    def __init__(self, gateway: Gateway) -> None:
        limits = gateway.limits
        config = uvicorn.Config(
            gateway.asgi,
            http=front_class(limits),
            ws=websocket_class(limits),
            ws_max_size=limits.session_event_bytes_max,
            ws_per_message_deflate=False,  # a small message must not become a large one
            lifespan="on",
            interface="asgi3",  # a bound method: uvicorn would take it for ASGI 2
            proxy_headers=False,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=limits.keep_alive_ms_max // 1000,
            timeout_graceful_shutdown=limits.shutdown_ms_max // 1000,
        )
        self._server = _Uvicorn(config)

    def stop(self) -> None:
        """Takes no new work; what runs has `shutdown_ms_max` to finish."""
        self._server.should_exit = True

    async def serve(self, listener: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
        """Serves until stopped. `on_ready` is called once the port answers."""
        self._server.on_ready = on_ready
        sweeper = asyncio.create_task(self._sweep())
        try:
            await self._server.serve(sockets=[listener])
        finally:
            sweeper.cancel()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_MS / 1000)
            now = loop.time()
            for connection in list(self._server.server_state.connections):
                if isinstance(connection, Front | WebSocket):
                    connection.sweep(now)
