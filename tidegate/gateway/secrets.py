"""Keys of remote APIs, read where the operator keeps them: an environment variable, or a file that may be replaced.

What control sends is only where a key is (``env:NAME`` or ``file:/PATH``), never the key. It is in memory here, in the
one request head it belongs to, and nowhere else.
"""

import os
import re
from pathlib import Path

from tidegate.domain.errors import EngineFault

KEY_BYTES_MAX = 8 << 10
_PLAIN = re.compile(rb"[\x21-\x7e]+")


class Keys:
    """Files are read again when they change, so that a key can be rotated under a running gateway."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, bytes]] = {}

    def read(self, reference: str) -> bytes:
        """The key; empty where `reference` is. EngineFault when it is not there or is no key: without its text."""
        kind, _, place = reference.partition(":")
        if not kind:
            return b""
        key = os.environ.get(place, "").strip().encode() if kind == "env" else self._of_file(place)
        if not _PLAIN.fullmatch(key):
            raise EngineFault(f"the provider's key ({reference}) is not there")
        return key

    def _of_file(self, place: str) -> bytes:
        try:
            changed = os.stat(place).st_mtime_ns
            known = self._files.get(place)
            if known is None or known[0] != changed:
                with Path(place).open("rb") as file:
                    known = self._files[place] = changed, file.read(KEY_BYTES_MAX).strip()
        except OSError as error:
            raise EngineFault(f"the provider's key (file:{place}) cannot be read: {error.strerror}") from error
        return known[1]
