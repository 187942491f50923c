"""The gateway: its ASGI application (bare, no framework), its routes, and the tasks behind them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from tidegate.domain.errors import EngineFault, Refusal
from tidegate.domain.ports import Clock, Connect, Journal
from tidegate.gateway.cycle import Cycle
from tidegate.gateway.front import PEER, Peer
from tidegate.gateway.gatekeeper import Gatekeeper
from tidegate.gateway.intake import ClientGone, Head, check_size, from_here, new_request_id, read_body, read_head
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.loop import GatewayLoop
from tidegate.gateway.metrics import Family, Metrics, per_endpoint
from tidegate.gateway.passthrough import pass_through
from tidegate.gateway.realtime import Sessions
from tidegate.gateway.relay import Parts, Relay
from tidegate.gateway.replies import Header, Receive, Scope, Send, reply, reply_json, reply_refusal
from tidegate.gateway.translate import DIALECTS, Behind, Dialect, Translated, bearer
from tidegate.gateway.upstream import Dial, Pool
from tidegate.quota import admission, routing
from tidegate.wire.batch import FILE_BYTES_MAX
from tidegate.wire.internal import EndpointEntry

log = logging.getLogger(__name__)

APIS = {f"/v1/{api}": api for api in admission.KINDS}
MODELS = "/v1/models"
# The control plane answers them: nothing there is on a request's path.
BATCH_APIS = ("/v1/files", "/v1/batches", "/v1/predictions")
UPLOAD_BYTES_MAX = FILE_BYTES_MAX + (64 << 10)  # with what a form says around the file
_TEXT: Header = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_encode = msgspec.json.Encoder().encode

Handler = Callable[[Scope, Receive, Send, str], Awaitable[None]]


class Gateway:
    """`asgi` is the application; its lifespan starts and stops the link to control and the sweep. `gateway` is a boot
    id, new at each start. Serve it with `server.Server`, or under any ASGI server.
    """

    def __init__(
        self,
        *,
        gateway: str,
        region: str,
        connect: Connect,
        journal: Journal,
        clock: Clock,
        admin_address: str,
        limits: GatewayLimits | None = None,
        dial: Dial | None = None,
    ) -> None:
        self.limits = limits or GatewayLimits()
        self._admin_address = admin_address
        self._clock = clock
        self._journal = journal
        metrics = Metrics()
        self._loop = GatewayLoop(gateway, region, connect, clock, self.limits, metrics)
        pool = Pool(self.limits.idle_connections_max, self.limits.engine_connect_ms_max, dial)
        self._parts = Parts(gateway, region, self._loop, pool, journal, clock, self.limits, metrics, set())
        self._loop.take_back = self._take_back
        self._gatekeeper = Gatekeeper(self._loop, journal, self.limits)
        self._sessions = Sessions(self._parts, self._gatekeeper)
        self._tasks: list[asyncio.Task[None]] = []
        self._handlers: dict[str, Handler] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            MODELS: self._models,
        }

    @property
    def parts(self) -> Parts:
        """What its relays share; tests look here for what was left behind."""
        return self._parts

    @property
    def ready(self) -> bool:
        return self._loop.informed and self._journal.healthy

    # --- ASGI ---------------------------------------------------------------------------------------------------------

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            api = APIS.get(scope["path"])
            if api is not None:
                await self._inference(api, scope, receive, send)
            elif (dialect := DIALECTS.get(scope["path"])) is not None:
                await self._inference(dialect[0], scope, receive, send, dialect[1])
            else:
                await self._other(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._sessions.serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.start()
                # A gateway that comes back lets its clients wait in the listener's backlog for these moments.
                await self._loop.hear(self.limits.first_word_ms_max)
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def start(self) -> None:
        """Starts the link to control and the sweep on the running event loop."""
        self._tasks = [asyncio.create_task(self._loop.run()), asyncio.create_task(self._sweep())]
        for task in self._tasks:
            task.add_done_callback(_log_end)

    async def stop(self) -> None:
        """Ends what `start` began and closes every connection to an engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._parts.pool.close()

    def _take_back(self, replica: str) -> None:
        for relay in list(self._parts.relays):
            relay.take_back(replica)

    async def _sweep(self) -> None:
        """One timer for all streams: checkpoints, silent engines, idle connections."""
        while True:
            await asyncio.sleep(self.limits.checkpoint_ms / 1000)
            now_ms = self._clock.now_ms()
            for relay in list(self._parts.relays):
                relay.sweep(now_ms)
            self._sessions.sweep(now_ms)
            self._loop.sweep()
            self._parts.pool.sweep(now_ms, self.limits.idle_connection_ms_max)

    # --- inference ----------------------------------------------------------------------------------------------------

    async def _inference(
        self, api: str, scope: Scope, receive: Receive, send: Send, speak: Callable[[str, int], Dialect] | None = None
    ) -> None:
        """`speak` makes what translates a request of another dialect into one of `api`, and its answer back."""
        arrived_ms = self._clock.now_ms()
        request_id = new_request_id()
        peer: Peer | Cycle | None = scope.pop(PEER, None)
        watcher: asyncio.Task[None] | None = None
        dialect = speak(request_id, arrived_ms // 1000) if speak is not None else None
        if dialect is not None:
            send = Translated(dialect, send).send
            scope["headers"] = bearer(scope["headers"])
        try:
            head = self._read_head(api, scope)
            key = self._gatekeeper.authenticate(head, arrived_ms)
            body = peer.take_body() if isinstance(peer, Cycle) else None
            if body is None:
                body = await read_body(receive, head, self.limits)
            if dialect is not None:
                check_size(body, self.limits.body_bytes_max)
                body = dialect.request(body)
            call = self._gatekeeper.admit(api, head, key, body, request_id, arrived_ms)
        except Refusal as refusal:
            await self._refuse(send, refusal, request_id)
            return
        except ClientGone:
            return
        if peer is None:
            peer = Peer()
            watcher = asyncio.create_task(_watch(receive, peer))
        if dialect is not None:
            peer = Behind(peer)
        try:
            await Relay(call, self._parts, send, peer).run()
        finally:
            if watcher is not None:
                watcher.cancel()

    def _read_head(self, api: str, scope: Scope) -> Head:
        if scope["method"] != "POST":
            raise Refusal("method_not_allowed", f"/v1/{api} answers POST only")
        return read_head(scope)

    async def _refuse(self, send: Send, refusal: Refusal, request_id: str) -> None:
        self._parts.metrics.refused(refusal.code)
        await reply_refusal(send, refusal, [(b"x-request-id", request_id.encode())])

    # --- everything else ----------------------------------------------------------------------------------------------

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        request_id = new_request_id()
        handler = self._handlers.get(path) or (self._models if path.startswith(MODELS + "/") else None)
        try:
            if handler is not None:
                if scope["method"] not in ("GET", "HEAD"):
                    raise Refusal("method_not_allowed", f"{path[:100]} answers GET only")
                await handler(scope, receive, send, request_id)
            elif (path == "/v1" or path.startswith("/v1/")) and not path.startswith(BATCH_APIS):
                missing = f"there is no {scope['method']} {path[:100]}"
                raise Refusal("not_found", f"{missing}; a base URL ends in /v1, once: POST /v1/chat/completions")
            else:
                if path.startswith(BATCH_APIS):
                    self._check_upload(scope)
                await pass_through(self._parts.pool, self._admin_address, scope, receive, send, request_id)
        except Refusal as refusal:
            await self._refuse(send, refusal, request_id)

    def _check_upload(self, scope: Scope) -> None:
        """Before 200 MB are on their way: is the key good, can the size be? The control plane looks again."""
        head = read_head(scope)
        self._gatekeeper.authenticate(head, self._clock.now_ms())
        if head.content_length > UPLOAD_BYTES_MAX:
            message = f"the file is over the limit of {FILE_BYTES_MAX >> 20} MB for a batch input file"
            raise Refusal("body_too_large", message, param="file")

    async def _models(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        key = self._gatekeeper.authenticate(read_head(scope), self._clock.now_ms())
        name = scope["path"][len(MODELS) + 1 :]
        endpoints = self._loop.endpoints
        headers = [(b"x-request-id", request_id.encode())]
        if name:
            entry = endpoints.get(name) if key.tenant is None else routing.resolve(endpoints, key.tenant, name)
            if entry is None:
                raise Refusal("model_not_found", f"no such model: {name[:200]}", param="model")
            await reply_json(send, _encode(_model(entry)), headers)
            return
        found = [entry for entry in routing.visible(endpoints.values(), key.tenant) if not entry.serves]
        await reply_json(send, _encode({"object": "list", "data": [_model(entry) for entry in found]}), headers)

    async def _healthz(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        await reply_json(send, b'{"status":"ok"}', [(b"x-request-id", request_id.encode())])

    async def _readyz(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._gatekeeper.check_informed()
        self._gatekeeper.check_journal()
        body = b'{"status":"ready","control":%b}' % (b"true" if self._loop.connected else b"false")
        await reply_json(send, body, [(b"x-request-id", request_id.encode())])

    async def _metrics(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """The gateway's own metrics, and control's behind them while it answers: one scrape for all. They name every
        tenant's endpoints, so they are for the operator: whoever is on this machine, or has the admin key.
        """
        if not from_here(scope):
            admission.check_operator(self._gatekeeper.authenticate(read_head(scope), self._clock.now_ms()))
        text = self._parts.metrics.text(self._gauges()).encode()
        try:
            async with asyncio.timeout(self.limits.admin_metrics_ms_max / 1000):
                text += await self._admin_metrics()
        except (EngineFault, TimeoutError):
            log.debug("control's metrics are left out: it does not answer")
        await reply(send, 200, text, [_TEXT, (b"x-request-id", request_id.encode())])

    async def _admin_metrics(self) -> bytes:
        connection = await self._parts.pool.connect(self._admin_address)
        try:
            connection.start(b"GET /metrics HTTP/1.1\r\nhost: admin\r\n\r\n")
            status = await connection.head()
            text = await connection.read_all(self.limits.answer_bytes_max)
            return text if status == 200 else b""
        finally:
            connection.release()

    def _gauges(self) -> list[Family]:
        loop, names = self._loop, self._loop.endpoints
        held = per_endpoint((name, loop.held_at(name)) for name in names)
        in_flight = per_endpoint((name, loop.in_flight_at(name)) for name in names)
        sessions = per_endpoint(self._sessions.at().items())
        link, journal = int(loop.connected), int(self._journal.healthy)
        return [
            ("tidegate_held_requests", "gauge", "Requests waiting for capacity.", held),
            ("tidegate_in_flight_requests", "gauge", "Requests on a replica.", in_flight),
            ("tidegate_realtime_sessions", "gauge", "Open WebSocket sessions.", sessions),
            ("tidegate_control_link", "gauge", "1 while the link to control is up.", [("", link)]),
            ("tidegate_journal_healthy", "gauge", "1 while the usage journal can be written.", [("", journal)]),
        ]


def _model(entry: EndpointEntry) -> dict[str, object]:
    """OpenAI's model object; `max_model_len` is vLLM's."""
    return {
        "id": entry.endpoint,
        "object": "model",
        "created": entry.created_ms // 1000,
        "owned_by": entry.tenant,
        "max_model_len": entry.context_tokens_max,
        "kind": entry.kind.value,
        "mode": entry.mode.value,
    }


async def _watch(receive: Receive, peer: Peer) -> None:
    """For servers other than our front: waits for the end of the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
    peer.lose()


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        log.critical("a task of the gateway ended: %s", type(bug).__name__, exc_info=bug)
