"""`/v1/realtime`: text sessions over WebSocket, each with a place on warm capacity for as long as it lasts."""

from collections import Counter
from urllib.parse import parse_qs

from tidegate.domain.errors import LimitHit, Refusal
from tidegate.gateway.gatekeeper import Gatekeeper
from tidegate.gateway.intake import hold_ms, new_request_id, read_head
from tidegate.gateway.relay import Parts
from tidegate.gateway.replies import Message, Receive, Scope, Send, reply_refusal
from tidegate.gateway.session import API, Opening, Session
from tidegate.quota import admission

SUBPROTOCOL = "realtime"


class Sessions:
    """The sessions of one gateway."""

    def __init__(self, parts: Parts, gatekeeper: Gatekeeper) -> None:
        self._parts = parts
        self._gatekeeper = gatekeeper
        self._open: set[Session] = set()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One WebSocket from its handshake to its end; what is refused before it is open is an HTTP answer."""
        session_id = new_request_id()
        try:
            session = Session(self._parts, self._gatekeeper, self._admit(scope, session_id), receive, send)
        except Refusal as refusal:
            self._parts.metrics.refused(refusal.code)
            await reply_refusal(_before_open(send), refusal, [(b"x-request-id", session_id.encode())])
            return
        self._open.add(session)
        try:
            await session.run()
        finally:
            self._open.discard(session)

    def _admit(self, scope: Scope, session_id: str) -> Opening:
        now_ms = self._parts.clock.now_ms()
        head = read_head(scope)
        key = self._gatekeeper.authenticate(head, now_ms)
        asked = parse_qs(scope["query_string"].decode("latin-1"))
        if other := next((name for name in asked if name != "model"), ""):
            message = f"parameter '{other[:80]}' is not supported: sessions are text with a model"
            raise Refusal("unsupported_parameter", message, param=other[:80])
        model = asked.get("model", [""])[0]
        if not model:
            raise Refusal("invalid_request", "missing required parameter: 'model' in the URL", param="model")
        tenant, full = admission.tenant_of(key), self._parts.limits.sessions_max
        entry = self._gatekeeper.endpoint(API, tenant, model, session_id)
        mine = sum(session.tenant == tenant for session in self._open)
        if mine >= full:
            limit = LimitHit("concurrency", mine, full)
            message = f"{mine} sessions of this tenant are open already, which is its limit"
            raise Refusal("rate_limit_exceeded", message, retry_after_ms=1_000, limit=limit)
        wait_ms = hold_ms(head, entry, self._parts.limits)
        subprotocol = SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None
        return Opening(session_id, tenant, head, model, entry, wait_ms, subprotocol)

    def sweep(self, now_ms: int) -> None:
        for session in self._open:
            session.sweep(now_ms)

    def at(self) -> Counter[str]:
        """How many each endpoint has."""
        return Counter(session.entry.endpoint for session in self._open)


def _before_open(send: Send) -> Send:
    """An HTTP answer in place of a WebSocket (ASGI's `websocket.http.response`)."""

    async def answer(message: Message) -> None:
        await send({**message, "type": "websocket." + message["type"]})

    return answer
