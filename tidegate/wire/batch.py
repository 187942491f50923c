"""OpenAI's Files and Batches: what is stored, what is asked, what is answered. Pure.

Shapes follow https://platform.openai.com/docs/api-reference/files and …/batch. Instants in the API are epoch seconds,
inside tidegate epoch milliseconds.
"""

from enum import StrEnum, auto
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import Refusal

FILE_BYTES_MAX = 200 << 20
LINES_MAX = 50_000
CUSTOM_ID_CHARS_MAX = 512
METADATA_PAIRS_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512
EXPIRES_S_MIN, EXPIRES_S_MAX = 3_600, 2_592_000
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WINDOWS_MS = {"24h": 24 * 3_600_000}

# ---- what is stored --------------------------------------------------------------------------------------------------


class StoredFile(Struct, frozen=True, kw_only=True):
    """One file; its content lies encrypted in the vault under its id. `expires_ms` None: kept until it is deleted."""

    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    created_ms: int
    expires_ms: int | None = None


class Status(StrEnum):
    """The life of a batch, in OpenAI's words."""

    VALIDATING = auto()
    FAILED = auto()
    IN_PROGRESS = auto()
    FINALIZING = auto()
    COMPLETED = auto()
    EXPIRED = auto()
    CANCELLING = auto()
    CANCELLED = auto()

    @property
    def open(self) -> bool:
        """Whether there is still something to do for it."""
        return self in (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


class LineError(Struct, frozen=True, kw_only=True):
    """What is wrong with the input; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Notice(StrEnum):
    """Whether the webhook of a finished batch is still owed."""

    NONE = auto()
    OWED = auto()
    DELIVERED = auto()
    GIVEN_UP = auto()


class StoredBatch(Struct, frozen=True, kw_only=True):
    """One batch as last written.

    `url` is the API path its lines call, `model` the endpoint (``tenant/name``) they name, empty until validation has
    seen it; `key` is the id of the API key that created it. Counts are of lines. `verdict` is how it will have ended,
    while it is finalizing.
    """

    id: str
    tenant: str
    key: str
    url: str
    input_file_id: str
    completion_window: str
    created_ms: int
    expires_ms: int
    status: Status = Status.VALIDATING
    model: str = ""
    metadata: dict[str, str] | None = None
    output_expires_s: int | None = None
    errors: tuple[LineError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_ms: int | None = None
    cancelling_ms: int | None = None
    finalizing_ms: int | None = None
    ended_ms: int | None = None
    verdict: Status | None = None
    notice: Notice = Notice.NONE


# ---- requests --------------------------------------------------------------------------------------------------------


class ExpiresAfter(Struct, forbid_unknown_fields=True, frozen=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=EXPIRES_S_MIN, le=EXPIRES_S_MAX)]


class BatchCreate(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    input_file_id: Annotated[str, Meta(min_length=1, max_length=64)]
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Refusal invalid_request beyond OpenAI's bounds."""
    if metadata is None:
        return
    if len(metadata) > METADATA_PAIRS_MAX:
        raise Refusal("invalid_request", f"`metadata`: at most {METADATA_PAIRS_MAX} pairs", param="metadata")
    for key, value in metadata.items():
        if len(key) > METADATA_KEY_CHARS_MAX or len(value) > METADATA_VALUE_CHARS_MAX:
            message = (
                f"`metadata`: keys have at most {METADATA_KEY_CHARS_MAX} characters, values at most "
                f"{METADATA_VALUE_CHARS_MAX}"
            )
            raise Refusal("invalid_request", message, param="metadata")


# ---- input and output lines ------------------------------------------------------------------------------------------


class InputLine(Struct, frozen=True):
    """One line of an input file. `body` stays as the bytes it came in."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=CUSTOM_ID_CHARS_MAX)]
    method: str
    url: str
    body: msgspec.Raw


class LineResponse(Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineFault(Struct, frozen=True):
    code: str
    message: str


class OutputLine(Struct, frozen=True):
    """One line of an output or error file: `response` for whatever the model answered, `error` where it never did."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineFault | None


# ---- answers ---------------------------------------------------------------------------------------------------------


def file_view(file: StoredFile) -> dict[str, Any]:
    """OpenAI's file object."""
    view: dict[str, Any] = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_ms // 1000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
    view["expires_at"] = None if file.expires_ms is None else file.expires_ms // 1000
    return view


def batch_view(batch: StoredBatch) -> dict[str, Any]:
    """OpenAI's batch object."""
    ended = {status: batch.ended_ms if batch.status is status else None for status in Status}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.url,
        "model": batch.model or None,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_ms // 1000,
        "in_progress_at": _seconds(batch.in_progress_ms),
        "expires_at": batch.expires_ms // 1000,
        "finalizing_at": _seconds(batch.finalizing_ms),
        "completed_at": _seconds(ended[Status.COMPLETED]),
        "failed_at": _seconds(ended[Status.FAILED]),
        "expired_at": _seconds(ended[Status.EXPIRED]),
        "cancelling_at": _seconds(batch.cancelling_ms),
        "cancelled_at": _seconds(ended[Status.CANCELLED]),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": batch.metadata,
    }


def page_view(items: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": more,
    }


def _seconds(at_ms: int | None) -> int | None:
    return None if at_ms is None else at_ms // 1000
