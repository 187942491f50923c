"""The audit log and the live event stream: every capacity decision and every operator's act, with its reason.

Lines are told to live subscribers at once and written to the store in batches. Both sides are bounded: while a store is
away too long the oldest pending lines are lost (and counted); a subscriber that is too slow is ended and comes back.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from tidegate.domain.errors import LimitHit, Refusal, StoreFault
from tidegate.domain.ports import Activity, Clock, StateStore

PENDING_LINES_MAX = 10_000
BATCH_LINES_MAX = 500
GATHER_MS = 100
RETRY_MS = 1_000
SUBSCRIBERS_MAX = 64
SUBSCRIBER_LINES_MAX = 512

log = logging.getLogger(__name__)


class ActivityLog:
    def __init__(self, store: StateStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._pending: deque[Activity] = deque()
        self._lost_lines = 0
        self._written = asyncio.Lock()
        self._wake = asyncio.Event()
        self._subscribers: set[asyncio.Queue[Activity | None]] = set()

    def note(self, actor: str, kind: str, subject: str, reason: str) -> None:
        """Adds one line, stamped now. Never waits."""
        line = Activity(self._clock.now_ms(), actor, kind, subject, reason)
        if len(self._pending) >= PENDING_LINES_MAX:
            self._pending.popleft()
            self._lost_lines += 1
        self._pending.append(line)
        self._wake.set()
        for queue in list(self._subscribers):
            if queue.qsize() >= SUBSCRIBER_LINES_MAX:
                self._subscribers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(line)

    async def run(self) -> None:
        """Writes pending lines, batch after batch, for ever; what is left is written on cancellation."""
        try:
            while True:
                await self._wake.wait()
                await asyncio.sleep(GATHER_MS / 1_000)  # one transaction for the burst of lines a decision makes
                self._wake.clear()
                try:
                    await self.flush()
                except StoreFault as fault:
                    log.warning("activity not written, will be retried: %s", fault.reason)
                    await asyncio.sleep(RETRY_MS / 1_000)
                    self._wake.set()
        finally:
            self._write_the_rest()

    def _write_the_rest(self) -> None:
        lines = list(self._pending)
        self._pending.clear()
        try:
            self._store.record(lines)
        except StoreFault as fault:
            log.warning("%d activity lines were lost at the end: %s", len(lines), fault.reason)

    async def flush(self) -> None:
        """Returns once everything noted so far is in the store. StoreFault: what could not be written is kept."""
        async with self._written:
            while self._pending:
                batch = [self._pending.popleft() for _ in range(min(len(self._pending), BATCH_LINES_MAX))]
                try:
                    await asyncio.to_thread(self._store.record, batch)
                except StoreFault:
                    room = PENDING_LINES_MAX - len(self._pending)
                    self._lost_lines += max(len(batch) - room, 0)
                    self._pending.extendleft(reversed(batch[max(len(batch) - room, 0) :]))
                    raise
            if self._lost_lines:
                log.warning("%d activity lines were lost while the store was away", self._lost_lines)
                self._lost_lines = 0

    async def newest(self, limit: int, subject: str | None = None) -> list[Activity]:
        """At most `limit` lines, newest first. Raises StoreFault."""
        await self.flush()
        return list(await asyncio.to_thread(self._store.activity, limit, subject))

    def end_subscriptions(self) -> None:
        """Ends every live stream: the platform is going down."""
        for queue in self._subscribers:
            queue.put_nowait(None)
        self._subscribers.clear()

    def check_room(self) -> None:
        """Raises Refusal capacity while too many watch already."""
        if len(self._subscribers) >= SUBSCRIBERS_MAX:
            limit = LimitHit("capacity", len(self._subscribers), SUBSCRIBERS_MAX)
            raise Refusal("capacity", "too many watch the activity already", retry_after_ms=5_000, limit=limit)

    @contextmanager
    def subscribed(self) -> Iterator[AsyncIterator[Activity]]:
        """Lines from now on, until the block ends or the reader is too slow. Raises as `check_room`."""
        self.check_room()
        queue: asyncio.Queue[Activity | None] = asyncio.Queue(SUBSCRIBER_LINES_MAX + 1)  # + the end
        self._subscribers.add(queue)
        try:
            yield _lines(queue)
        finally:
            self._subscribers.discard(queue)


async def _lines(queue: "asyncio.Queue[Activity | None]") -> AsyncIterator[Activity]:
    while (line := await queue.get()) is not None:
        yield line
