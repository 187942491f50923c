"""When will this endpoint be needed again? An idle-gap histogram of its own history, honest when there is little of it.

Gaps fall into half-octave bins (1 ms … 34 years), so 64 numbers hold any history and a query costs one pass over them.
The histogram forgets: all counts are halved when there are `COUNT_MAX`. Until there is history the answer is the scale-
free prior "quiet for as long again": P(needed within h | quiet for a) = h ÷ (a + h), which weighs as much as
`PRIOR_WEIGHT` gaps. (Shahrad et al., ATC '20, use per-minute bins over four hours; log bins need no range and no
fallback.)
"""

from math import log2

BINS = 64
COUNT_MAX = 512.0
PRIOR_WEIGHT = 2.0


def _position(gap_ms: float) -> float:
    """Where a gap falls on the bin axis, as a real number."""
    return min(2.0 * log2(gap_ms + 1.0), BINS - 1.0)


class ArrivalHistory:
    """Arrivals of one endpoint, seen from reports."""

    __slots__ = ("_bins", "_count", "_tails", "arrivals", "last_ms")

    def __init__(self) -> None:
        self._bins = [0.0] * BINS
        self._count = 0.0
        self._tails: list[float] | None = None
        self.last_ms: int | None = None
        self.arrivals = 0

    def observe(self, now_ms: int, arrivals: int) -> None:
        """`arrivals` more requests have come by `now_ms`; the gap before them is one observation."""
        assert arrivals > 0
        self.arrivals += arrivals
        if self.last_ms is not None and now_ms > self.last_ms:
            self._bins[int(_position(now_ms - self.last_ms))] += 1.0
            self._count += 1.0
            self._tails = None
            if self._count >= COUNT_MAX:
                self._bins = [b * 0.5 for b in self._bins]
                self._count *= 0.5
        self.last_ms = now_ms

    def quiet_ms(self, now_ms: int) -> int | None:
        """How long since the last arrival; None if there was none."""
        return None if self.last_ms is None else max(0, now_ms - self.last_ms)

    def needed_within(self, now_ms: int, horizon_ms: int) -> float:
        """P(an arrival in the next `horizon_ms`), given how long it has been quiet. In [0, 1]."""
        age = self.quiet_ms(now_ms)
        if age is None:
            return 0.0
        tail = self._mass_above(age)
        beyond = self._mass_above(age + horizon_ms)
        lindy = horizon_ms / (age + horizon_ms) if horizon_ms else 0.0
        return (tail - beyond + PRIOR_WEIGHT * lindy) / (tail + PRIOR_WEIGHT)

    def needed_soon(self, now_ms: int, shortest_ms: int, longest_ms: int) -> float:
        """Mean of `needed_within` over horizons from `shortest_ms` to `longest_ms`, each four times the last.

        One horizon cannot tell apart two endpoints that are both sure to be needed within it; the mean over a geometric
        row ranks them by how soon, on the scale of logarithms, on which arrival rates differ.
        """
        total, count, horizon = 0.0, 0, max(1, shortest_ms)
        while count == 0 or horizon <= longest_ms:
            total += self.needed_within(now_ms, horizon)
            count += 1
            horizon *= 4
        return total / count

    def _mass_above(self, gap_ms: int) -> float:
        """How many observed gaps were longer; within a bin they count as evenly spread."""
        tails = self._tails
        if tails is None:
            tails = [0.0] * (BINS + 1)
            for index in range(BINS - 1, -1, -1):
                tails[index] = tails[index + 1] + self._bins[index]
            self._tails = tails
        position = _position(gap_ms)
        whole = int(position)
        return tails[whole + 1] + self._bins[whole] * (1.0 - (position - whole))
