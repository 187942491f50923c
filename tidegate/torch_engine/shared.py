"""Memory that all engines of one model on this node share: made by the template, filled once by whoever comes first.

A memfd (`man memfd_create`) has no name in any file system: engines inherit it from the template that forks them, and
the kernel takes its memory back with the last process that has it open, however that process ends.
"""

import hashlib
import os
from pathlib import Path

NAME = "tidegate-weights"  # the kernel shows a mapping of it as ``/memfd:tidegate-weights (deleted)``


def identity(folder: Path) -> bytes:
    """32 bytes that change when a safetensors file of the folder does: by name, size, time and inode."""
    hashed = hashlib.sha256(os.fsencode(folder.resolve()))
    for path in sorted(folder.glob("*.safetensors")):
        seen = path.stat()
        hashed.update(f"|{path.name}|{seen.st_size}|{seen.st_mtime_ns}|{seen.st_ino}".encode())
    return hashed.digest()


def make() -> int:
    """A new empty memfd."""
    return os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


class SharedCopies:
    """The template's: one memfd a model, open here while an engine of that model lives."""

    def __init__(self) -> None:
        self._made: dict[bytes, int] = {}
        self._users: dict[int, int] = {}  # an engine's pid → its memfd

    def of(self, folder: Path) -> int:
        """The memfd for one more engine of this model; `forked` or `let_go` follows."""
        key = identity(folder)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def forked(self, pid: int, fd: int) -> None:
        self._users[pid] = fd

    def ended(self, pid: int) -> None:
        self._users.pop(pid, None)
        self.let_go()

    def let_go(self) -> None:
        """Closes what no living engine uses."""
        used = set(self._users.values())
        for key, fd in list(self._made.items()):
            if fd not in used:
                os.close(self._made.pop(key))

    def keep_only(self, fd: int) -> None:
        """In a forked engine: other models' copies are not its to keep alive."""
        for other in self._made.values():
            if other != fd:
                os.close(other)
        self._made.clear()
