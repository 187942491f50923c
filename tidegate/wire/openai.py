"""OpenAI's request shapes, error body and SSE framing, as the gateway and the built-in engine speak them. Pure.

Shapes follow https://platform.openai.com/docs/api-reference; `/v1/classify` and `/v1/rerank` follow vLLM. Parsing is
strict: a parameter we do not have is *refused by name* (`unsupported_parameter`), never ignored, unless its value is
null or says what we do anyway (`_HARMLESS`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import REFUSALS, LimitHit, Refusal

CHOICES_MAX = 8
PROMPTS_MAX = 32
INPUTS_MAX = 2048
STOPS_MAX = 4
STOP_CHARS_MAX = 256
LOGIT_BIAS_MAX = 1024
TOP_LOGPROBS_MAX = 20

# ---- requests -------------------------------------------------------------------------------------------------------

Text = str | list[str | int | list[int]]
"""A text, several texts, one list of token ids, or several lists of token ids."""


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`continuous_usage_stats` is vLLM's: usage on every event of the stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text"]


class ContentPart(Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Sampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that chat and text completions share. None means "not given": the model's own default applies."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Text
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class EmbeddingRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/embeddings`."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    input: Text
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class ClassifyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/classify` (vLLM)."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    input: str | list[str]
    user: str | None = None


class RerankRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/rerank` (vLLM, Jina)."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    query: str
    documents: Annotated[list[str], Meta(min_length=1, max_length=INPUTS_MAX)]
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None
    user: str | None = None


class RequestHead(Struct, kw_only=True):
    """What a gateway needs of a body it forwards untouched; everything else is the engine's to check."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None


# ---- parsing --------------------------------------------------------------------------------------------------------

# Parameters we do not have, with the values of them that ask for nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "min_p": (0, 0.0),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "repetition_penalty": (1, 1.0),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
}

T = TypeVar("T")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_AT = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_heads = msgspec.json.Decoder(RequestHead)
_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (ChatRequest, CompletionRequest, EmbeddingRequest, ClassifyRequest, RerankRequest)
}


def parse_head(body: bytes) -> RequestHead:
    """Raises Refusal(invalid_json | invalid_request)."""
    try:
        return _heads.decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("invalid_json", "the request body is not valid JSON") from error


