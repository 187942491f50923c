"""One text session: its conversation, its place on a replica, and its responses, one at a time.

Each response is a request like any other: key, limits, relay, meter and one usage record are those of a chat
completion. One task of a session reads, one runs its response.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, assert_never

import msgspec

from tidegate.dispatch import Refuse
from tidegate.domain.errors import Refusal
from tidegate.gateway.front import Peer
from tidegate.gateway.gatekeeper import Gatekeeper
from tidegate.gateway.intake import Call, Head, new_request_id
from tidegate.gateway.loop import Answer as Placed
from tidegate.gateway.place import Place
from tidegate.gateway.refusals import refusal_of
from tidegate.gateway.relay import Parts, Relay
from tidegate.gateway.replies import Message, Receive, Send
from tidegate.wire import realtime
from tidegate.wire.internal import EndpointEntry
from tidegate.wire.openai import SSE_DATA, SSE_END
from tidegate.wire.realtime_answer import Answer, Said

log = logging.getLogger(__name__)

API = "chat/completions"
NORMAL, POLICY, BUG = 1000, 1008, 1011  # RFC 6455 7.4.1


@dataclass(frozen=True, slots=True)
class Opening:
    """A session that may be: `model` is what its client calls `entry`, `wait_ms` bounds the hold of its place.
    `subprotocol` is what it offered and must hear again: browsers end a connection whose offer is not answered.
    """

    id: str
    tenant: str
    head: Head
    model: str
    entry: EndpointEntry
    wait_ms: int
    subprotocol: str | None


class Session:
    def __init__(self, parts: Parts, gatekeeper: Gatekeeper, opening: Opening, receive: Receive, send: Send) -> None:
        self.entry = opening.entry
        self.tenant = opening.tenant
        self._parts = parts
        self._gatekeeper = gatekeeper
        self._head = opening.head
        self._wait_ms = opening.wait_ms
        self._subprotocol = opening.subprotocol
        self._id = opening.id
        self._receive, self._send = receive, send
        tail = opening.id.removeprefix("req-")
        self._conversation = realtime.Conversation(tail, opening.model, parts.limits.session_bytes_max)
        self._place = Place(opening.id, parts.room, self._no_place)
        self._opened_ms = self._active_ms = self._parts.clock.now_ms()
        self._events = 0
        self._response: asyncio.Task[None] | None = None
        self._response_id = ""
        self._peer = Peer()
        self._closing: asyncio.Future[tuple[int, str, str]] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until the client leaves, or the gateway ends it. Raises only bugs and cancellation."""
        headers = [(b"x-request-id", self._id.encode())]
        await self._send({"type": "websocket.accept", "headers": headers, "subprotocol": self._subprotocol})
        try:
            await self._say([("session.created", {"session": self._shown()})])
            self._place.take(self.entry, self._opened_ms, self._wait_ms, self.tenant)
            await self._read()
        finally:
            await self._stop_response()
            self._place.leave()

    async def _stop_response(self) -> None:
        self._peer.lose()
        if self._response is not None:
            await asyncio.wait({self._response})

    async def _read(self) -> None:
        while not self._closing.done():
            reading = asyncio.ensure_future(self._receive())
            both: set[asyncio.Future[Any]] = {reading, self._closing}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not reading.done():
                    reading.cancel()
            if not reading.done() or reading.cancelled():
                break
            message = reading.result()
            if message["type"] == "websocket.disconnect":
                return
            if message["type"] == "websocket.receive":
                self._active_ms = self._parts.clock.now_ms()
                await self._hear(message)
        await self._stop_response()
        status, code, why = self._closing.result()
        said = {"type": "invalid_request_error", "code": code, "message": why, "param": None, "event_id": None}
        await self._say([("error", {"error": said})])
        await self._tell({"type": "websocket.close", "code": status, "reason": code})

    def sweep(self, now_ms: int) -> None:
        """Ends what is idle, too old, or may no longer be."""
        limits = self._parts.limits
        if self._response is not None:
            self._active_ms = now_ms
        if now_ms - self._opened_ms >= limits.session_ms_max:
            self._close(NORMAL, "session_expired", f"a session lasts {limits.session_ms_max // 1000} s at most")
        elif now_ms - self._active_ms >= limits.session_idle_ms_max:
            self._close(NORMAL, "session_idle", f"nothing was asked for {limits.session_idle_ms_max // 1000} s")
        else:
            try:
                self._gatekeeper.authenticate(self._head, now_ms)
                self._current()
            except Refusal as refusal:
                self._close(POLICY, refusal.code, refusal.message)

    def _close(self, status: int, code: str, why: str) -> None:
        """`run` ends it, saying so."""
        if not self._closing.done():
            self._closing.set_result((status, code, why))

    # --- what the client says -----------------------------------------------------------------------------------------

    async def _hear(self, message: Message) -> None:
        about: str | None = None
        try:
            try:
                raw = msgspec.json.decode(message.get("text") or message.get("bytes") or b"")
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise Refusal("invalid_json", "the message is not valid JSON") from None
            about = realtime.event_id(raw)
            await self._say(self._do(realtime.parse(raw)))
        except Refusal as refusal:
            await self._say([("error", realtime.error(refusal, about))])

    def _do(self, event: realtime.ClientEvent) -> Iterable[Said]:
        """What is answered at once."""
        conversation = self._conversation
        match event:
            case realtime.SessionUpdate(session=options):
                conversation.update(options)
                return [("session.updated", {"session": self._shown()})]
            case realtime.ItemCreate(item=item, previous_item_id=after):
                item.id = item.id or conversation.new_id()
                follows = conversation.add(item, after)
                said = {"previous_item_id": follows, "item": realtime.shown(item)}
                return [("conversation.item.added", said), ("conversation.item.done", said)]
            case realtime.ItemRetrieve(item_id=item_id):
                return [("conversation.item.retrieved", {"item": realtime.shown(conversation.find(item_id))})]
            case realtime.ItemDelete(item_id=item_id):
                conversation.remove(item_id)
                return [("conversation.item.deleted", {"item_id": item_id})]
            case realtime.ResponseCreate(response=asked):
                self._begin(asked)
                return ()
            case realtime.ResponseCancel(response_id=response_id):
                if self._response is None or response_id not in (None, self._response_id):
                    raise Refusal("not_found", "no such response is being generated", param="response_id")
                self._peer.lose()
                return ()
            case _:
                assert_never(event)

    def _begin(self, asked: realtime.ResponseOptions) -> None:
        if self._response is not None:
            raise Refusal("conflict", "a response is being generated already; it can be cancelled", param="response")
        body = self._conversation.request(asked)
        request_id = new_request_id()
        self._response_id = "resp_" + request_id.removeprefix("req-")
        answer = Answer(self._response_id, self._conversation, asked)
        self._peer = Peer()
        self._response = asyncio.create_task(self._respond(request_id, body, answer))
        self._response.add_done_callback(self._ended)

    # --- responses ----------------------------------------------------------------------------------------------------

    async def _respond(self, request_id: str, body: bytes, answer: Answer) -> None:
        """One response through the relay; its last events are sent once its record is durable."""
        parts, peer = self._parts, self._peer
        await self._say(answer.start())
        relay: Relay | None = None
        try:
            call = self._admit(request_id, body)
        except Refusal as refusal:
            parts.metrics.refused(refusal.code)
            answer.fail(refusal)
        else:
            relay = Relay(call, replace(parts, room=self._place), _Listener(self._say, answer).send, peer)
            await relay.run()
        counted = relay.tokens if relay is not None else None
        await self._say(
            answer.end(
                cancelled=peer.lost,
                input_tokens=counted.input if counted else 0,
                cached_tokens=counted.cached if counted else 0,
                output_tokens=counted.output if counted else 0,
            )
        )

    def _admit(self, request_id: str, body: bytes) -> Call:
        now_ms = self._parts.clock.now_ms()
        key = self._gatekeeper.authenticate(self._head, now_ms)
        return self._gatekeeper.admit(API, self._head, key, body, request_id, now_ms, self._current())

    def _ended(self, response: "asyncio.Task[None]") -> None:
        self._response = None
        self._active_ms = self._parts.clock.now_ms()
        if not response.cancelled() and (bug := response.exception()) is not None:
            log.error("a response of session %s ended by a bug", self._id, exc_info=bug)
            self._close(BUG, "internal_error", "the gateway failed; it is logged")

    # --- the place ----------------------------------------------------------------------------------------------------

    def _current(self) -> EndpointEntry:
        """Its endpoint as it is now; where that was a canary that has ended, the endpoint the canary stood beside."""
        endpoints = self._parts.room.endpoints
        entry = endpoints.get(self.entry.endpoint) or endpoints.get(self.entry.serves)
        if entry is None:
            raise Refusal("model_not_found", f"no such model: {self.entry.endpoint}", param="model")
        return entry

    def _no_place(self, answer: Placed) -> None:
        """Refused while no response waits for it: the client is told, and the next response asks again."""
        assert isinstance(answer, Refuse)
        said = realtime.error(refusal_of(answer, self.entry), None)
        self._parts.metrics.refused(answer.code)
        telling = asyncio.ensure_future(self._say([("error", said)]))
        telling.add_done_callback(lambda told: told.exception())

    # --- what is said -------------------------------------------------------------------------------------------------

    def _shown(self) -> dict[str, Any]:
        return self._conversation.session((self._opened_ms + self._parts.limits.session_ms_max) // 1000)

    async def _say(self, events: Iterable[Said]) -> None:
        for kind, fields in events:
            self._events += 1
            event = {"type": kind, "event_id": f"event_{self._events}"} | fields
            await self._tell({"type": "websocket.send", "text": msgspec.json.encode(event).decode()})

    async def _tell(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # the connection has ended; `receive` says so, and the response must not go on meanwhile
            self._peer.lose()


class _Listener:
    """The ASGI `send` of one response's relay: a chat stream, or a refusal, becomes events of its session."""

    def __init__(self, say: Callable[[Iterable[Said]], Any], answer: Answer) -> None:
        self._say = say
        self._answer = answer
        self._streams = False
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._streams = message["status"] == 200
            return
        body = message.get("body", b"")
        if self._streams:
            for line in body.split(b"\n"):
                if line.startswith(SSE_DATA) and not line.startswith(SSE_END):
                    await self._say(self._answer.chunk(line[len(SSE_DATA) :]))
            return
        self._body += body
        if not message.get("more_body"):
            await self._say(self._answer.chunk(bytes(self._body)))
