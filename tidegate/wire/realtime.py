"""OpenAI's Realtime (platform.openai.com/docs/api-reference/realtime), text only, as chat completions and back. Pure.

A session is a conversation the gateway holds in memory: clients add items to it and ask for responses, each of which is
one chat request over the whole of it. What needs audio is refused by name.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import Refusal
from tidegate.wire import openai, responses
from tidegate.wire.responses import Tool, ToolChoice, chat_tools, chat_turns

ITEMS_MAX = 2048  # what one chat request may have

# --- what clients say -------------------------------------------------------------------------------------------------


class Options(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a session says for all of its responses, and a response for itself. None: not said.

    `temperature` is of the API's first version; without it nobody could ask for the same answer twice.
    """

    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | Literal["inf"] | None = None
    output_modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None


class SessionOptions(Options, forbid_unknown_fields=True, kw_only=True):
    type: Literal["realtime"] = "realtime"
    truncation: Literal["disabled"] | None = None


class Item(responses.Item, forbid_unknown_fields=True, kw_only=True):
    object: Literal["realtime.item"] | None = None


class ResponseOptions(Options, forbid_unknown_fields=True, kw_only=True):
    """`input` is used in place of the conversation; with `conversation` none, the answer is not added to it."""

    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[Item], Meta(max_length=ITEMS_MAX)] | None = None
    metadata: dict[str, str] | None = None


class Event(Struct, forbid_unknown_fields=True, kw_only=True):
    type: str
    event_id: str | None = None


class SessionUpdate(Event, forbid_unknown_fields=True, kw_only=True):
    session: SessionOptions


class ItemCreate(Event, forbid_unknown_fields=True, kw_only=True):
    item: Item
    previous_item_id: str | None = None


class ItemRetrieve(Event, forbid_unknown_fields=True, kw_only=True):
    item_id: str


class ItemDelete(Event, forbid_unknown_fields=True, kw_only=True):
    item_id: str


class ResponseCreate(Event, forbid_unknown_fields=True, kw_only=True):
    response: ResponseOptions = msgspec.field(default_factory=ResponseOptions)


class ResponseCancel(Event, forbid_unknown_fields=True, kw_only=True):
    response_id: str | None = None


ClientEvent = SessionUpdate | ItemCreate | ItemRetrieve | ItemDelete | ResponseCreate | ResponseCancel

_EVENTS: dict[str, type[Event]] = {
    "session.update": SessionUpdate,
    "conversation.item.create": ItemCreate,
    "conversation.item.retrieve": ItemRetrieve,
    "conversation.item.delete": ItemDelete,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}
_HOLDING = ("session", "item", "response")  # objects of an event, in which null is the same as nothing


def event_id(raw: object) -> str | None:
    """What a client calls its event, for the error about it."""
    said = raw.get("event_id") if isinstance(raw, dict) else None
    return said[:512] if isinstance(said, str) else None


def parse(raw: object) -> ClientEvent:
    """One decoded message. Refusal(invalid_request | unsupported_parameter)."""
    if not isinstance(raw, dict) or not isinstance(kind := raw.get("type"), str):
        raise Refusal("invalid_request", "an event is a JSON object with a 'type'", param="type")
    known = _EVENTS.get(kind)
    if known is None:
        names = ", ".join(_EVENTS)
        message = f"'{kind[:80]}' is no event of a text session; accepted are {names}"
        raise Refusal("unsupported_parameter", message, param="type")
    said = {name: _said(value) if name in _HOLDING else value for name, value in raw.items() if value is not None}
    return openai.convert(known, said)  # type: ignore[return-value]


def _said(value: object) -> object:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


# --- the conversation -------------------------------------------------------------------------------------------------


