"""Server-sent events on their way through: whole events only, counted without being parsed.

The built-in engine numbers each event with the completion tokens generated so far (``id: N``), so the number on the
last event that was sent on is exactly what was delivered. Other engines: `gateway.metering`.
"""

from typing import Protocol

from msgspec import Struct

from tidegate.domain.errors import EngineFault
from tidegate.domain.usage import CountSource
from tidegate.wire.openai import SSE_DONE

_ID = b"id: "
_ID_INSIDE = b"\nid: "


class Tokens(Struct, frozen=True):
    """`input` includes `cached`."""

    input: int = 0
    cached: int = 0
    output: int = 0
    source: CountSource = CountSource.NONE


class Meter(Protocol):
    """What a relay needs of a stream's metering. `done` is True once the end marker has come; it is never passed on, so
    that the relay can hold it back until the record is durable.
    """

    done: bool

    def pass_on(self, piece: bytes) -> bytes:
        """The whole events that `piece` completes, to be sent now. EngineFault when an event is over the bound."""
        ...

    def sent(self, events: bytes) -> None:
        """`events`, which `pass_on` returned, have really been sent."""
        ...

    def tokens(self) -> Tokens:
        """What the events sent so far come to."""
        ...


class NumberedEvents:
    """Meter of ``sse_id`` engines. `input_tokens` and `cached_tokens` are from the engine's response head."""

    __slots__ = ("_bytes_max", "_cached", "_input", "_last", "_partial", "done")

    def __init__(self, input_tokens: int, cached_tokens: int, bytes_max: int) -> None:
        self._input = input_tokens
        self._cached = cached_tokens
        self._bytes_max = bytes_max
        self._partial = b""
        self._last = b""
        self.done = False

    def pass_on(self, piece: bytes) -> bytes:
        if self._partial:
            piece = self._partial + piece
            self._partial = b""
        if not piece.endswith(b"\n\n"):
            piece = self._keep_partial(piece)
        if piece.endswith(SSE_DONE) and (len(piece) == len(SSE_DONE) or piece[-len(SSE_DONE) - 1] == 10):
            self.done = True
            piece = piece[: -len(SSE_DONE)]
        return piece

    def sent(self, events: bytes) -> None:
        # Only the last numbered event matters; JSON escapes newlines, so a line that begins with `id: ` is not text.
        if events.startswith(_ID) or _ID_INSIDE in events:
            self._last = events

    def _keep_partial(self, piece: bytes) -> bytes:
        whole = piece.rfind(b"\n\n") + 2
        if whole == 1:
            whole = 0
        self._partial = piece[whole:]
        if not whole and len(self._partial) > self._bytes_max:
            raise EngineFault(f"the engine sent an event over {self._bytes_max} bytes")
        return piece[:whole]

    def tokens(self) -> Tokens:
        last = self._last
        start = last.rfind(_ID_INSIDE) + len(_ID_INSIDE)  # -1 + 5 = 4 is right behind an id at the very beginning
        number = last[start : last.find(b"\n", start)]
        output = int(number) if number.isdigit() else 0
        return Tokens(self._input, self._cached, output, CountSource.DELIVERED_EVENT if output else CountSource.NONE)
