"""Locks between the processes and threads of one node: `flock` on a file, let go of however its holder ends."""

import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType

from tidegate.engines.weights.faults import Stopped

POLL_S = 0.02


class FileLock:
    """Not shared between threads: each holder makes its own. The file stays, so that nobody locks a deleted one."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def try_acquire(self, *, shared: bool = False) -> bool:
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def acquire(self, stop: threading.Event, *, shared: bool = False) -> None:
        """Waits for it. Raises Stopped, and is closed, when `stop` is set first."""
        while not self.try_acquire(shared=shared):
            if stop.wait(POLL_S):
                self.close()
                raise Stopped("given up while somebody else was fetching the same weights")

    def close(self) -> None:
        """Lets go. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
