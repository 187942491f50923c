"""The bytes of a journal: how one usage record is framed, found again after damage, and laid out in files.

    <root>/<boot>/lock            flock held exclusively while the gateway of that boot lives
    <root>/<boot>/ballast         reserved space, given up when the disk is full
    <root>/<boot>/00000001.log    frames, append-only

A frame is ``MARKER | length u32 | CRC-32 of length and body u32 | body`` (big endian); the body is the record as
JSON. JSON is UTF-8, so the marker's first byte 0xFF never occurs in a body, and a reader that met damage finds the
next frame by it. Light on purpose: the gateway imports this module, and nothing but the standard library and msgspec
comes with it.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from tidegate.domain.usage import UsageRecord

MARKER = b"\xffTG1"
HEADER = struct.Struct(">4sII")
RECORD_BYTES_MAX = 64 << 10
TOKENS_MAX = 1_000_000_000
EPOCH_MS_MAX = 253_402_300_799_000  # the end of the year 9999
LOCK_NAME = "lock"
BALLAST_NAME = "ballast"
SEGMENT_SUFFIX = ".log"
QUARANTINE_NAME = "quarantine"

_BACKSLASH, _NUL = 0x5C, b"\\u0000"  # ids rarely need any escape, and one byte is found much faster than six

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(UsageRecord).decode


class Frame(NamedTuple):
    """A whole frame: `body` and where the next one begins."""

    body: bytes
    end: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The bytes from here on could be a frame whose rest is not in the buffer."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """No frame begins here."""


def encode_frame(record: UsageRecord) -> bytes:
    """One record as a frame. A record over `RECORD_BYTES_MAX` is a bug of whoever made it: ids and counts are small."""
    body = _encode(record)
    assert len(body) <= RECORD_BYTES_MAX, "usage record too large"
    return HEADER.pack(MARKER, len(body), zlib.crc32(body, len(body))) + body


def decode_body(body: bytes) -> UsageRecord | None:
    """The record, or None when the body is intact but not a record that can be posted: of another version, with
    counts no request can have, or with a NUL, which PostgreSQL refuses. One such record must not stop all that follow
    it.
    """
    try:
        r = _decode(body)
    except msgspec.MsgspecError:
        return None
    counted = 0 <= r.cached_tokens <= r.input_tokens <= TOKENS_MAX and 0 <= r.output_tokens <= TOKENS_MAX
    # A clock that was set back may make a duration negative; that must not cost anybody a record.
    timed = (
        0 <= r.arrived_ms <= EPOCH_MS_MAX
        and -EPOCH_MS_MAX <= r.first_token_ms <= EPOCH_MS_MAX
        and -EPOCH_MS_MAX <= r.ended_ms <= EPOCH_MS_MAX
        and -EPOCH_MS_MAX <= r.queue_ms <= EPOCH_MS_MAX
        and -EPOCH_MS_MAX <= r.activation_ms <= EPOCH_MS_MAX
    )
    return r if counted and timed and (_BACKSLASH not in body or _NUL not in body) else None


def intact_run(buffer: bytes, offset: int, records_max: int) -> tuple[list[UsageRecord], int]:
    """Records of the intact frames from `offset` on, and where the first one begins that is not (or may not be). What
    a reader does nearly all the time, so without an object a frame; the rest is `frame_at`'s.
    """
    records: list[UsageRecord] = []
    head, unpack, crc_of, size = HEADER.size, HEADER.unpack_from, zlib.crc32, len(buffer)
    body_at = offset + head
    while body_at <= size and len(records) < records_max:
        marker, length, crc = unpack(buffer, body_at - head)
        end = body_at + length
        if marker != MARKER or length > RECORD_BYTES_MAX or end > size:
            break
        body = buffer[body_at:end]
        if crc_of(body, length) != crc or (record := decode_body(body)) is None:
            break
        records.append(record)
        body_at = end + head
    return records, body_at - head


def frame_at(buffer: bytes, offset: int) -> Frame | Cut | Damaged:
    """What begins at `offset` of `buffer`."""
    body_at = offset + HEADER.size
    if body_at > len(buffer):
        head = buffer[offset : offset + len(MARKER)]
        return Cut() if MARKER.startswith(head) else Damaged()
    marker, length, crc = HEADER.unpack_from(buffer, offset)
    if marker != MARKER or length > RECORD_BYTES_MAX:
        return Damaged()
    end = body_at + length
    if end > len(buffer):
        return Cut()
    body = buffer[body_at:end]
    return Frame(body, end) if zlib.crc32(body, length) == crc else Damaged()


def next_frame(buffer: bytes, offset: int, *, whole: bool) -> int:
    """Where to go on after damage at `offset`: the next offset > `offset` with an intact frame.

    When the buffer is not the `whole` rest of its segment, an offset where a frame may be cut counts as well. Without
    any, the end of the buffer.
    """
    at = buffer.find(MARKER[:1], offset + 1)
    while at != -1:
        match frame_at(buffer, at):
            case Frame():
                return at
            case Cut() if not whole:
                return at
            case _:
                at = buffer.find(MARKER[:1], at + 1)
    return len(buffer)


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}{SEGMENT_SUFFIX}"


def segment_numbers(directory: Path) -> list[int]:
    """Numbers of the segments of one boot, ascending."""
    names = (path.name for path in directory.glob(f"*{SEGMENT_SUFFIX}"))
    return sorted(int(name[: -len(SEGMENT_SUFFIX)]) for name in names if name[: -len(SEGMENT_SUFFIX)].isdigit())


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable: a file that is synced may otherwise be gone after a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
