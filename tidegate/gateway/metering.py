"""Engines that are not ours: what is asked of them, and how their tokens are counted while they pass through.

Asked for it, vLLM and SGLang put usage so far on every event (``continuous_usage_stats``), llama.cpp its own counts
(``timings_per_token``). The last one that was sent on is exactly what was delivered, so a stream that is cut off is
billed to the token. It is cut out again, as bytes and unparsed, where the client did not ask: some clients add up what
they see. Others send usage once, at the end; of their cut-off streams only the delivered pieces can be counted.
"""

import hashlib
import re

import msgspec
from msgspec import Struct

from tidegate.domain.errors import EngineFault
from tidegate.domain.usage import CountSource
from tidegate.gateway import runtime_lora
from tidegate.gateway.events import NumberedEvents, Tokens
from tidegate.gateway.intake import Call

_USAGE = b'"usage":'
_NO_CHOICES = b'"choices":[]'
# A quote inside a JSON string is escaped, so `,"usage":{` is a field and never a model's text.
_USAGE_FIELD = re.compile(rb',"usage":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|null)')
_TIMINGS_FIELD = re.compile(rb',"timings":(\{[^{}]*\})')
_TEXT_PIECE = re.compile(rb'"(?:content|text|arguments|reasoning_content)": ?"[^"]')


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Timings(Struct):
    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


class _Answer(Struct):
    usage: _Usage | None = None


class _Chunk(Struct):
    usage: _Usage | None = None
    choices: list[object] = []


_answers = msgspec.json.Decoder(_Answer)
_chunks = msgspec.json.Decoder(_Chunk)
_usages = msgspec.json.Decoder(_Usage)
_timings = msgspec.json.Decoder(_Timings)


class UsageEvents(NumberedEvents):
    """Meter of ``usage_event`` engines: usage comes once, in the last event, which is taken out unless `show`.

    A stream cut off before it is counted by the pieces of text that were sent: each holds a token at least, so this is
    never too much, and the prompt, which nobody told, is not billed.
    """

    __slots__ = ("_pieces", "_show", "_usage")

    def __init__(self, show: bool, bytes_max: int) -> None:
        super().__init__(0, 0, bytes_max)
        self._show = show
        self._usage: Tokens | None = None
        self._pieces = 0

    def pass_on(self, piece: bytes) -> bytes:
        whole = super().pass_on(piece)
        if _USAGE not in whole:
            return whole
        return b"".join(event + b"\n\n" for event in whole.split(b"\n\n")[:-1] if not self._is_taken_out(event))

    def sent(self, events: bytes) -> None:
        self._pieces += len(_TEXT_PIECE.findall(events))

    def _is_taken_out(self, event: bytes) -> bool:
        if _USAGE not in event or not event.startswith(b"data: "):
            return False
        try:
            chunk = _chunks.decode(event[6:])
        except msgspec.DecodeError:
            return False
        if chunk.usage is None:
            return False
        self._usage = _tokens(chunk.usage, CountSource.ENGINE_USAGE)
        return not self._show and not chunk.choices

    def tokens(self) -> Tokens:
        if self._usage is not None:
            return self._usage
        return Tokens(output=self._pieces, source=CountSource.DELIVERED_PIECES if self._pieces else CountSource.NONE)


class CountedEvents(UsageEvents):
    """Meter of engines that put their counts on every event. `hide`: they are cut out before the client sees them."""

    __slots__ = ("_delivered", "_field", "_hide", "_passing")

    def __init__(self, field: str, show: bool, hide: bool, bytes_max: int) -> None:
        super().__init__(show, bytes_max)
        self._field = _TIMINGS_FIELD if field == "timings" else _USAGE_FIELD
        self._hide = hide
        self._passing = b""
        self._delivered = b""

    def pass_on(self, piece: bytes) -> bytes:
        whole = NumberedEvents.pass_on(self, piece)
        counts = self._field.findall(whole)
        if counts:
            # The last that says a number: `"usage":null` stands on events that have none.
            self._passing = next((count for count in reversed(counts) if count != b"null"), self._passing)
        if _NO_CHOICES in whole:
            return b"".join(self._without_counts(event) for event in whole.split(b"\n\n")[:-1])
        return self._field.sub(b"", whole) if counts and self._hide else whole

    def sent(self, events: bytes) -> None:
        self._delivered = self._passing

    def _without_counts(self, event: bytes) -> bytes:
        """The last event, whose choices are empty, is the one that may keep its usage."""
        if _NO_CHOICES in event:
            if self._is_taken_out(event):
                return b""
            if self._usage is not None:
                return event + b"\n\n"
        return (self._field.sub(b"", event) if self._hide else event) + b"\n\n"

    def tokens(self) -> Tokens:
        if self._usage is not None:
            return self._usage
        if not self._delivered:
            return Tokens()
        try:
            if self._field is _TIMINGS_FIELD:
                counts = _timings.decode(self._delivered)
                prompt = counts.prompt_n + counts.cache_n
                return Tokens(prompt, counts.cache_n, counts.predicted_n, CountSource.DELIVERED_EVENT)
            return _tokens(_usages.decode(self._delivered), CountSource.DELIVERED_EVENT)
        except msgspec.DecodeError:
            return Tokens()


def meter_of(call: Call, bytes_max: int) -> UsageEvents:
    """The meter of one stream of a foreign engine. llama.cpp's own counts are never shown: they are not OpenAI's."""
    metering = call.entry.metering
    if metering == "usage_event":
        return UsageEvents(call.wants_usage, bytes_max)
    return CountedEvents(metering, call.wants_usage, metering == "timings" or not call.wants_each_usage, bytes_max)


def usage_of(answer: bytes) -> Tokens:
    """What a unary answer says it used. EngineFault when it is not JSON or its usage is not OpenAI's."""
    try:
        usage = _answers.decode(answer).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineFault("the engine's answer is not JSON") from error
    return Tokens() if usage is None else _tokens(usage, CountSource.ENGINE_USAGE)


def _tokens(usage: _Usage, source: CountSource) -> Tokens:
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details else 0
    return Tokens(usage.prompt_tokens, cached, usage.completion_tokens or 0, source)


def for_engine(call: Call) -> bytes:
    """The body as a foreign engine is to get it: the model's name there, its counts asked for, cached prefixes kept
    apart by tenant. Everything else keeps its exact bytes.
    """
    entry = call.entry
    request = msgspec.json.decode(call.body, type=dict[str, msgspec.Raw])
    adapter = runtime_lora.name_of(entry) if entry.adapter else ""
    request["model"] = _raw(entry.remote.model if entry.remote else adapter or entry.endpoint)
    if call.stream:
        options = msgspec.json.decode(request.get("stream_options", msgspec.Raw(b"null"))) or {}
        options["include_usage"] = True
        if entry.metering == "usage_continuous":
            options["continuous_usage_stats"] = True
        elif entry.metering == "timings":
            request["timings_per_token"] = msgspec.Raw(b"true")
        request["stream_options"] = _raw(options)
    if entry.cache_salt:
        own = bytes(request.get("cache_salt", msgspec.Raw(b"")))
        request["cache_salt"] = _raw(hashlib.sha256(call.tenant.encode() + b"\0" + own).hexdigest())
    return msgspec.json.encode(request)


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
