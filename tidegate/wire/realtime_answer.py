"""One response of a Realtime session, from the chunks of its chat stream to the events a client gets. Pure."""

from collections.abc import Iterator
from typing import Any

from tidegate.domain.errors import Refusal
from tidegate.wire.chat_stream import ErrorBody, ToolCallPart, decode
from tidegate.wire.realtime import Conversation, Item, ResponseOptions, shown
from tidegate.wire.responses import TextPart

Said = tuple[str, dict[str, Any]]
"""An event: its type, and its other fields but `event_id`."""

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


class Answer:
    """`start`, then a `chunk` after the other, then `end`. An item has its place in the conversation from its first
    token on, and what it said once it has ended.
    """

    def __init__(self, response_id: str, conversation: Conversation, asked: ResponseOptions) -> None:
        self.id = response_id
        self._conversation = conversation
        self._asked = asked
        self._adds = asked.conversation != "none"
        self._output: list[dict[str, Any]] = []
        self._open: Item | None = None
        self._follows: str | None = None
        self._text = ""
        self._finish = ""
        self._error: dict[str, Any] | None = None

    def start(self) -> Iterator[Said]:
        yield "response.created", {"response": self._response("in_progress", None, None)}

    def fail(self, refusal: Refusal) -> None:
        self._error = {"type": refusal.type, "code": refusal.code, "message": refusal.message}

    def chunk(self, data: bytes) -> Iterator[Said]:
        """`data` is an event of the chat stream, or the body of a refusal."""
        chat = decode(data)
        if chat.error is not None:
            self._error = _error(chat.error)
            return
        for choice in chat.choices[:1]:
            if choice.delta is not None:
                if choice.delta.content:
                    yield from self._add_text(choice.delta.content)
                for call in choice.delta.tool_calls or ():
                    yield from self._add_call(call)
            self._finish = choice.finish_reason or self._finish

    def end(self, *, cancelled: bool, input_tokens: int, cached_tokens: int, output_tokens: int) -> Iterator[Said]:
        """However it ended; tokens are those of its usage record."""
        reason = _INCOMPLETE.get(self._finish)
        status, details = "completed", None
        if self._error is not None:
            status, details = "failed", {"type": "failed", "error": self._error}
        elif cancelled:
            status, details = "cancelled", {"type": "cancelled", "reason": "client_cancelled"}
        elif reason is not None:
            status, details = "incomplete", {"type": "incomplete", "reason": reason}
        yield from self._close("completed" if status == "completed" else "incomplete")
        usage = {
            "total_tokens": input_tokens + output_tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "input_token_details": {"text_tokens": input_tokens, "audio_tokens": 0, "cached_tokens": cached_tokens},
            "output_token_details": {"text_tokens": output_tokens, "audio_tokens": 0},
        }
        yield "response.done", {"response": self._response(status, details, usage)}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _add_text(self, text: str) -> Iterator[Said]:
        if self._open is None or self._open.type != "message":
            yield from self._begin(Item(type="message", role="assistant", content=[]))
            yield "response.content_part.added", self._where() | {"part": {"type": "text", "text": ""}}
        self._text += text
        yield "response.output_text.delta", self._where() | {"delta": text}

    def _add_call(self, call: ToolCallPart) -> Iterator[Said]:
        function = call.function
        if call.id is not None:
            name = (function.name if function is not None else None) or ""
            yield from self._begin(Item(type="function_call", call_id=call.id, name=name, arguments=""))
        if self._open is not None and self._open.type == "function_call" and function is not None:
            arguments = function.arguments or ""
            self._text += arguments
            where = self._place() | {"call_id": self._open.call_id}
            yield "response.function_call_arguments.delta", where | {"delta": arguments}

    def _begin(self, item: Item) -> Iterator[Said]:
        yield from self._close("completed")
        item.id = self._conversation.new_id()
        self._open, self._text = item, ""
        said = shown(item, "in_progress")
        yield "response.output_item.added", {"response_id": self.id, "output_index": len(self._output), "item": said}
        if self._adds:
            try:
                self._follows = self._conversation.add(item)
            except Refusal as refusal:  # full: it is said, and not remembered
                self._adds = False
                self.fail(refusal)
                return
            yield "conversation.item.added", {"item": said, "previous_item_id": self._follows}

    def _close(self, status: str) -> Iterator[Said]:
        """What was generated of an item is in the conversation, whole or not, as the client has seen it."""
        item = self._open
        if item is None:
            return
        if item.type == "message":
            where, part = self._where(), {"type": "text", "text": self._text}
            yield "response.output_text.done", where | {"text": self._text}
            yield "response.content_part.done", where | {"part": part}
            item.content = [TextPart("output_text", self._text)]
        else:
            where = self._place() | {"call_id": item.call_id, "name": item.name}
            yield "response.function_call_arguments.done", where | {"arguments": self._text}
            item.arguments = self._text
        said = shown(item, status)
        yield "response.output_item.done", {"response_id": self.id, "output_index": len(self._output), "item": said}
        self._open = None
        self._output.append(said)
        if self._adds:
            self._conversation.grown(item)
            yield "conversation.item.done", {"item": said, "previous_item_id": self._follows}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"response_id": self.id, "item_id": self._open.id, "output_index": len(self._output)}

    def _where(self) -> dict[str, Any]:
        return self._place() | {"content_index": 0}

    def _response(self, status: str, details: object, usage: object) -> dict[str, Any]:
        asked = self._asked
        return {
            "object": "realtime.response",
            "id": self.id,
            "status": status,
            "status_details": details,
            "output": list(self._output),
            "conversation_id": self._conversation.id if self._adds else None,
            "output_modalities": ["text"],
            "max_output_tokens": self._conversation.output_tokens_max(asked),
            "metadata": asked.metadata,
            "usage": usage,
        }


def _error(body: ErrorBody) -> dict[str, Any]:
    return {"type": body.type, "code": body.code, "message": body.message}
