"""The engine's side of one request: sending it, what comes back, and how long the engine may say nothing."""

import logging
from datetime import UTC, datetime

from tidegate.domain.endpoint import Mode
from tidegate.domain.errors import EngineFault, Refusal
from tidegate.gateway import runtime_lora
from tidegate.gateway.intake import Call
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.metering import for_engine
from tidegate.gateway.remote import head_of, refusal_of_status
from tidegate.gateway.upstream import Connection, Pool

log = logging.getLogger(__name__)

SMALL_BODY_BYTES = 64 << 10  # below this, one write beats two

_HEAD = (
    b"POST /v1/%b HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
    b"x-request-id: %b\r\n%bcontent-length: %d\r\n\r\n"
)
_ADAPTER = b"x-tidegate-adapter"


class NotServed(Exception):
    """The engine did not serve the request, and the client has seen nothing. `lost`: it died, else it takes no work."""

    def __init__(self, lost: bool) -> None:
        super().__init__()
        self.lost = lost


class Exchange:
    """At most one connection at a time; `begin` may be called again after NotServed."""

    __slots__ = ("_call", "_connection", "_given_up", "_limits", "_pieces", "_pool", "_quiet_since_ms", "_swept_pieces")

    def __init__(self, call: Call, pool: Pool, limits: GatewayLimits) -> None:
        self._call = call
        self._pool = pool
        self._limits = limits
        self._connection: Connection | None = None
        self._given_up = ""
        self._pieces = 0
        self._swept_pieces = 0
        self._quiet_since_ms = 0

    async def begin(self, address: str, *, again: bool = False) -> tuple[int, bytes]:
        """The engine's status and the first it says: a piece of a stream, else its whole answer. NotServed when it died
        before that or takes no work.
        """
        self.release()
        self._given_up = ""
        pool, stream, entry = self._pool, self._call.stream, self._call.entry
        if runtime_lora.needs_loading(entry):
            await self._load_adapter(address)
        kept = pool.take(address)
        try:
            connection = kept or await pool.connect(address, self._call.entry.remote)
            self._send(connection)
            try:
                first = await connection.answer(stream, self._limits.answer_bytes_max)
            except EngineFault:
                # A kept connection may have been closed by the engine in the same instant, which says nothing about
                # the engine: then once more on a new one.
                if kept is None or connection.status or self._given_up:
                    raise
                connection = await pool.connect(address, self._call.entry.remote)
                self._send(connection)
                first = await connection.answer(stream, self._limits.answer_bytes_max)
        except EngineFault as fault:
            if self._call.entry.remote is not None:  # no supervisor of ours sees why
                log.warning("provider %s: %s", self._call.entry.remote.provider, fault.reason)
            raise NotServed(lost=True) from None
        status = connection.status
        if status == 404 and runtime_lora.needs_loading(entry) and not again:
            runtime_lora.forget(pool, address, entry)
            return await self.begin(address, again=True)
        if status == 503 and self._call.entry.remote is None:
            raise NotServed(lost=False)
        if stream and status == 200 and not first:
            raise NotServed(lost=True)
        if status == 200 and entry.adapter:
            self._check_adapter(connection, first)
        self._pieces += 1
        return status, first

    async def _load_adapter(self, address: str) -> None:
        try:
            await runtime_lora.load(self._pool, address, self._call.entry)
        except EngineFault:
            raise NotServed(lost=True) from None

    def _check_adapter(self, connection: Connection, first: bytes) -> None:
        """The answer names the adapter that made it: never another's, never the bare base's."""
        entry = self._call.entry
        if runtime_lora.needs_loading(entry):
            right = runtime_lora.made(first, entry)
        else:
            right = connection.headers.get(_ADAPTER) == entry.adapter.partition(" ")[0].encode()
        if not right:
            raise EngineFault("it answered without the adapter it was asked for")

    async def read(self) -> bytes:
        """The next piece of a stream, empty at its end. EngineFault when the engine is lost."""
        assert self._connection is not None
        piece = await self._connection.read()
        self._pieces += 1
        return piece

    def number(self, header: bytes) -> int:
        """A count from the head of the engine's answer; 0 when it is not there."""
        assert self._connection is not None
        value = self._connection.headers.get(header, b"")
        return int(value) if value.isdigit() else 0

    def refusal(self, status: int, now_ms: int) -> Refusal | None:
        """What a status means where it is a provider's matter and not the client's; None: the answer says it itself."""
        remote = self._call.entry.remote
        if remote is None or self._connection is None:
            return None
        retry_after = self._connection.headers.get(b"retry-after", b"")
        return refusal_of_status(remote.provider, status, retry_after, datetime.fromtimestamp(now_ms / 1000, UTC))

    def give_up(self, reason: str) -> None:
        """The engine is to stop at once. Whatever waits for it raises EngineFault or NotServed."""
        self._given_up = reason
        if self._connection is not None:
            self._connection.abort(reason)

    def release(self) -> None:
        """Gives the connection back to the pool, or closes it when the exchange is not whole."""
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    def sweep(self, now_ms: int) -> None:
        """Gives up an engine that has said nothing for too long while it was waited for."""
        connection = self._connection
        if connection is None or not connection.awaited:
            self._quiet_since_ms = 0
            return
        if self._pieces != self._swept_pieces or not self._quiet_since_ms:
            self._swept_pieces, self._quiet_since_ms = self._pieces, now_ms
            return
        limits = self._limits
        remote = self._call.entry.remote
        first_ms_max = remote.first_byte_ms_max if remote is not None else limits.engine_first_byte_ms_max
        silence_ms_max = limits.engine_silence_ms_max if self._pieces else first_ms_max
        if self._call.entry.mode is Mode.BATCH:
            silence_ms_max = limits.batch_silence_ms_max
        if now_ms - self._quiet_since_ms > silence_ms_max:
            self.give_up(f"it said nothing for {silence_ms_max} ms")

    def _send(self, connection: Connection) -> None:
        call = self._call
        self._connection = connection
        self._quiet_since_ms = 0
        if self._given_up:
            self.give_up(self._given_up)
        body = call.body if call.entry.metering == "sse_id" else for_engine(call)
        if call.entry.remote is not None:
            key = self._pool.keys.read(call.entry.remote.key)
            connection.start(head_of(call.entry.remote, key, call.api, call.id, len(body)) + body)
            return
        ours = call.entry.adapter and not runtime_lora.needs_loading(call.entry)
        adapter = b"%b: %b\r\n" % (_ADAPTER, call.entry.adapter.encode()) if ours else b""
        head = _HEAD % (call.api.encode(), call.id.encode(), adapter, len(body))
        if len(body) <= SMALL_BODY_BYTES:
            connection.start(head + body)
        else:
            connection.start(head)
            connection.write(body)
