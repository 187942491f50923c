"""A rate as a bucket: full at first, emptied by what is taken, refilled evenly. Pure, exact, O(1).

A bucket of N a minute lets through at most 2 N within any minute (a full one emptied, and what flows in meanwhile) and
N a minute in the long run. It may go below empty: what turned out to be more than was asked for is owed.
"""

MS_PER_MINUTE = 60_000


class Bucket:
    """`full` units, refilled in a minute. Kept in unit-milliseconds, so that no refill is ever rounded away."""

    __slots__ = ("_at_ms", "_level", "full")

    def __init__(self, full: int, now_ms: int) -> None:
        self.full = full
        self._level = full * MS_PER_MINUTE
        self._at_ms = now_ms

    def left(self, now_ms: int) -> int:
        """Whole units that can be taken now; negative when units are owed. A clock that goes back refills nothing."""
        if now_ms > self._at_ms:
            self._level = min(self.full * MS_PER_MINUTE, self._level + (now_ms - self._at_ms) * self.full)
            self._at_ms = now_ms
        return self._level // MS_PER_MINUTE

    def take(self, units: int) -> None:
        """As of the last `left`. Negative units give back."""
        self._level = min(self.full * MS_PER_MINUTE, self._level - units * MS_PER_MINUTE)

    def wait_ms(self, units: int) -> int:
        """From the last `left` until `units` (at most `full`) can be taken; 0: now."""
        return max(0, -(-(units * MS_PER_MINUTE - self._level) // self.full))

    def resize(self, full: int) -> None:
        """Another rate; what was taken stays taken."""
        self._level += (full - self.full) * MS_PER_MINUTE
        self.full = full