def parse(kind: type[T], body: bytes) -> T:
    """The whole request, strictly. Raises Refusal(invalid_json | invalid_request | unsupported_parameter)."""
    try:
        decoder = _decoders.get(kind)
        if decoder is None:  # a dialect that is translated (`wire.messages`, `wire.responses`)
            decoder = _decoders[kind] = msgspec.json.Decoder(kind)
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        if "unknown field" not in str(error):
            raise _refusal(error) from error
        request = _parse_without_harmless(kind, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("invalid_json", "the request body is not valid JSON") from error
    _check(request)
    return request  # type: ignore[no-any-return]


def _parse_without_harmless(kind: type[T], body: bytes) -> T:
    fields = msgspec.json.decode(body)
    return convert(kind, {k: v for k, v in fields.items() if v is not None and not _is_harmless(k, v)})


def convert(kind: type[T], value: object) -> T:
    """From decoded JSON, strictly. Raises Refusal(invalid_request | unsupported_parameter)."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refusal(error) from error


def _is_harmless(name: str, value: object) -> bool:
    # `1 == True` in Python: the type is compared too, so that `store: 0` is still refused.
    return any(type(value) is type(ok) and value == ok for ok in _HARMLESS.get(name, ()))


_ACCEPTED = {".role": "system, developer, user, assistant", "].type": "text"}


def _refusal(error: msgspec.ValidationError) -> Refusal:
    """msgspec says what and where in prose; the prose holds types and field names, never a value of the request."""
    text = str(error)
    if unknown := _UNKNOWN.search(text):
        name = ".".join(part for part in (unknown[2], unknown[1]) if part)
        return Refusal("unsupported_parameter", f"parameter '{name[:120]}' is not supported", param=name[:120])
    if missing := _MISSING.search(text):
        at = _AT.search(text)
        name = ".".join(part for part in (at[1] if at else "", missing[1]) if part)
        return Refusal("invalid_request", f"missing required parameter: '{name}'", param=name)
    at = _AT.search(text)
    param = at[1].removesuffix("[...]") if at and at[1] else None
    if param == "response_format.type":
        param = "response_format"
        return Refusal("unsupported_parameter", "only response_format of type 'text' is supported", param=param)
    what = _AT.sub("", text)
    if what.startswith(("Invalid enum value", "Invalid value")):  # quotes the value: it stays out of errors
        accepted = next((words for end, words in _ACCEPTED.items() if (param or "").endswith(end)), "")
        what = "Value is not one that is supported" + (f" (accepted: {accepted})" if accepted else "")
    return Refusal("invalid_request", f"{param or 'body'}: {what}", param=param)


def _check(request: object) -> None:
    """What a type cannot say."""
    match request:
        case Sampling():
            _check_sampling(request)
        case EmbeddingRequest():
            _check_texts(request.input, "input", INPUTS_MAX)
        case ClassifyRequest():
            _check_texts(request.input if isinstance(request.input, str) else [*request.input], "input", INPUTS_MAX)
        case _:
            return


def _check_sampling(request: Sampling) -> None:
    stops = request.stops
    if len(stops) > STOPS_MAX:
        raise Refusal("invalid_request", f"stop: at most {STOPS_MAX} strings", param="stop")
    if any(not stop or len(stop) > STOP_CHARS_MAX for stop in stops):
        raise Refusal("invalid_request", f"stop: each string has 1 to {STOP_CHARS_MAX} characters", param="stop")
    if request.stream_options is not None and not request.stream:
        raise Refusal("invalid_request", "stream_options is only allowed with stream", param="stream_options")
    if request.logit_bias is not None:
        if len(request.logit_bias) > LOGIT_BIAS_MAX:
            raise Refusal("invalid_request", f"logit_bias: at most {LOGIT_BIAS_MAX} tokens", param="logit_bias")
        if any(not (token.isascii() and token.isdecimal()) for token in request.logit_bias):
            raise Refusal("invalid_request", "logit_bias: keys are token ids", param="logit_bias")
    if isinstance(request, CompletionRequest):
        _check_texts(request.prompt, "prompt", PROMPTS_MAX)
        if len(texts(request.prompt)) * (request.n or 1) > PROMPTS_MAX:
            raise Refusal("invalid_request", f"prompt: prompts times n is at most {PROMPTS_MAX}", param="prompt")
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise Refusal("invalid_request", "top_logprobs needs logprobs to be true", param="top_logprobs")


def _check_texts(value: Text, param: str, count_max: int) -> None:
    if isinstance(value, str):
        return
    if not value:
        raise Refusal("invalid_request", f"{param}: must not be empty", param=param)
    if len({type(item) for item in value}) > 1:
        raise Refusal("invalid_request", f"{param}: either texts or token ids, not a mixture", param=param)
    if any(isinstance(item, list) and not item for item in value):
        raise Refusal("invalid_request", f"{param}: a list of token ids must not be empty", param=param)
    if not isinstance(value[0], int) and len(value) > count_max:
        raise Refusal("invalid_request", f"{param}: at most {count_max} items", param=param)


def texts(value: Text) -> list[str | list[int]]:
    """`prompt` or `input` as a list of texts or token-id lists (homogeneous: `parse` checked that)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [[item for item in value if isinstance(item, int)]]
    return [item for item in value if not isinstance(item, int)]


# ---- responses ------------------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
    )


encode = msgspec.json.Encoder().encode


def error_object(
    message: str, kind: str, code: str, *, param: str | None = None, limit: LimitHit | None = None
) -> dict[str, Any]:
    """OpenAI's error shape; `limit` is ours and says which limit refused, its current and its full value."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if limit is not None:
        error["limit"] = limit
    return {"error": error}


def refusal_body(refusal: Refusal) -> bytes:
    error = error_object(refusal.message, refusal.type, refusal.code, param=refusal.param, limit=refusal.limit)
    return encode(error)


def error_body(code: str, message: str) -> bytes:
    """The body for a `REFUSALS` code without raising one (e.g. an engine fault shown as `engine_error`)."""
    return encode(error_object(message, REFUSALS[code][1], code))


def refusal_headers(refusal: Refusal) -> Mapping[str, str]:
    """`Retry-After` in whole seconds, rounded up so that a client never comes back too early (RFC 9110 10.2.3)."""
    if refusal.retry_after_ms is None:
        return refusal.headers
    return {**refusal.headers, "retry-after": str(max(1, -(-refusal.retry_after_ms // 1000)))}


# ---- server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) --------------------------

SSE_DATA, SSE_END = b"data: ", b"data: [DONE]"  # how the lines of an event's data, and of the end marker, begin
SSE_DONE = SSE_END + b"\n\n"
SSE_CONTENT_TYPE = "text/event-stream; charset=utf-8"


def sse_event(data: bytes, event_id: int | None = None) -> bytes:
    """`data` is one line (JSON). `event_id` counts completion tokens so far, over all choices of the request."""
    if event_id is None:
        return SSE_DATA + data + b"\n\n"
    return b"id: %d\ndata: " % event_id + data + b"\n\n"


def sse_comment(text: str) -> bytes:
    """Keeps a quiet stream open; clients ignore it."""
    return b": " + text.encode() + b"\n\n"


def sse_error(refusal: Refusal) -> bytes:
    """An error after the first byte: the status is gone, so it travels as an event and the stream ends."""
    return sse_event(refusal_body(refusal))
