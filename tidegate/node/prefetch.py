"""Weights fetched ahead of demand, on the core's word. A failure is told like a success: the next start says why."""

import asyncio
import logging
from collections.abc import Callable

from tidegate.domain.errors import WeightFault
from tidegate.domain.plan import Prefetch
from tidegate.domain.ports import Weights

PREFETCHES_MAX = 256
log = logging.getLogger(__name__)


class Prefetcher:
    """One task a model; `ended` is called after each, on the loop."""

    def __init__(self, weights: Weights, ended: Callable[[], None]) -> None:
        self._weights, self._ended = weights, ended
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def take(self, command: Prefetch) -> None:
        """Begins unless it is under way; more than `PREFETCHES_MAX` at once are left to the starts that need them."""
        digest = command.model.digest
        if digest in self._tasks:
            return
        if len(self._tasks) >= PREFETCHES_MAX:
            self._ended()
            return
        task = self._tasks[digest] = asyncio.create_task(self._fetch(command), name=f"prefetch {digest[:12]}")
        task.add_done_callback(lambda _: self._done(digest))

    async def close(self) -> None:
        for task in (tasks := list(self._tasks.values())):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _fetch(self, command: Prefetch) -> None:
        try:
            held = await self._weights.hold(command.model, lambda _: None)
        except WeightFault as fault:
            log.warning("prefetch of %s: %s", command.model.source, fault.reason)
        else:
            held.release()

    def _done(self, digest: str) -> None:
        del self._tasks[digest]
        self._ended()
