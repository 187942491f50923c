"""What translations of a chat answer have in common: choices, deltas and usage as the engine sends them. Pure."""

from typing import Any

import msgspec
from msgspec import Struct

from tidegate.wire.openai import Usage


class FunctionPart(Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCallPart(Struct):
    """A whole tool call, or a piece of one: `index` says of which, `id` comes with its first piece."""

    index: int = 0
    id: str | None = None
    function: FunctionPart | None = None


class Delta(Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallPart] | None = None


class Choice(Struct):
    """`stop_reason` is vLLM's: the stop string that ended it."""

    message: Delta | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ErrorBody(Struct):
    message: str = ""
    type: str = ""
    code: str | None = None
    param: str | None = None


class Chat(Struct):
    """An answer, an event of a stream, or an error."""

    model: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    error: ErrorBody | None = None


decode = msgspec.json.Decoder(Chat).decode


def cached_tokens(usage: Usage | None) -> int:
    details = usage.prompt_tokens_details if usage is not None else None
    return details.cached_tokens if details is not None else 0


def event(name: str, data: dict[str, Any]) -> bytes:
    """A named server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
