"""Errors are of three kinds.

* `Refusal`: we will not do it, and say why. It has a name, an HTTP status and a text that is safe to show.
* `Fault`: something outside failed (an engine died, a disk is full). Typed, always raised `from` its cause.
* a bug: an `assert`; the supervisor of the task restarts it and nothing is hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# code -> (HTTP status, OpenAI error type). The code is the name a client can match on.
REFUSALS: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "wrong_endpoint_kind": (400, "invalid_request_error"),
    "invalid_configuration": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "expired_api_key": (401, "authentication_error"),
    "revoked_api_key": (401, "authentication_error"),
    "permission_denied": (403, "permission_error"),
    "residency_denied": (403, "permission_error"),
    "model_not_found": (404, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "timeout_error"),
    "conflict": (409, "conflict_error"),
    "body_too_large": (413, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "insufficient_quota": (429, "insufficient_quota"),
    "queue_full": (429, "rate_limit_error"),
    "engine_error": (502, "server_error"),
    "endpoint_failed": (503, "server_error"),
    "endpoint_paused": (503, "server_error"),
    "capacity": (503, "server_error"),
    "not_ready": (503, "server_error"),
    "source_unavailable": (503, "server_error"),
    "journal_unavailable": (503, "server_error"),
    "hold_expired": (503, "server_error"),
    "budget_unavailable": (503, "server_error"),
}


@dataclass(frozen=True, slots=True)
class LimitHit:
    """Which limit refused a request: `kind` is concurrency | rpm | tpm | budget | contract | queue | capacity."""

    kind: str
    current: int
    full: int


class Refusal(Exception):
    """A named, safe-to-show refusal. `code` is a key of `REFUSALS`; `param` names the offending field, if one is;
    `headers` go on its answer.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int | None = None,
        limit: LimitHit | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        assert code in REFUSALS, f"refusal code {code!r} has no HTTP mapping"
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms
        self.limit = limit
        self.headers = headers or {}

    @property
    def status(self) -> int:
        return REFUSALS[self.code][0]

    @property
    def type(self) -> str:
        return REFUSALS[self.code][1]


class Fault(Exception):
    """The outside failed. Raise it `from` the cause; `reason` is safe to show (no prompt, secret or user's path)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EngineFault(Fault):
    """An engine process died, hung, answered nonsense or could not be started."""


class WeightFault(Fault):
    """A model's weights cannot be brought to this node: their source, their checksum or the disk."""


class StoreFault(Fault):
    """A journal, ledger or state store could not do its work (disk full, database away)."""


class LinkFault(Fault):
    """A connection between two of our own services broke."""


class CommitConflict(Fault):
    """Compare-and-commit lost: somebody else committed first. Read again and retry."""
