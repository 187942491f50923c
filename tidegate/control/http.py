"""The HTTP side of the admin API: who is asking, bounded bodies, queries, and errors in OpenAI's shape."""

import logging
import re
import secrets
from collections.abc import Callable

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.control import keys
from tidegate.control.catalog import key_entry
from tidegate.control.desired import DesiredState
from tidegate.domain.errors import Fault, Refusal
from tidegate.domain.ports import Clock
from tidegate.quota import admission
from tidegate.wire import openai
from tidegate.wire.admin import Identity

BODY_BYTES_MAX = 1 << 20
SECRET_CHARS_MAX = 512
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

log = logging.getLogger(__name__)

Authorize = Callable[[Request, bool], Identity]
"""(request, admin) → who asks. Raises Refusal: no valid key, or a tenant's key where `admin` is required."""


def authorizer(desired: DesiredState, clock: Clock) -> Authorize:
    def authorize(request: Request, admin: bool) -> Identity:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        usable = scheme.lower() == "bearer" and 0 < len(secret) <= SECRET_CHARS_MAX
        found = desired.key(keys.digest(secret.strip())) if usable else None
        key = admission.check_key(key_entry(found) if found is not None else None, clock.now_ms())
        if admin and key.tenant is not None:
            raise Refusal("permission_denied", "this needs an administrator's key")
        return Identity(key.id, key.tenant)

    return authorize


async def body_of(request: Request) -> bytes:
    """The whole body. Raises Refusal body_too_large while it is still being read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise Refusal("body_too_large", f"the body is over {BODY_BYTES_MAX} bytes")
    return bytes(body)


def answer(thing: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(thing), status, media_type="application/json")


def on_refusal(_request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    headers = dict(openai.refusal_headers(refusal))
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(openai.refusal_body(refusal), refusal.status, headers, "application/json")


def on_fault(request: Request, fault: Exception) -> Response:
    """Something we depend on is away: the database, mostly. Its reason is safe to show."""
    assert isinstance(fault, Fault)
    log.warning("%s %s: %s", request.method, request.url.path, fault.reason)
    return on_refusal(request, Refusal("not_ready", f"not now: {fault.reason}", retry_after_ms=1_000))


def on_http_exception(request: Request, error: Exception) -> Response:
    """What routing itself refuses: no such path, or no such method on it."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        response = on_refusal(request, Refusal("method_not_allowed", f"{request.method} is not allowed here"))
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        missing = f"there is no {request.method} {request.url.path[:100]}"
        elsewhere = "OpenAI's API is under /v1, this one under /api/v1"
        return on_refusal(request, Refusal("not_found", f"{missing}; {elsewhere}"))
    return on_refusal(request, Refusal("invalid_request", str(error.detail)))


def on_bug(request: Request, error: Exception) -> Response:
    """The log has the traceback, the caller never does."""
    body = openai.error_object("internal error: please report it", "server_error", "internal_error")
    headers = {"x-request-id": request.scope.get("tidegate.request_id", "")}
    return Response(openai.encode(body), 500, headers, "application/json")


def on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


class RequestIds:
    """ASGI middleware: every answer carries ``x-request-id``, the caller's own where it sent a plain one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"

        scope["tidegate.request_id"] = request_id  # for the answer to a bug, which is made outside this middleware

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


EXCEPTION_HANDLERS = {
    Refusal: on_refusal,
    Fault: on_fault,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}
