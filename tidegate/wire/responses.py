"""OpenAI's Responses (platform.openai.com/docs/api-reference/responses) as chat completions and back, stateless. Pure.

Nothing is stored, so what refers to something stored is refused by name; so is what a chat completion cannot say.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import Refusal
from tidegate.wire import openai
from tidegate.wire.chat_stream import Chat, ToolCallPart, cached_tokens, decode, event


class TextPart(Struct, forbid_unknown_fields=True):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(Struct, forbid_unknown_fields=True, kw_only=True):
    """An input item: a message, a function call of an earlier answer, or its output. Which fields go with which `type`
    is checked in `_turn`.
    """

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None
    id: str | None = None
    status: str | None = None


class Format(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct, forbid_unknown_fields=True):
    format: Format | None = None


class Tool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


# Fields of the chat request -> what they are written as here.
_WRITTEN_AS = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
ToolChoice = Literal["auto", "none", "required"] | NamedTool


class ResponsesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1, max_length=512)]
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=2048)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    text: TextOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None


class Responses:
    """One request and its answer."""

    def __init__(self, request_id: str, created_s: int = 0) -> None:
        self._tail = request_id.removeprefix("req-")
        self._created_s = created_s
        self._asked: ResponsesRequest | None = None
        self._sequence = -1
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._finish = "stop"
        self._usage: dict[str, Any] | None = None
        self._started = False

    def request(self, body: bytes) -> bytes:
        """The chat request. Refusal for what there is no chat request for."""
        asked = self._asked = openai.parse(ResponsesRequest, body)
        items = asked.input if isinstance(asked.input, list) else [Item(role="user", content=asked.input)]
        chat: dict[str, Any] = {"model": asked.model, "messages": chat_turns(asked.instructions, items)}
        for name, value in (
            ("max_tokens", asked.max_output_tokens),
            ("temperature", asked.temperature),
            ("top_p", asked.top_p),
            ("user", asked.user),
        ):
            if value is not None:
                chat[name] = value
        form = asked.text.format if asked.text is not None else None
        if form is not None and form.type != "text":
            chat["response_format"] = _chat_format(form)
        if asked.tools:
            chat |= chat_tools(asked.tools, asked.tool_choice)
            if asked.parallel_tool_calls is not None:
                chat["parallel_tool_calls"] = asked.parallel_tool_calls
        if asked.stream:
            chat |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(chat)

    def answer(self, body: bytes) -> bytes:
        chat = decode(body)
        choice = chat.choices[0]
        self._finish = choice.finish_reason or "stop"
        self._count(chat)
        message = choice.message
        if message is not None and (message.content or not message.tool_calls):
            self._output.append(self._message(message.content or "", "completed"))
        for call in (message.tool_calls if message is not None else None) or ():
            self._output.append(self._call(call) | {"status": "completed"})
        return msgspec.json.encode(self._response(self._status))

    def error(self, status: int, body: bytes) -> bytes:
        """It is OpenAI's own shape already; what it says of a field is said of the one the client wrote."""
        refusal = decode(body).error
        name = _WRITTEN_AS.get(refusal.param or "") if refusal is not None else None
        if refusal is None or refusal.param is None or name is None:
            return body
        message = refusal.message.replace(refusal.param, name)
        return openai.encode(openai.error_object(message, refusal.type, refusal.code or "", param=name))

    def event(self, data: bytes) -> bytes:
        """Events of the stream for one chunk of the chat stream."""
        chat = decode(data)
        if chat.error is not None:
            said = {"code": chat.error.code, "message": chat.error.message, "param": chat.error.param}
            return self._say("error", said)
        out = self._start()
        self._count(chat)
        for choice in chat.choices[:1]:
            if choice.delta is not None:
                if choice.delta.content:
                    out += self._add_text(choice.delta.content)
                for call in choice.delta.tool_calls or ():
                    out += self._add_call(call)
            self._finish = choice.finish_reason or self._finish
        return out

    def done(self) -> bytes:
        """The end of the stream."""
        out = self._start() + self._close()
        kind = "response.completed" if self._status == "completed" else "response.incomplete"
        return out + self._say(kind, {"response": self._response(self._status)})

    def ping(self) -> bytes:
        """In place of a comment."""
        return b": waiting\n\n"

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish in ("length", "content_filter") else "completed"

    def _say(self, kind: str, more: dict[str, Any]) -> bytes:
        self._sequence += 1
        return event(kind, {"type": kind, "sequence_number": self._sequence} | more)

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        response = {"response": self._response("in_progress")}
        return self._say("response.created", response) + self._say("response.in_progress", response)

    def _add_text(self, text: str) -> bytes:
        out = b""
        if self._open is None or self._open["type"] != "message":
            out = self._close()
            self._open, self._text = self._message("", "in_progress") | {"content": []}, ""
            out += self._say("response.output_item.added", {"output_index": self._index, "item": self._open})
            out += self._say("response.content_part.added", self._where() | {"part": _part("")})
        self._text += text
        return out + self._say("response.output_text.delta", self._where() | {"delta": text, "logprobs": []})

    def _add_call(self, call: ToolCallPart) -> bytes:
        out = b""
        if call.id is not None:
            out = self._close()
            self._open, self._text = self._call(call) | {"arguments": "", "status": "in_progress"}, ""
            out += self._say("response.output_item.added", {"output_index": self._index, "item": self._open})
        if self._open is not None and call.function is not None and call.function.arguments:
            self._text += call.function.arguments
            where = {"item_id": self._open["id"], "output_index": self._index, "delta": call.function.arguments}
            out += self._say("response.function_call_arguments.delta", where)
        return out

    def _close(self) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        if item["type"] == "message":
            where = {"item_id": item["id"], "output_index": self._index, "content_index": 0}
            out = self._say("response.output_text.done", where | {"text": self._text, "logprobs": []})
            out += self._say("response.content_part.done", where | {"part": _part(self._text)})
            item = self._message(self._text, "completed")
        else:
            where = {"item_id": item["id"], "output_index": self._index, "name": item["name"]}
            out = self._say("response.function_call_arguments.done", where | {"arguments": self._text})
            item = item | {"arguments": self._text, "status": "completed"}
        out += self._say("response.output_item.done", {"output_index": self._index, "item": item})
        self._output.append(item)
        return out

    @property
    def _index(self) -> int:
        return len(self._output)

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": self._index, "content_index": 0}

    def _message(self, text: str, status: str) -> dict[str, Any]:
        item_id = f"msg_{self._tail}{self._index}"
        return {"type": "message", "id": item_id, "status": status, "role": "assistant", "content": [_part(text)]}

    def _call(self, call: ToolCallPart) -> dict[str, Any]:
        name, arguments = "", ""
        if call.function is not None:
            name, arguments = call.function.name or "", call.function.arguments or ""
        item_id = f"fc_{self._tail}{self._index}"
        return {"type": "function_call", "id": item_id, "call_id": call.id, "name": name, "arguments": arguments}

    def _count(self, chat: Chat) -> None:
        if chat.usage is not None:
            self._usage = {
                "input_tokens": chat.usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": cached_tokens(chat.usage), "cache_write_tokens": 0},
                "output_tokens": chat.usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": chat.usage.total_tokens,
            }

    def _response(self, status: str) -> dict[str, Any]:
        asked = self._asked
        assert asked is not None, "a request precedes its answer"
        why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._finish)
        return {
            "id": f"resp_{self._tail}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": why} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": list(self._output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": self._usage,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def chat_turns(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The messages of a chat request. Refusal for an item that lacks what its type needs."""
    turns: list[dict[str, Any]] = []
    if instructions:
        turns.append({"role": "system", "content": instructions})
    for number, item in enumerate(items):
        turn = _turn(item)
        if turn is None:
            message = f"input.{number}: an item of type '{item.type}' lacks what belongs to it"
            raise Refusal("invalid_request", message, param=f"input.{number}")
        calls = turn.get("tool_calls")
        if calls and turns and "tool_calls" in turns[-1]:
            turns[-1]["tool_calls"] += calls  # one turn of the assistant may have made several
        else:
            turns.append(turn)
    return turns


def _turn(item: Item) -> dict[str, Any] | None:
    match item:
        case Item(type="message", role=str(role), content=str() | list() as content):
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            return {"role": role, "content": text}
        case Item(type="function_call", call_id=str(call_id), name=str(name), arguments=str(arguments)):
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case Item(type="function_call_output", call_id=str(call_id), output=str(output)):
            return {"role": "tool", "tool_call_id": call_id, "content": output}
        case _:
            return None


def chat_tools(tools: list[Tool], choice: ToolChoice | None) -> dict[str, Any]:
    """The fields of a chat request that say what may be called."""
    chat: dict[str, Any] = {"tools": [_chat_tool(tool) for tool in tools]}
    if isinstance(choice, NamedTool):
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None:
        chat["tool_choice"] = choice
    return chat


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function = {
        name: value for name in ("name", "parameters", "strict", "description") if (value := getattr(tool, name))
    }
    return {"type": "function", "function": function}


def _chat_format(form: Format) -> dict[str, Any]:
    if form.type == "json_object":
        return {"type": "json_object"}
    fields = ("name", "schema", "strict", "description")
    return {"type": "json_schema", "json_schema": {name: value for name in fields if (value := getattr(form, name))}}
