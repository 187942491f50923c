"""What the handlers of the billing API share: who asks, bounded bodies, named parameters, answers."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import wraps
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tidegate.domain.errors import Refusal
from tidegate.wire.admin import Identity, decode

Authorize = Callable[[Request, bool], Identity]
"""(request, admin) → who asks. Raises Refusal: no valid key, or a tenant's where `admin` is required."""
Handler = Callable[[Request, Identity], Awaitable[Response]]
Guarded = Callable[..., Callable[[Request], Awaitable[Response]]]
E = TypeVar("E", bound=StrEnum)
B = TypeVar("B", bound=msgspec.Struct)

BODY_BYTES_MAX = 64 << 10


def guard(authorize: Authorize) -> Guarded:
    """Handlers that know who asks; `admin`: only an administrator may."""

    def guarded(handler: Handler, *, admin: bool = False) -> Callable[[Request], Awaitable[Response]]:
        @wraps(handler)  # the OpenAPI document shows the handler's name and docstring
        async def endpoint(request: Request) -> Response:
            return await handler(request, authorize(request, admin))

        return endpoint

    return guarded


def known(request: Request, *names: str) -> None:
    for name in request.query_params:
        if name not in names:
            accepted = ", ".join(names)
            raise Refusal(
                "invalid_request", f"`{name[:40]}` is not a parameter (accepted: {accepted})", param=name[:40]
            )


def choice(request: Request, name: str, kind: type[E], default: E) -> E:
    text = request.query_params.get(name, default.value)
    try:
        return kind(text)
    except ValueError:
        accepted = ", ".join(member.value for member in kind)
        raise Refusal("invalid_request", f"`{name}`: {text[:40]!r} (accepted: {accepted})", param=name) from None


async def body_of(request: Request, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """The whole body. Refusal body_too_large while it is still being read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise Refusal("body_too_large", f"the body is over {bytes_max} bytes")
    return bytes(body)


async def body_as(request: Request, kind: type[B]) -> B:
    """The body as a `kind`. Raises Refusal naming what is wrong with it."""
    return decode(await body_of(request), kind)


def answer(thing: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(thing), status, media_type="application/json")
