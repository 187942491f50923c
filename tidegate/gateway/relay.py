"""One admitted request, from its arrival in the waiting room to its usage record.

The line is straight: place (grant, or hold until one) → exchange with the engine → answer → record, durable → the last
bytes. An engine that did not serve it before the first byte is replaced once; after that byte an error is an event.
Every way out leaves exactly one record.
"""

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass

from tidegate.dispatch import Grant, served_tokens
from tidegate.dispatch.service import UNAVAILABLE, within
from tidegate.domain.errors import EngineFault, Refusal, StoreFault
from tidegate.domain.ports import Clock, Journal
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.gateway.cycle import Cycle
from tidegate.gateway.events import Meter, NumberedEvents, Tokens
from tidegate.gateway.exchange import Exchange, NotServed
from tidegate.gateway.front import Peer
from tidegate.gateway.intake import Call, ClientGone
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.loop import Answer, Waiting
from tidegate.gateway.metering import meter_of, usage_of
from tidegate.gateway.metrics import Metrics
from tidegate.gateway.place import Room
from tidegate.gateway.refusals import code_of_answer, refusal_of
from tidegate.gateway.replies import JSON, STREAM_HEADERS, Header, Send, reply, reply_refusal
from tidegate.gateway.upstream import Pool
from tidegate.wire import openai

log = logging.getLogger(__name__)

# From an endpoint that only helps out, these are about its own key, limits or model: the request goes home.
NOT_THE_CLIENTS = frozenset({401, 402, 403, 404, 408, 429})
BYTES_PER_TOKEN = 4  # of a request, envelope included: an estimate for the turn between tenants, never for a bill


@dataclass(frozen=True, slots=True)
class Parts:
    """What every relay of a gateway shares. `relays` are the live ones, for the sweep."""

    gateway: str
    region: str
    room: Room
    pool: Pool
    journal: Journal
    clock: Clock
    limits: GatewayLimits
    metrics: Metrics
    relays: "set[Relay]"


