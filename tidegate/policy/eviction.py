"""Whom to evict: the set of victims that frees enough on one accelerator with the least expected regret.

Regret of a victim, in milliseconds of weighted waiting = P(needed within the horizon) × cost of bringing it back × SLO
weight.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A replica that may be drained. `nbytes` is what its leaving frees on the accelerator in question."""

    replica: str
    nbytes: int
    regret_ms: float


def choose(candidates: Sequence[Candidate], need_bytes: int) -> tuple[Candidate, ...] | None:
    """The victims to free `need_bytes`, least regret first; () when nothing is needed, None when all together do not
    do.

    Greedy by regret per byte, then whatever the last pick made superfluous is dropped (largest regret first): within a
    factor 2 of the best set for this covering knapsack, and exact for the one or two victims it nearly always is.
    A single victim that covers the need alone for less regret wins.
    """
    if need_bytes <= 0:
        return ()
    ordered = sorted(candidates, key=lambda c: (c.regret_ms / max(c.nbytes, 1), c.replica))
    picked: list[Candidate] = []
    freed = 0
    for candidate in ordered:
        if freed >= need_bytes:
            break
        picked.append(candidate)
        freed += candidate.nbytes
    if freed < need_bytes:
        return None
    for candidate in sorted(picked, key=lambda c: (-c.regret_ms, c.replica)) if len(picked) > 1 else ():
        if freed - candidate.nbytes >= need_bytes:
            picked.remove(candidate)
            freed -= candidate.nbytes
    alone = min((c for c in ordered if c.nbytes >= need_bytes), key=lambda c: (c.regret_ms, c.replica), default=None)
    if alone is not None and alone.regret_ms < sum(c.regret_ms for c in picked):
        return (alone,)
    return tuple(picked)


class KeepAlive:
    """How long one idle replica keeps its place: a forecast's instant within a guard rail, so that the cost of all gaps
    together is never above twice the clairvoyant's and one return.

    The unit is what keeping costs a ms; `back` is what coming back costs. Keeping for exactly `back` (ski-rental) pays
    at most twice the best for every gap; leaving at another instant pays at most |instant - back| more than that. So
    the forecast may move the instant by as much as was saved before: by twice the best of all gaps less what was paid,
    and one return in advance, without which an endpoint whose gaps are all long could never save a first time.
    """

    __slots__ = ("best", "paid")

    def __init__(self) -> None:
        self.paid = self.best = 0.0

    def instant(self, forecast: float, back: float) -> float:
        saved = max(0.0, 2.0 * self.best - self.paid + back)
        return min(max(forecast, back - saved), back + saved)

    def ended(self, gap: float, instant: float, back: float) -> None:
        """A gap is over during which the replica was to leave at `instant`."""
        self.paid += gap if gap <= instant else instant + back
        self.best += min(gap, back)
