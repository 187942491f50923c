"""Anthropic's Messages as chat completions and back. Pure. Shapes: https://docs.anthropic.com/en/api/messages.

What a chat completion cannot say is refused by name. `cache_control` is taken and means nothing more than it does at
Anthropic: a hint. `max_tokens` is required, as there.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import Refusal
from tidegate.wire import openai
from tidegate.wire.chat_stream import Chat, ToolCallPart, cached_tokens, decode, event

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


class CacheControl(Struct):
    type: str


class TextBlock(Struct, tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ToolUse(Struct, tag="tool_use", forbid_unknown_fields=True):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResult(Struct, tag="tool_result", forbid_unknown_fields=True):
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


class Turn(Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ToolUse | ToolResult]


class Tool(Struct, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Literal[False] = False


class Metadata(Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class Thinking(Struct, forbid_unknown_fields=True):
    type: Literal["disabled"]


class MessagesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1, max_length=512)]
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Meta(ge=1)]
    system: str | list[TextBlock] | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    metadata: Metadata | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class Messages:
    """One request and its answer."""

    def __init__(self, request_id: str, created_s: int = 0) -> None:
        self._id = "msg_" + request_id.removeprefix("req-")
        self._model = ""
        self._started = False
        self._block: str | None = None  # the kind of the content block that is open
        self._index = -1
        self._finish = "end_turn"
        self._stopped_by: str | None = None
        self._usage = {"input_tokens": 0, "output_tokens": 0}

    def request(self, body: bytes) -> bytes:
        """The chat request. Refusal for what there is no chat request for."""
        asked = openai.parse(MessagesRequest, body)
        self._model = asked.model
        chat: dict[str, Any] = {"model": asked.model, "max_tokens": asked.max_tokens, "messages": _chat_turns(asked)}
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(asked, name)) is not None:
                chat[name] = value
        if asked.stop_sequences:
            chat["stop"] = asked.stop_sequences
        if asked.metadata is not None and asked.metadata.user_id is not None:
            chat["user"] = asked.metadata.user_id
        if asked.tools:
            chat["tools"] = [_chat_tool(tool) for tool in asked.tools]
        if asked.tool_choice is not None:
            chat["tool_choice"] = _chat_tool_choice(asked.tool_choice)
        if asked.stream:
            chat |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(chat)

    def answer(self, body: bytes) -> bytes:
        chat = decode(body)
        choice = chat.choices[0]
        content: list[dict[str, Any]] = []
        if choice.message is not None and choice.message.content:
            content.append({"type": "text", "text": choice.message.content})
        for call in (choice.message.tool_calls if choice.message is not None else None) or ():
            content.append(_tool_use(call))
        self._ended(choice.finish_reason or "stop", choice.stop_reason)
        self._count(chat)
        return msgspec.json.encode(self._message(content))

    def error(self, status: int, body: bytes) -> bytes:
        """OpenAI's error as Anthropic's."""
        error = decode(body).error
        return msgspec.json.encode(_error(status, error.message if error is not None else "the request failed"))

    def event(self, data: bytes) -> bytes:
        """Events of the stream for one chunk of the chat stream."""
        chat = decode(data)
        if chat.error is not None:
            return event("error", _error(503 if chat.error.type == "server_error" else 400, chat.error.message))
        out = self._start()
        self._count(chat)
        for choice in chat.choices[:1]:
            if choice.delta is not None:
                if choice.delta.content:
                    out += self._open("text", {"type": "text", "text": ""}) + self._delta("text", choice.delta.content)
                for call in choice.delta.tool_calls or ():
                    out += self._tool(call)
            if choice.finish_reason is not None:
                self._ended(choice.finish_reason, choice.stop_reason)
        return out

    def done(self) -> bytes:
        """The end of the stream."""
        stop = {"stop_reason": self._finish, "stop_sequence": self._stopped_by}
        return (
            self._start()
            + self._close()
            + event("message_delta", {"type": "message_delta", "delta": stop, "usage": self._usage})
            + event("message_stop", {"type": "message_stop"})
        )

    def ping(self) -> bytes:
        """In place of a comment."""
        return event("ping", {"type": "ping"}) if self._started else self._start()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        return event("message_start", {"type": "message_start", "message": message})

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._finish,
            "stop_sequence": self._stopped_by,
            "usage": self._usage,
        }

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        if self._block == kind == "text":
            return b""
        closed = self._close()
        self._block, self._index = kind, self._index + 1
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return closed + event("content_block_start", start)

    def _close(self) -> bytes:
        if self._block is None:
            return b""
        self._block = None
        return event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def _delta(self, kind: str, text: str) -> bytes:
        delta = {"type": "text_delta", "text": text}
        if kind != "text":
            delta = {"type": "input_json_delta", "partial_json": text}
        return event("content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta})

    def _tool(self, call: ToolCallPart) -> bytes:
        out = b""
        name = call.function.name if call.function is not None else None
        if call.id is not None:
            out = self._open("tool", {"type": "tool_use", "id": call.id, "name": name or "", "input": {}})
        if call.function is not None and call.function.arguments:
            out += self._delta("tool", call.function.arguments)
        return out

    def _ended(self, finish: str, stopped_by: str | int | None) -> None:
        self._finish = STOP_REASONS.get(finish, "end_turn")
        if finish == "stop" and isinstance(stopped_by, str):
            self._finish, self._stopped_by = "stop_sequence", stopped_by

    def _count(self, chat: Chat) -> None:
        if chat.usage is not None:
            cached = cached_tokens(chat.usage)
            self._usage = {
                "input_tokens": chat.usage.prompt_tokens - cached,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached,
                "output_tokens": chat.usage.completion_tokens,
            }


def _error(status: int, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": KINDS.get(status, "api_error"), "message": message}}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _chat_turns(asked: MessagesRequest) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if asked.system is not None:
        turns.append({"role": "system", "content": _text(asked.system)})
    for number, turn in enumerate(asked.messages):
        if isinstance(turn.content, str):
            turns.append({"role": turn.role, "content": turn.content})
            continue
        calls: list[dict[str, Any]] = []
        texts: list[str] = []
        for block in turn.content:
            match block:
                case TextBlock():
                    texts.append(block.text)
                case ToolUse() if turn.role == "assistant":
                    arguments = msgspec.json.encode(block.input).decode()
                    function = {"name": block.name, "arguments": arguments}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ToolResult() if turn.role == "user":
                    turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)})
                case _:
                    message = f"messages.{number}: the other role has blocks of this type"
                    raise Refusal("invalid_request", message, param=f"messages.{number}.content")
        if calls:
            turns.append({"role": turn.role, "content": "".join(texts) or None, "tool_calls": calls})
        elif texts:
            turns.append({"role": turn.role, "content": "".join(texts)})
    return turns


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return {"any": "required"}.get(choice.type, choice.type)


def _tool_use(call: ToolCallPart) -> dict[str, Any]:
    name, arguments = "", "{}"
    if call.function is not None:
        name, arguments = call.function.name or "", call.function.arguments or "{}"
    try:
        given = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        given = {"arguments": arguments}  # a model's own words, which are not always JSON
    return {"type": "tool_use", "id": call.id or "", "name": name, "input": given}
