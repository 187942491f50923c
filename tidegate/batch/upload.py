"""A multipart upload on its way into the vault: parsed as it comes, encrypted frame by frame, never whole in memory and
never in the clear on disk.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from tidegate.batch.ports import Writer
from tidegate.domain.errors import Refusal
from tidegate.wire.batch import FILE_BYTES_MAX

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FRAME_BYTES = 64 << 10  # every frame of an uploaded file but the last: so a position names its frame
FIELD_BYTES_MAX = 4 << 10
FIELDS_MAX = 16
FILENAME_CHARS_MAX = 512


@dataclass
class Upload:
    """What came besides the content: `fields` by name, the file's own name, how many bytes it has."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0


async def receive(request: Request, writer: Writer) -> Upload:
    """Reads one form with one part `file`. Refusal for what is not one, is cut short or is too large."""
    content_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if content_type != b"multipart/form-data" or not boundary:
        raise Refusal("invalid_request", "the body must be multipart/form-data with a part `file`")
    sink = _Sink(writer)
    parser = MultipartParser(boundary, sink.callbacks())
    try:
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except FormParserError:
        raise Refusal("invalid_request", "the multipart body is malformed") from None
    if not sink.ended:
        raise Refusal("invalid_request", "the upload ends before its last boundary: it was cut short", param="file")
    if sink.upload.filename is None:
        raise Refusal("invalid_request", "missing required parameter: 'file'", param="file")
    sink.flush()
    return sink.upload


class _Sink:
    """The parser's callbacks: one part at a time, the file's into the vault, others into memory."""

    def __init__(self, writer: Writer) -> None:
        self.upload = Upload()
        self.ended = False
        self._writer = writer
        self._buffer = bytearray()
        self._value = bytearray()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._name = ""
        self._is_file = False

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self.on_part_begin,
            "on_part_data": self.on_part_data,
            "on_part_end": self.on_part_end,
            "on_header_field": self.on_header_field,
            "on_header_value": self.on_header_value,
            "on_header_end": self.on_header_end,
            "on_headers_finished": self.on_headers_finished,
            "on_end": self.on_end,
        }

    def flush(self) -> None:
        if self._buffer:
            self._writer.append(bytes(self._buffer))
            self._buffer.clear()

    def on_part_begin(self) -> None:
        self._name, self._is_file = "", False
        self._value.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if bytes(self._header_name).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            filename = options.get(b"filename")
            if self._name == "file" and filename is not None:
                if self.upload.filename is not None:
                    raise Refusal("invalid_request", "there is more than one part `file`", param="file")
                self.upload.filename = filename.decode("utf-8", "replace")[:FILENAME_CHARS_MAX]
                self._is_file = True
        self._header_name.clear()
        self._header_value.clear()

    def on_headers_finished(self) -> None:
        if not self._name:
            raise Refusal("invalid_request", "a part of the form has no name")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value += data[start:end]
            if len(self._value) > FIELD_BYTES_MAX:
                raise Refusal("invalid_request", f"a form field is over {FIELD_BYTES_MAX} bytes")
            return
        self.upload.size += end - start
        if self.upload.size > FILE_BYTES_MAX:
            message = f"the file is over the limit of {FILE_BYTES_MAX >> 20} MB for a batch input file"
            raise Refusal("body_too_large", message, param="file")
        self._buffer += data[start:end]
        while len(self._buffer) >= FRAME_BYTES:
            self._writer.append(bytes(self._buffer[:FRAME_BYTES]))
            del self._buffer[:FRAME_BYTES]

    def on_part_end(self) -> None:
        if not self._is_file:
            if len(self.upload.fields) >= FIELDS_MAX:
                raise Refusal("invalid_request", f"the form has more than {FIELDS_MAX} fields")
            self.upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.ended = True
