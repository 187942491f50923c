"""The instants a waiting room waits for, in one heap whose size follows what is held, not what was."""

import heapq
from collections.abc import Callable

Due = tuple[int, str, str]
"""(instant, request, endpoint): its hold ends, or it may go elsewhere; no request: a replica may be tried again."""


class Deadlines:
    """`held` says whether a request still waits, and how many do."""

    def __init__(self, held: Callable[[str], bool], count: Callable[[], int]) -> None:
        self._held = held
        self._count = count
        self._heap: list[Due] = []

    def __len__(self) -> int:
        return len(self._heap)

    def next_ms(self) -> int | None:
        return self._heap[0][0] if self._heap else None

    def push(self, at_ms: int, request: str, endpoint: str, now_ms: int) -> None:
        if len(self._heap) >= 2 * self._count() + 64:
            # Granted requests leave their deadlines behind: the heap would grow with the hold, not with the queue.
            live = {due for due in self._heap if (self._held(due[1]) if due[1] else due[0] > now_ms)}
            self._heap = list(live)
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (at_ms, request, endpoint))

    def pop(self, now_ms: int) -> Due | None:
        """The next one that is due, if any is."""
        return heapq.heappop(self._heap) if self._heap and self._heap[0][0] <= now_ms else None
