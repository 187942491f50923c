"""Usage events that a collector will never take: a file a collector, one JSON object a line, synced to disk."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tidegate.domain.errors import StoreFault

FILE_BYTES_MAX = 64 << 20


class DeadLetterFiles:
    """Implements `ports.DeadLetters`. The files are for people: looked at, sent again by hand, removed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def append(self, sink: str, why: str, event: Mapping[str, Any]) -> None:
        """Raises StoreFault when it cannot be kept, also because nobody has looked at `FILE_BYTES_MAX` of them."""
        path = self._directory / f"{re.sub('[^A-Za-z0-9_-]', '_', sink)}.jsonl"
        line = msgspec.json.encode({"why": why, "event": event}) + b"\n"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if os.fstat(descriptor).st_size + len(line) > FILE_BYTES_MAX:
                    raise StoreFault(f"{path.name} holds {FILE_BYTES_MAX} bytes of refused events: look at them first")
                if os.write(descriptor, line) != len(line):
                    raise StoreFault("a refused event could not be kept whole")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreFault("a refused event cannot be kept") from error
