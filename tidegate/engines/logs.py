"""What a child program prints: kept in two bounded files and a tail in memory. Never prompt text (engines log none)."""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 << 10
_LINE_BYTES_MAX = 2_000


class LogRing:
    """Reads a child's output pipe into `path` (and `path`.1 once full); `tail` is the last lines.

    `file_bytes_max` bounds each of the two files, `lines_max` the tail; a line longer than 2,000 bytes is cut.
    """

    def __init__(self, path: Path, *, file_bytes_max: int = 1 << 20, lines_max: int = 200) -> None:
        self._path, self._file_bytes_max = path, file_bytes_max
        self._lines: deque[str] = deque(maxlen=lines_max)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        os.chmod(path, 0o600)
        self._readers: dict[int, bytes] = {}  # pipe → the line it has begun
        self._tails: dict[int, deque[str]] = {}

    def open_pipe(self, tail: deque[str] | None = None) -> int:
        """A descriptor for a child to write to; its lines go to `tail` too. The caller closes its copy once the child
        has it.
        """
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._readers[reader] = b""
        if tail is not None:
            self._tails[reader] = tail
        asyncio.get_running_loop().add_reader(reader, self._readable, reader)
        return writer

    @property
    def tail(self) -> Sequence[str]:
        return tuple(self._lines)

    def close(self) -> None:
        for reader in tuple(self._readers):
            self._forget(reader)
        self._file.close()

    def _readable(self, reader: int) -> None:
        try:
            chunk = os.read(reader, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            self._forget(reader)
            return
        try:
            if self._file.tell() + len(chunk) > self._file_bytes_max:
                self._rotate()
            self._file.write(chunk)
        except OSError as error:  # disk full: the tail in memory still works, and the child must not block on its pipe
            log.warning("cannot write %s: %s", self._path.name, error.strerror)
        *whole, begun = (self._readers[reader] + chunk).split(b"\n")
        self._readers[reader] = begun[:_LINE_BYTES_MAX]
        lines = [line[:_LINE_BYTES_MAX].decode(errors="replace") for line in whole]
        self._lines.extend(lines)
        if reader in self._tails:
            self._tails[reader].extend(lines)

    def _rotate(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._file = self._path.open("ab", buffering=0)
        os.chmod(self._path, 0o600)

    def _forget(self, reader: int) -> None:
        del self._readers[reader]
        self._tails.pop(reader, None)
        asyncio.get_running_loop().remove_reader(reader)
        os.close(reader)
