"""Reading a request: its headers, its bounded body, and the little the gateway must understand of it."""

import asyncio
import hashlib
import os
from dataclasses import dataclass

from tidegate.domain.endpoint import Mode
from tidegate.domain.errors import Refusal
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.replies import Receive, Scope
from tidegate.quota.gate import Hold
from tidegate.wire.internal import EndpointEntry

_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})

HOLD_S_MAX = 86_400


@dataclass(slots=True)
class Call:
    """One admitted request. `wait_ms` bounds its hold; `body` is dropped once an engine has begun to answer."""

    id: str
    api: str
    key: str
    tenant: str
    entry: EndpointEntry
    body: bytes
    stream: bool
    wants_usage: bool
    arrived_ms: int
    wait_ms: int
    wants_each_usage: bool = False
    hold: Hold | None = None  # what it has taken of the limits it is subject to
    line: str = ""  # of a batch: what its usage record is called once it is done, however often it had to be sent

    @property
    def mode(self) -> Mode:
        return self.entry.mode


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


@dataclass(slots=True)
class Head:
    """The request headers the gateway looks at."""

    digest: str = ""
    wait: bytes | None = None
    content_length: int = 0
    batch: bytes = b""


def new_request_id() -> str:
    """Random, so that a tenant cannot count what others ask."""
    return "req-" + os.urandom(12).hex()


def read_head(scope: Scope) -> Head:
    """One pass over the headers. Only the digest of the key is kept."""
    head = Head()
    for name, value in scope["headers"]:
        if name == b"authorization":
            if value[:7].lower() == b"bearer ":
                head.digest = hashlib.sha256(value[7:].strip()).hexdigest()
        elif name == b"content-length":
            head.content_length = int(value) if value.isdigit() else 0
        elif name == b"x-scale-up-timeout":
            head.wait = value
        elif name == b"x-tidegate-batch":
            head.batch = value
    return head


def from_here(scope: Scope) -> bool:
    """Whether a client of this very machine asks, and not a proxy on it for somebody else (RFC 7239 and its elders)."""
    client = scope.get("client")
    near = client is None or not client[0] or client[0] == "::1" or client[0].startswith("127.")
    return near and not any(name in _FORWARDED for name, _ in scope["headers"])


def acting_for(head: Head) -> tuple[str, str, str]:
    """Whom the batch runner acts for: tenant, key id, and the line's own id."""
    parts = head.batch.decode("ascii", "replace").split(" ")
    if len(parts) != 3 or not all(parts):
        raise Refusal("invalid_request", "x-tidegate-batch names a tenant, a key and a line", param="x-tidegate-batch")
    return parts[0], parts[1], parts[2]


def hold_ms(head: Head, entry: EndpointEntry, limits: GatewayLimits) -> int:
    """How long it may be held: `X-Scale-Up-Timeout` (seconds, 0: not at all), at most the endpoint's bound."""
    full_ms = min(entry.hold_ms_max, limits.hold_ms_max)
    if head.wait is None:
        return full_ms
    try:
        seconds = float(head.wait)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= HOLD_S_MAX:
        raise Refusal(
            "invalid_request",
            f"X-Scale-Up-Timeout is a number of seconds from 0 to {HOLD_S_MAX}",
            param="X-Scale-Up-Timeout",
        )
    return min(full_ms, int(seconds * 1000))


async def read_body(receive: Receive, head: Head, limits: GatewayLimits) -> bytes:
    """The whole body. Refusal body_too_large as soon as it is known to be, request_timeout when it comes too slowly;
    ClientGone when the connection ends first.
    """
    if head.content_length > limits.body_bytes_max:
        raise _too_large(limits.body_bytes_max)
    try:
        async with asyncio.timeout(limits.body_ms_max / 1000):
            return await _read(receive, limits.body_bytes_max)
    except TimeoutError:
        raise Refusal("request_timeout", f"the body did not come within {limits.body_ms_max} ms") from None


def check_size(body: bytes | bytearray, bytes_max: int) -> None:
    if len(body) > bytes_max:
        raise _too_large(bytes_max)


async def _read(receive: Receive, bytes_max: int) -> bytes:
    message = await receive()
    body: bytes | bytearray = message.get("body", b"")
    while message["type"] == "http.request":
        check_size(body, bytes_max)
        if not message.get("more_body"):
            return bytes(body)
        message = await receive()
        if not isinstance(body, bytearray):
            body = bytearray(body)
        body += message.get("body", b"")
    raise ClientGone


def _too_large(bytes_max: int) -> Refusal:
    return Refusal("body_too_large", f"the body is over the limit of {bytes_max} bytes")