class Relay:
    __slots__ = (
        "_call", "_called", "_checkpointed", "_exchange", "_first_ms", "_gone", "_grant", "_head_sent", "_held_ms",
        "_left", "_meter", "_metrics", "_parts", "_peer", "_recorded", "_send", "_tokens",
    )  # fmt: skip

    def __init__(self, call: Call, parts: Parts, send: Send, peer: Peer | Cycle) -> None:
        self._call = call
        self._called = call.entry
        self._parts = parts
        self._metrics = parts.metrics.endpoint(call.entry.endpoint)
        self._send = send
        self._peer = peer
        self._gone = peer.lost
        self._grant: Grant | None = None
        self._held_ms = 0
        self._exchange = Exchange(call, parts.pool, parts.limits)
        self._meter: Meter | None = None
        self._tokens = Tokens()
        self._head_sent = False
        self._recorded = False
        self._left = False
        self._first_ms = 0
        self._checkpointed = 0

    async def run(self) -> None:
        """Answers the client and leaves the record. Raises only bugs and cancellation."""
        parts = self._parts
        parts.relays.add(self)
        self._peer.on_lost = self.abort
        try:
            await self._serve()
        except ClientGone:
            await self._record_quietly(Outcome.CLIENT_ABORTED)
        except EngineFault as fault:
            await self._fail(Refusal("engine_error", f"the engine failed: {fault.reason}"), Outcome.ENGINE_LOST)
        except StoreFault:
            await self._tell(Refusal("journal_unavailable", "the usage journal cannot be written"))
        except asyncio.CancelledError:
            # Only the server cancels, when it stops: the last thing this task does is to say so.
            await self._tell(Refusal("not_ready", "the gateway is stopping; send the request again"))
        except Refusal as refusal:
            lost = refusal.code == "engine_error"
            await self._fail(refusal, Outcome.ENGINE_LOST if lost else Outcome.REFUSED)
        finally:
            self._peer.on_lost = None
            parts.relays.discard(self)
            self._exchange.release()
            self._leave()
            if not self._recorded:  # cancelled: the gateway stops; nobody waits for the disk, its thread writes it
                _watch_append(self._append(Outcome.GATEWAY_LOST))

    def abort(self) -> None:
        """The client is gone: the engine stops generating for it at once."""
        self._gone = True
        if not self._recorded:
            self._exchange.give_up("the client is gone")
        self._leave()

    def take_back(self, replica: str) -> None:
        """Its accelerator is wanted by others: what `replica` does for it ends at once, and it waits again."""
        if self._grant is not None and self._grant.target.replica == replica and not self._left:
            self._exchange.give_up("its accelerator is wanted by others")

    @property
    def tokens(self) -> Tokens:
        """What has been counted so far; once it has run, what its record says."""
        return self._meter.tokens() if self._meter is not None else self._tokens

    def _leave(self) -> None:
        """Gives up the place in the waiting room, or on the replica."""
        if not self._left:
            self._left = True
            tokens = self.tokens
            self._parts.room.ended(self._call.id, self._first_ms, served_tokens(tokens.input, tokens.output))

    # --- place --------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        call = self._call
        answer = self._parts.room.arrive(
            call.id, call.entry, call.arrived_ms, call.wait_ms, call.tenant, len(call.body) // BYTES_PER_TOKEN
        )
        while True:
            grant = self._place(await self._hold(answer) if isinstance(answer, asyncio.Future) else answer)
            try:
                status, first = await self._exchange.begin(grant.target.address)
            except NotServed as why:
                if self._gone:
                    raise ClientGone from None
                answer = self._return(grant, why.lost)
                continue
            if grant.reason and (status in NOT_THE_CLIENTS or status >= 500):
                answer = self._return(grant, status >= 500)
                continue
            break
        if self._gone:
            raise ClientGone
        self._first_ms = self._parts.clock.now_ms()
        self._metrics.ttft.observe(self._first_ms - call.arrived_ms)
        call.body = b""
        if status != 200:
            await self._pass_refusal(status, first)
        elif call.stream:
            await self._stream(first)
        else:
            await self._answer(first)

    def _place(self, decided: Answer | None) -> Grant:
        if self._gone or decided is None:
            raise ClientGone
        self._held_ms = decided.held_ms
        if not isinstance(decided, Grant):
            call = self._call
            call.entry = self._called
            if decided.code == "residency_denied":
                self._parts.metrics.residency_denied(call.entry.endpoint)
            raise refusal_of(decided, call.entry)
        self._grant = decided
        self._metrics.hold.observe(decided.held_ms)
        self._serve_by(decided)
        return decided

    def _return(self, grant: Grant, lost: bool) -> Answer | Waiting:
        """Its target did not serve it. What was only helping out is forgotten: a head sent from here on is home's."""
        if grant.reason:
            self._grant, self._call.entry = None, self._called
        return self._parts.room.returned(self._call.id, lost)

    def _serve_by(self, grant: Grant) -> None:
        """The endpoint that serves it decides how it is counted, rated and called: from here on it is the call's."""
        call, called = self._call, self._called
        served = self._parts.room.endpoints.get(grant.endpoint) if grant.reason else called
        if served is None:  # removed in the instant between the decision and this line
            raise Refusal("model_not_found", f"no such model: {called.endpoint}", param="model")
        call.entry = served
        if self._overflowed:
            self._parts.metrics.overflowed(called.endpoint, served.endpoint, grant.reason)

    async def _hold(self, waiter: Waiting) -> Answer | None:
        """Waits. A stream is kept open: after a quiet while its head is sent, then comments that clients ignore."""
        limits = self._parts.limits
        if not self._call.stream:
            return await waiter
        quiet_ms = limits.hold_quiet_ms_max
        while not waiter.done():
            await asyncio.wait((waiter,), timeout=quiet_ms / 1000)
            if waiter.done():
                break
            await self._send_stream_head()
            await self._send({"type": "http.response.body", "body": openai.sse_comment("waiting"), "more_body": True})
            quiet_ms = limits.hold_comment_ms
        return waiter.result()

    # --- answer -------------------------------------------------------------------------------------------------------

    async def _stream(self, first: bytes) -> None:
        meter = self._meter = self._new_meter()
        await self._send_stream_head()
        send, piece = self._send, first
        while piece and not meter.done:
            events = meter.pass_on(piece)
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
                # Without back-pressure `send` never waits, so a client that is gone here was gone before the write.
                if self._gone:
                    raise ClientGone
                meter.sent(events)
            if meter.done:
                break
            try:
                piece = await self._exchange.read()
            except EngineFault:
                if self._gone:
                    raise ClientGone from None
                raise
            if self._gone:
                raise ClientGone
        if not meter.done:
            raise EngineFault("it ended the stream early")
        self._leave()
        await self._append(Outcome.COMPLETED)
        await send({"type": "http.response.body", "body": openai.SSE_DONE, "more_body": False})

    def _new_meter(self) -> Meter:
        bytes_max = self._parts.limits.event_bytes_max
        if self._call.entry.metering != "sse_id":
            return meter_of(self._call, bytes_max)
        return NumberedEvents(
            self._exchange.number(b"x-tidegate-prompt-tokens"),
            self._exchange.number(b"x-tidegate-cached-tokens"),
            bytes_max,
        )

    async def _answer(self, body: bytes) -> None:
        try:
            self._tokens = usage_of(body)
        except EngineFault as fault:
            raise Refusal("engine_error", fault.reason) from fault
        self._leave()
        await self._append(Outcome.COMPLETED)
        headers = [*self._headers(), JSON]
        if isinstance(self._peer, Cycle):
            self._peer.answer(200, headers, body)
        else:
            await reply(self._send, 200, body, headers)

    async def _pass_refusal(self, status: int, body: bytes) -> None:
        """What the engine refused is passed on as it is: it knows the model, and answers in OpenAI's shape."""
        if refusal := self._exchange.refusal(status, self._parts.clock.now_ms()):
            raise refusal
        if status >= 500 or status < 400:
            raise Refusal("engine_error", f"the engine answered with status {status}")
        code, message = code_of_answer(body)
        if self._head_sent:
            raise Refusal(code, message)
        self._parts.metrics.refused(code)
        await self._append(Outcome.REFUSED, code)
        await reply(self._send, status, body, [*self._headers(), JSON])

    # --- ends ---------------------------------------------------------------------------------------------------------

    async def _fail(self, refusal: Refusal, outcome: Outcome) -> None:
        self._parts.metrics.refused(refusal.code)
        await self._record_quietly(outcome, refusal.code)
        await self._tell(refusal)

    async def _tell(self, refusal: Refusal) -> None:
        """Tells the client: with a status if that is still possible, else with an event at the end of its stream."""
        if not self._head_sent:
            await reply_refusal(self._send, refusal, self._headers())
            return
        await self._send({"type": "http.response.body", "body": openai.sse_error(refusal), "more_body": False})

    async def _record_quietly(self, outcome: Outcome, refusal: str = "") -> None:
        """For ends at which the client is told something else, or nothing: a lost record is an operator's matter."""
        try:
            await self._append(outcome, refusal)
        except StoreFault as fault:
            log.error("the record of %s (%s) is lost: %s", self._call.id, outcome, fault.reason)

    def _append(self, outcome: Outcome, refusal: str = "") -> Awaitable[None]:
        """Resolves once the record is on disk. StoreFault when it cannot be."""
        assert not self._recorded, "one record a request"
        self._recorded = True
        record = self._usage_record(outcome, refusal)
        cell = self._metrics
        cell.outcomes[outcome] = cell.outcomes.get(outcome, 0) + 1
        match outcome:
            case Outcome.COMPLETED:
                cell.served += 1
                cell.attained += within(self._called.slo, record, streamed=self._call.stream)
            case Outcome.ENGINE_LOST:
                cell.failed += 1
            case Outcome.REFUSED:
                cell.failed += refusal in UNAVAILABLE
        self._parts.metrics.service_changed(self._called.endpoint)
        cell.input_tokens += record.input_tokens
        cell.output_tokens += record.output_tokens
        if self._call.hold is not None:
            self._parts.room.settled(self._call.hold, record)
        return self._parts.journal.append(record)

    def _usage_record(self, outcome: Outcome, refusal: str) -> UsageRecord:
        call, grant, tokens = self._call, self._grant, self.tokens
        return UsageRecord(
            # A line is billed once: tries that came to nothing leave its id to the one that does.
            id=call.line if call.line and outcome is Outcome.COMPLETED else call.id,
            gateway=self._parts.gateway,
            tenant=call.tenant,
            key=call.key,
            endpoint=call.entry.serves or call.entry.endpoint,
            model=call.entry.model,
            mode=call.entry.mode,
            region=grant.target.region if grant else self._parts.region,
            replica=grant.target.replica if grant else "",
            api=call.api,
            outcome=outcome,
            input_tokens=tokens.input,
            cached_tokens=tokens.cached,
            output_tokens=tokens.output,
            count_source=tokens.source,
            arrived_ms=call.arrived_ms,
            first_token_ms=self._first_ms,
            ended_ms=self._parts.clock.now_ms(),
            queue_ms=self._held_ms,
            activation_ms=grant.activation_ms if grant else 0,
            refusal=refusal,
            overflow_from=self._overflowed,
            overflow_reason=grant.reason if grant and self._overflowed else "",
        )

    @property
    def _overflowed(self) -> str:
        """The endpoint called, where another one serves. A canary's own endpoint standing in for it is no overflow."""
        called, served = self._called, self._call.entry
        name = called.serves or called.endpoint
        return name if self._grant and self._grant.reason and served.endpoint != name else ""

    # --- heads --------------------------------------------------------------------------------------------------------

    async def _send_stream_head(self) -> None:
        if not self._head_sent:
            self._head_sent = True
            headers = [*self._headers(), *STREAM_HEADERS]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    def _headers(self) -> list[Header]:
        call, grant = self._call, self._grant
        headers = [(b"x-request-id", call.id.encode()), (b"x-tidegate-mode", call.entry.mode.encode())]
        if call.hold is not None:
            headers += call.hold.headers
        if grant is None:
            headers.append((b"x-tidegate-region", self._parts.region.encode()))
            return headers
        headers += [
            (b"x-tidegate-region", grant.target.region.encode()),
            (b"x-tidegate-replica", grant.target.replica.encode()),
            (b"x-tidegate-queue-ms", b"%d" % grant.held_ms),
            (b"x-tidegate-activation-ms", b"%d" % grant.activation_ms),
        ]
        if self._overflowed:
            headers.append((b"x-tidegate-overflow", f"{call.entry.endpoint}; reason={grant.reason}".encode()))
        return headers

    # --- the sweep, about once a second -------------------------------------------------------------------------------

    def sweep(self, now_ms: int) -> None:
        """Leaves a checkpoint of a running stream, and gives up an engine that has said nothing for too long."""
        if self._recorded:
            return
        self._exchange.sweep(now_ms)
        output = self.tokens.output
        if output > self._checkpointed:
            self._checkpointed = output
            _watch_append(self._parts.journal.append(self._usage_record(Outcome.OPEN, "")))


def _watch_append(append: Awaitable[None]) -> None:
    """For records nobody waits for."""
    asyncio.ensure_future(append).add_done_callback(_log_fault)


def _log_fault(future: "asyncio.Future[None]") -> None:
    if not future.cancelled() and (fault := future.exception()) is not None:
        log.error("a usage record is lost: %s", fault)
