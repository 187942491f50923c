"""Refusals in words: what the waiting room refused, and what an engine refused."""

import msgspec
from msgspec import Struct

from tidegate.dispatch import Refuse
from tidegate.domain.errors import REFUSALS, Refusal
from tidegate.wire.internal import EndpointEntry

LEAST_MS = 1_000  # Retry-After counts whole seconds


def refusal_of(refuse: Refuse, entry: EndpointEntry) -> Refusal:
    """A refusal for want of capacity always says when to come back: the estimate, or the least the header can say."""
    retry_after_ms = refuse.retry_after_ms or (LEAST_MS if refuse.limit or refuse.code == "residency_denied" else None)
    return Refusal(
        refuse.code,
        _message(refuse, entry.endpoint),
        param="model" if refuse.code == "model_not_found" else None,
        retry_after_ms=retry_after_ms,
        limit=refuse.limit,
    )


def _message(refuse: Refuse, endpoint: str) -> str:
    because = f" ({refuse.reason})" if refuse.reason else ""
    match refuse.code:
        case "queue_full":
            full = refuse.limit.full if refuse.limit else 0
            return f"{endpoint}: {full} requests are waiting already, which is its limit"
        case "hold_expired":
            return f"{endpoint} had no free capacity within {refuse.held_ms} ms{because}"
        case "capacity":
            return f"{endpoint} has no free capacity now{because}"
        case "endpoint_failed":
            return f"{endpoint} cannot be served{because}"
        case "endpoint_paused":
            return f"{endpoint} is paused{because}"
        case "residency_denied":
            return f"{endpoint} is served in its own regions only{because}"
        case "model_not_found":
            return f"no such model: {endpoint}"
        case "engine_error":
            return f"{endpoint}: the engine failed before it answered, and so did the second attempt"
        case code:
            raise AssertionError(f"the waiting room does not refuse with {code}")


class _Error(Struct):
    message: str = ""
    code: str | None = None


class _Body(Struct):
    error: _Error


_bodies = msgspec.json.Decoder(_Body)


def code_of_answer(body: bytes) -> tuple[str, str]:
    """(code, message) of an engine's 4xx; `invalid_request` when it is not one of ours."""
    try:
        error = _bodies.decode(body).error
    except msgspec.DecodeError:
        return "invalid_request", "the engine refused the request"
    code = error.code or ""
    return code if code in REFUSALS else "invalid_request", error.message
