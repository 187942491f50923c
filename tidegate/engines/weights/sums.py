"""SHA-256 of files while they arrive: each is hashed from its beginning as far as it is there without a gap.

What is hashed is read back from the disk, so it is the disk's bytes that are vouched for, and they are in the page
cache when the engine maps them a moment later.
"""

import hashlib
import os
import threading
from collections.abc import Sequence

from tidegate.engines.weights.disk import HASH_BYTES, Sink

THREADS_MAX = 4
POLL_S = 0.02


class Sums:
    """`sizes` of `sinks`, in the same order. Threads of its own from `start` until `finish` or `give_up`."""

    def __init__(self, sinks: Sequence[Sink], sizes: Sequence[int]) -> None:
        self._sinks, self._sizes = sinks, sizes
        self._hashes = [hashlib.sha256() for _ in sizes]
        self._hashed, self._there = [0] * len(sizes), [0] * len(sizes)
        self._ahead: list[dict[int, int]] = [{} for _ in sizes]  # start -> end of what came out of order
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name="sums", daemon=True) for _ in range(threads_for(len(sizes)))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def arrived(self, index: int, start: int, end: int) -> None:
        """These bytes of a file are written. Each is told once."""
        with self._changed:
            ahead = self._ahead[index]
            ahead[start] = end
            while (there := ahead.pop(self._there[index], None)) is not None:
                self._there[index] = there
            self._changed.notify()

    def finish(self, stop: threading.Event) -> list[str] | None:
        """Everything has arrived: the sums in order, or None when `stop` was set first. Raises OSError."""
        for thread in self._threads:
            while thread.is_alive():
                if stop.is_set():
                    self.give_up()
                    return None
                thread.join(POLL_S)
        if self._error is not None:
            raise self._error
        assert self._hashed == list(self._sizes), "finished before everything arrived"
        return [each.hexdigest() for each in self._hashes]

    def give_up(self) -> None:
        """Its threads end after the piece each is at."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _work(self) -> None:
        buffer = memoryview(bytearray(HASH_BYTES))
        try:
            while (index := self._next()) is not None:
                self._take(index, buffer)
                with self._changed:
                    self._busy.discard(index)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again in `finish`
            self._error = error
            self.give_up()

    def _next(self) -> int | None:
        """A file with something to hash that nobody is at; None when there will be none."""
        with self._changed:
            while not self._over:
                left = [i for i, size in enumerate(self._sizes) if self._hashed[i] < size and i not in self._busy]
                for index in left:
                    if self._there[index] > self._hashed[index]:
                        self._busy.add(index)
                        return index
                if not left and not self._busy:
                    break
                self._changed.wait()
            self._changed.notify_all()
            return None

    def _take(self, index: int, buffer: memoryview) -> None:
        at, end = self._hashed[index], self._there[index]
        with self._sinks[index].buffered() as descriptor:
            while at < end and not self._over:
                count = os.preadv(descriptor, [buffer[: min(len(buffer), end - at)]], at)
                if not count:
                    raise OSError(0, "a file of the cache became shorter while it was downloaded")
                self._hashes[index].update(buffer[:count])
                at += count
        self._hashed[index] = at


def threads_for(files: int) -> int:
    """As many as are worth having: one file is hashed by one thread at a time."""
    return max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)), files))
