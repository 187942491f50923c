"""Endpoints served by an OpenAI-compatible API elsewhere: how it is reached and called, and what its refusals mean.

To the waiting room such an endpoint has one target that is always ready, with as many slots as the provider may have
requests of ours at once.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from tidegate.domain.endpoint import EndpointState
from tidegate.domain.errors import Refusal
from tidegate.domain.plan import Route, Target
from tidegate.wire.internal import EndpointEntry, RemoteTarget

RETRY_AFTER_MS, RETRY_AFTER_MS_MAX = 1_000, 3_600_000
_PORTS = {"https": 443, "http": 80}
# Statuses that are about our account there, not about what this client sent: it must not learn of them as its own.
OURS = {401, 402, 403}


def route_of(entry: EndpointEntry, remote: RemoteTarget, version: int) -> Route:
    """Its one target. Newer `version` wins, so that a changed provider takes the place of the old one."""
    if remote.paused:
        return Route(entry.endpoint, version, EndpointState.PAUSED, ())
    target = Target(f"remote:{remote.provider}", address_of(remote), remote.concurrency_max, remote.region)
    return Route(entry.endpoint, version, EndpointState.READY, (target,))


def address_of(remote: RemoteTarget) -> str:
    """``https:HOST:PORT`` or ``tcp:HOST:PORT``, as `upstream.Pool` connects to."""
    url = urlsplit(remote.url)
    kind = "https" if url.scheme == "https" else "tcp"
    return f"{kind}:{url.hostname}:{url.port or _PORTS[url.scheme]}"


def head_of(remote: RemoteTarget, key: bytes, api: str, request: str, length: int) -> bytes:
    """The head of a POST to `api` (``chat/completions``) there. The tenant's own key and headers do not travel."""
    url = urlsplit(remote.url)
    lines = [
        f"POST {url.path.rstrip('/')}/{api} HTTP/1.1",
        f"host: {url.netloc}",
        "content-type: application/json",
        "accept-encoding: identity",
        f"x-request-id: {request}",
        f"content-length: {length}",
    ]
    head = "\r\n".join(lines).encode()
    return head + (b"\r\nauthorization: Bearer " + key if key else b"") + b"\r\n\r\n"


def refusal_of_status(provider: str, status: int, retry_after: bytes, now: datetime) -> Refusal | None:
    """What the client is told of a status that is the provider's matter; None where the answer itself says it."""
    if status in (429, 503):
        return Refusal(
            "rate_limit_exceeded" if status == 429 else "capacity",
            f"the provider {provider} takes no more requests now",
            retry_after_ms=_wait_ms(retry_after.decode("latin-1"), now),
        )
    if status in OURS:
        return Refusal("engine_error", f"the provider {provider} refuses our key (status {status})")
    if status >= 500 or status < 200 or 300 <= status < 400:
        return Refusal("engine_error", f"the provider {provider} answered with status {status}")
    return None


def _wait_ms(retry_after: str, now: datetime) -> int:
    """Retry-After (RFC 9110 10.2.3): seconds, or a date; the least there is where it says neither."""
    if retry_after.isdigit():
        wait_ms = int(retry_after[:9]) * 1_000
    else:
        try:
            at = parsedate_to_datetime(retry_after)
        except ValueError:
            return RETRY_AFTER_MS
        wait_ms = int(((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds() * 1_000)
    return max(RETRY_AFTER_MS, min(wait_ms, RETRY_AFTER_MS_MAX))
