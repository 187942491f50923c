"""The journals of a gateway that is on another machine than the ledger, as bytes to be shipped there, in order."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tidegate.domain.errors import StoreFault
from tidegate.stores.journal_format import segment_numbers, segment_path
from tidegate.stores.journal_reader import SegmentJournalReader


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes at `offset` of `segment`. Without any: nothing more for now, or for ever when `ended`."""

    segment: int
    offset: int
    data: bytes
    ended: bool = False


class JournalTail:
    """Implements `gateway.shipping.Tail` over the directory of a gateway's journals. Blocks on a disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._reader = SegmentJournalReader(root)

    def boots(self) -> list[str]:
        return self._reader.boots()

    def read(self, boot: str, segment: int, offset: int, bytes_max: int) -> Piece:
        """What comes after `offset` of `segment`; with segment 0, from the beginning. Raises StoreFault."""
        try:
            # The order matters, as for a reader: what is listed after the writer was seen dead is all there is.
            dead = self._reader.is_dead(boot)
            numbers = segment_numbers(self._root / boot)
            for number in (n for n in numbers if n >= segment):
                start = offset if number == segment else 0
                if data := _read(segment_path(self._root / boot, number), start, bytes_max):
                    return Piece(number, start, data)
        except OSError as error:
            raise StoreFault(f"the journal cannot be read: {error.strerror}") from error
        return Piece(segment, offset, b"", ended=dead)

    def forget(self, boot: str, segment: int) -> None:
        """Segments before `segment` are on the other side's disk. Raises StoreFault."""
        try:
            for number in segment_numbers(self._root / boot):
                if number < segment:
                    segment_path(self._root / boot, number).unlink()
        except OSError as error:
            raise StoreFault(f"shipped journal segments cannot be removed: {error.strerror}") from error

    def remove(self, boot: str) -> None:
        """The whole journal of a gateway that is gone, all of it shipped. Raises StoreFault."""
        try:
            shutil.rmtree(self._root / boot)
        except OSError as error:
            raise StoreFault(f"a shipped journal cannot be removed: {error.strerror}") from error


def _read(path: Path, offset: int, bytes_max: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, bytes_max, offset)
    finally:
        os.close(descriptor)
