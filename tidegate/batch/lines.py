"""Reading an input file: every line checked as OpenAI's Batch API checks it, then put into the order it is done in."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from tidegate.batch.ports import Reader
from tidegate.batch.upload import FRAME_BYTES
from tidegate.domain.errors import Refusal
from tidegate.wire.batch import CUSTOM_ID_CHARS_MAX, LINES_MAX, InputLine, LineError

ERRORS_MAX = 100
PREFIX_BYTES = 512  # of a body: beyond what JSON and a short prompt have in common, within a shared system prompt

_parse = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_text = msgspec.json.Decoder(str).decode
_line = msgspec.json.Decoder(InputLine).decode


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line is: `number` counts from 1, `position` and `length` are bytes of the file."""

    number: int
    position: int
    length: int


@dataclass(slots=True)
class Checked:
    """A whole input file. `order` is empty where there are `errors`; `numbers` finds a line by its custom_id."""

    order: list[Line]
    numbers: dict[str, int]
    errors: list[LineError]
    model: str = ""


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(code)
        self.code, self.message, self.param = code, message, param


def check(reader: Reader, url: str, line_bytes_max: int, resolve: Callable[[str], str]) -> Checked:
    """Reads all of it. `resolve` gives the endpoint of a model's name, or Refusal (which becomes a line's error).

    All lines name one model, as OpenAI wants it. At most `ERRORS_MAX` errors are listed.
    """
    checked = Checked([], {}, [])
    found: list[tuple[bytes, Line]] = []
    resolved: dict[str, str] = {}
    for line, raw in _split(reader, line_bytes_max):
        if len(checked.errors) >= ERRORS_MAX:
            break
        if len(found) >= LINES_MAX:
            message = f"The batch input file has more than {LINES_MAX} requests."
            checked.errors.append(LineError(code="too_many_requests", message=message, line=line.number))
            break
        try:
            if raw is None:
                raise _Wrong("request_too_large", f"This line is over {line_bytes_max} bytes.", None)
            custom_id, body = _check_line(raw, url, checked.numbers)
            _check_model(body, checked, resolved, resolve)
        except _Wrong as wrong:
            error = LineError(code=wrong.code, message=wrong.message, param=wrong.param, line=line.number)
            checked.errors.append(error)
            continue
        checked.numbers[custom_id] = line.number
        found.append((hashlib.blake2b(bytes(body)[:PREFIX_BYTES], digest_size=8).digest(), line))
    if not found and not checked.errors:
        checked.errors.append(LineError(code="empty_file", message="The batch input file has no requests."))
    if not checked.errors:
        checked.order = _packed(found)
    return checked


def read(reader: Reader, line: Line) -> InputLine:
    """One line that `check` has passed."""
    first, offset = divmod(line.position, FRAME_BYTES)
    last = (line.position + line.length - 1) // FRAME_BYTES
    data = b"".join(reader.frame(number) for number in range(first, last + 1))
    return _line(data[offset : offset + line.length])


def _packed(found: list[tuple[bytes, Line]]) -> list[Line]:
    """Lines that begin alike one after the other, for engines that keep a prefix; longest first within them, and then
    the rest by length: neighbours in a batch end together, and the long ones are not left for the end.
    """
    common = Counter(prefix for prefix, _ in found)
    return [
        line
        for _, line in sorted(
            found, key=lambda one: (common[one[0]] == 1, one[0] if common[one[0]] > 1 else b"", -one[1].length)
        )
    ]


def _split(reader: Reader, line_bytes_max: int) -> Iterator[tuple[Line, bytes | None]]:
    """Lines with something in them; None in place of one that is too long."""
    rest = bytearray()
    position = number = 0
    for frame in reader.frames():
        pieces = frame.split(b"\n")
        for piece in pieces[:-1]:
            number += 1
            rest += piece
            yield from _one(number, position, rest, line_bytes_max)
            position += len(rest) + 1
            rest.clear()
        rest += pieces[-1]
    if rest:
        yield from _one(number + 1, position, rest, line_bytes_max)


def _one(number: int, position: int, raw: bytearray, bytes_max: int) -> Iterator[tuple[Line, bytes | None]]:
    if raw.strip():
        yield Line(number, position, len(raw)), bytes(raw) if len(raw) <= bytes_max else None


def _check_line(raw: bytes, url: str, known: dict[str, int]) -> tuple[str, msgspec.Raw]:
    try:
        fields = _parse(raw.decode())  # a wrong encoding inside a text would otherwise pass here and fail later
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _Wrong("invalid_json_line", "This line is not parseable as valid JSON.", None) from None
    for name in ("custom_id", "method", "url", "body"):
        if name not in fields or bytes(fields[name]) == b"null":
            raise _Wrong("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    custom_id = _as_text(fields["custom_id"], "custom_id")
    if not 0 < len(custom_id) <= CUSTOM_ID_CHARS_MAX:
        raise _Wrong("invalid_value", f"custom_id has 1 to {CUSTOM_ID_CHARS_MAX} characters.", "custom_id")
    if custom_id in known:
        message = f"The custom_id of this line is that of line {known[custom_id]}: it must be unique in the file."
        raise _Wrong("duplicate_custom_id", message, "custom_id")
    if _as_text(fields["method"], "method") != "POST":
        raise _Wrong("invalid_method", "Only POST is supported.", "method")
    if _as_text(fields["url"], "url") != url:
        raise _Wrong("invalid_url", f"The url of this line is not the batch's endpoint, {url}.", "url")
    return custom_id, fields["body"]


def _as_text(raw: msgspec.Raw, name: str) -> str:
    try:
        return _text(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _Wrong("invalid_type", f"Invalid type for '{name}': expected a string.", name) from None


def _check_model(raw: msgspec.Raw, checked: Checked, resolved: dict[str, str], resolve: Callable[[str], str]) -> None:
    try:
        body = _parse(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _Wrong("invalid_type", "Invalid type for 'body': expected an object.", "body") from None
    if "model" not in body:
        raise _Wrong("missing_required_parameter", "Missing required parameter: 'body.model'.", "body.model")
    if bytes(body.get("stream", b"false")) == b"true":
        raise _Wrong("unsupported_parameter", "Streaming is not supported in a batch.", "body.stream")
    name = _as_text(body["model"], "body.model")
    if name not in resolved:
        try:
            resolved[name] = resolve(name)
        except Refusal as refusal:
            raise _Wrong(refusal.code, refusal.message, "body.model") from None
    if checked.model and resolved[name] != checked.model:
        message = "All lines of a batch must name the same model; this one names another than the lines before it."
        raise _Wrong("mismatched_model", message, "body.model")
    checked.model = resolved[name]
