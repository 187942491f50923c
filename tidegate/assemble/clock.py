"""The time, for everything that is handed a `ports.Clock`: the machine's, but never back. Light, for the gateway."""

import time
from collections.abc import Callable

TENTHS_WHILE_AHEAD = 9


def machine_ms() -> int:
    """What this machine's clock shows, in epoch milliseconds."""
    return time.time_ns() // 1_000_000


class SteadyClock:
    """Implements `ports.Clock`: the time of `wall_ms`, but never back. `up_ns` is a clock nobody sets.

    A wall clock may be set back while the platform runs. Followed at once, or waited for, it would stop every timer,
    rate and hold for as long as the step was. So this one goes on, at nine tenths of its pace, until the wall clock has
    caught up. One that is set forward is followed at once.
    """

    def __init__(self, wall_ms: Callable[[], int] = machine_ms, up_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._wall_ms, self._up_ns = wall_ms, up_ns
        self._ms = wall_ms()
        self._ahead: tuple[int, int] | None = None  # since when it is ahead of the wall clock, on both clocks

    def now_ms(self) -> int:
        now_ms = self._wall_ms()
        if self._ahead is not None or now_ms < self._ms:
            return self._slower(now_ms)
        self._ms = now_ms
        return now_ms

    def _slower(self, now_ms: int) -> int:
        up_ns = self._up_ns()
        since_ms, since_up_ns = self._ahead = self._ahead or (self._ms, up_ns)
        slower_ms = since_ms + (up_ns - since_up_ns) * TENTHS_WHILE_AHEAD // 10_000_000
        if now_ms >= slower_ms:
            self._ahead = None
        self._ms = max(now_ms, slower_ms)
        return self._ms