class Conversation:
    """The items of a session in their order; over `bytes_max` or `ITEMS_MAX` nothing is added. Each has an `id`."""

    def __init__(self, session_id: str, model: str, bytes_max: int) -> None:
        self.id = "conv_" + session_id
        self.options = SessionOptions()
        self._session_id = session_id
        self._model = model
        self._items: list[Item] = []
        self._sizes: dict[str | None, int] = {}
        self._bytes = 0
        self._bytes_max = bytes_max
        self._number = 0

    def update(self, options: SessionOptions) -> None:
        """Only what is said changes."""
        said = {name: value for name in options.__struct_fields__ if (value := getattr(options, name)) is not None}
        self.options = msgspec.structs.replace(self.options, **said)

    def session(self, expires_s: int) -> dict[str, Any]:
        """The session object as clients see it."""
        options = self.options
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": "sess_" + self._session_id,
            "model": self._model,
            "output_modalities": ["text"],
            "instructions": options.instructions or "",
            "tools": options.tools or [],
            "tool_choice": options.tool_choice or "auto",
            "max_output_tokens": options.max_output_tokens or "inf",
            "temperature": options.temperature,
            "truncation": "disabled",
            "expires_at": expires_s,
        }

    def new_id(self) -> str:
        self._number += 1
        return f"item_{self._session_id}{self._number}"

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Behind the item `after` ("root": before all), else at the end. The id of the item it now follows.

        Refusal for an item that is too much, or known already, or lacks what its type needs; not_found for `after`.
        """
        chat_turns(None, [item])
        nbytes = len(msgspec.json.encode(item))
        if len(self._items) >= ITEMS_MAX or self._bytes + nbytes > self._bytes_max:
            message = f"the conversation is full: it holds {ITEMS_MAX} items and {self._bytes_max} bytes at most"
            raise Refusal("body_too_large", message, param="item")
        if item.id in self._sizes:
            raise Refusal("conflict", "an item with this id is in the conversation already", param="item.id")
        where = len(self._items) if after is None else 0 if after == "root" else self._where(after) + 1
        self._items.insert(where, item)
        self._size(item, nbytes)
        return self._items[where - 1].id if where else None

    def grown(self, item: Item) -> None:
        """An item has more to say than when it was added: an answer, once it has ended."""
        if item.id in self._sizes:
            self._size(item, len(msgspec.json.encode(item)))

    def _size(self, item: Item, nbytes: int) -> None:
        self._bytes += nbytes - self._sizes.get(item.id, 0)
        self._sizes[item.id] = nbytes

    def find(self, item_id: str) -> Item:
        return self._items[self._where(item_id)]

    def remove(self, item_id: str) -> None:
        self._items.pop(self._where(item_id))
        self._bytes -= self._sizes.pop(item_id)

    def _where(self, item_id: str) -> int:
        for number, item in enumerate(self._items):
            if item.id == item_id:
                return number
        raise Refusal("not_found", "no such item in this conversation", param="item_id")

    def request(self, asked: ResponseOptions) -> bytes:
        """The chat request of one response. Refusal where there is nothing to respond to."""
        items = self._items if asked.input is None else asked.input
        instructions, limit = self._effective(asked, "instructions"), self._effective(asked, "max_output_tokens")
        turns = chat_turns(instructions, items)
        if not turns:
            message = "there is nothing to respond to: neither items nor instructions"
            raise Refusal("invalid_request", message, param="response.input")
        chat: dict[str, Any] = {"model": self._model, "messages": turns, "stream": True}
        if isinstance(limit, int):
            chat["max_tokens"] = limit
        temperature = self._effective(asked, "temperature")
        if temperature is not None:
            chat["temperature"] = temperature
        if tools := self._effective(asked, "tools"):
            chat |= chat_tools(tools, self._effective(asked, "tool_choice"))
        return msgspec.json.encode(chat)

    def output_tokens_max(self, asked: ResponseOptions) -> int | str:
        return self._effective(asked, "max_output_tokens") or "inf"

    def _effective(self, asked: ResponseOptions, name: str) -> Any:
        own = getattr(asked, name)
        return getattr(self.options, name) if own is None else own


def shown(item: Item, status: str = "completed") -> dict[str, Any]:
    """An item as clients see it."""
    said: dict[str, Any] = {"id": item.id, "object": "realtime.item", "type": item.type, "status": status}
    if item.type == "message":
        content = item.content or ()
        kind = "output_text" if item.role == "assistant" else "input_text"
        parts = [(kind, content)] if isinstance(content, str) else [(part.type, part.text) for part in content]
        return said | {"role": item.role, "content": [{"type": kind, "text": text} for kind, text in parts]}
    for name in ("call_id", "name", "arguments", "output"):
        if (value := getattr(item, name)) is not None:
            said[name] = value
    return said


def error(refusal: Refusal, about: str | None) -> dict[str, Any]:
    """The `error` event; `about` is the id of the client's event that it answers."""
    said = {"type": refusal.type, "code": refusal.code, "message": refusal.message, "param": refusal.param}
    return {"error": said | {"event_id": about}}
