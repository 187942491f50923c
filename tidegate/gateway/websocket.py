"""uvicorn's WebSocket protocol (on `websockets`, which does the framing) with the bounds a public port needs.

Silent clients are found by its pings, oversized messages by its parser; what it lacks is a bound on a handshake that is
none, and on a client that does not read what it is sent, whose session would keep its place on a replica for as long.
"""

import logging
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from tidegate.gateway.limits import GatewayLimits

# uvicorn notes every handshake with its query, and `websockets` each header: where a client may have put its key.
log = logging.getLogger(__name__)
log.setLevel(logging.WARNING)


class WebSocket(WebSocketsSansIOProtocol):
    """Instances are made by uvicorn; `limits` is set on a subclass by `websocket_class`."""

    limits = GatewayLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = log
        self.conn.logger, self.conn.debug = log, False
        # Instants of the loop's clock in seconds; 0 when nothing is left unread.
        self._began = self.loop.time()
        self._stalled_since = 0.0

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = 0.0
        super().resume_writing()

    def sweep(self, now: float) -> None:
        """Gives up a client that reads too slowly, or whose handshake came to nothing. `now` is the loop's clock."""
        stalled = self._stalled_since and now - self._stalled_since > self.limits.client_stall_ms_max / 1000
        if stalled or (not self.handshake_complete and now - self._began > self.limits.head_ms_max / 1000):
            self.transport.abort()


def websocket_class(limits: GatewayLimits) -> type[WebSocket]:
    """The protocol class for `uvicorn.Config(ws=...)`."""
    return type("WebSocket", (WebSocket,), {"limits": limits})
