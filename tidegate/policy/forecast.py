"""When will this endpoint be needed again? An idle-gap histogram of its own history, honest when there is little of it.

Gaps fall into half-octave bins (1 ms … 34 years), so 64 numbers hold any history and a query costs one pass over them.
The histogram forgets: all counts are halved when there are `COUNT_MAX`. Gaps are measured in *operational time*, which
runs faster in hours that are busier than the mean hour (by hour of the day once a day was seen, by hour of the week
once two weeks were), so one histogram holds for day and night; without such history it is plain time. Until there is
history the answer is the scale-free prior "quiet for as long again": P(needed within h | quiet for a) = h ÷ (a + h),
which weighs as much as `PRIOR_WEIGHT` gaps. (Shahrad et al., ATC '20, use per-minute bins over four hours; log bins
need no range and no fallback.)
"""

from itertools import accumulate
from math import log2

BINS = 64
COUNT_MAX = 512.0
PRIOR_WEIGHT = 2.0
HOUR_MS = 3_600_000
HOURS_A_WEEK = 168
PACE_MAX = 4.0
HORIZON_STEP = 4
ENDED_MAX = 64.0
MEASURED_MIN = 8.0
RECENT_MS = 60_000
MID_BIN = 0.84  # the middle of a half-octave bin over its upper edge
EDGES_MS = tuple(2.0 ** ((index + 1) / 2.0) for index in range(BINS))
BURST_MS = 1_000
BURST_SHARE = 0.125  # weight of the newest burst in the mean


def _position(gap_ms: float) -> float:
    """Where a gap falls on the bin axis, as a real number."""
    position = 2.0 * log2(gap_ms + 1.0)
    return position if position < BINS - 1.0 else BINS - 1.0


class ArrivalHistory:
    """Arrivals of one endpoint, seen from reports. `burst`: how many requests its bursts bring in their first second,
    in the mean (a burst begins with a request after a quiet second).
    """

    __slots__ = ("_active", "_asked", "_bins", "_burst", "_burst_ms", "_count", "_hour", "_hours", "_pace", "_since",
                 "_tails", "arrivals", "burst", "last_ms")  # fmt: skip

    def __init__(self) -> None:
        self._bins = [0.0] * BINS
        self._count = 0.0
        self._tails: list[float] | None = None
        self._hours = [0.0] * HOURS_A_WEEK
        self._active = [0.0] * HOURS_A_WEEK
        self._asked = (-1, 0.0)
        self._hour = self._since = -1
        self._pace = 1.0
        self._burst, self._burst_ms = 0, 0
        self.burst = 1.0
        self.last_ms: int | None = None
        self.arrivals = 0

    def observe(self, now_ms: int, arrivals: int) -> None:
        """`arrivals` more requests have come by `now_ms`; the gap before them is one observation."""
        assert arrivals > 0
        self.arrivals += arrivals
        gap_ms = self.quiet_ms(now_ms)
        if gap_ms:
            self._bins[int(_position(gap_ms * self._pace))] += 1.0
            self._count += 1.0
            self._tails = None
            if self._count >= COUNT_MAX:
                self._bins = [b * 0.5 for b in self._bins]
                self._count *= 0.5
        if gap_ms is None or gap_ms >= BURST_MS:
            if self._burst:
                self.burst += BURST_SHARE * (self._burst - self.burst)
            self._burst, self._burst_ms = arrivals, now_ms
        elif now_ms - self._burst_ms < BURST_MS:
            self._burst += arrivals
        self._enter_hour(now_ms // HOUR_MS)
        self._hours[self._hour % HOURS_A_WEEK] += arrivals
        self.last_ms = now_ms

    def _enter_hour(self, hour: int) -> None:
        """On the first arrival in an hour: what was a week ago counts half, and the pace of the hour is reckoned."""
        if hour == self._hour:
            return
        if self._since < 0:
            self._since = self._hour = hour
        hours = self._hours
        for passed in range(max(self._hour + 1, hour - HOURS_A_WEEK + 1), hour + 1):
            hours[passed % HOURS_A_WEEK] *= 0.5
            self._active[passed % HOURS_A_WEEK] *= 0.5
        self._active[hour % HOURS_A_WEEK] += 1.0
        self._hour = hour
        days, total = (hour - self._since) / 24, sum(hours)
        if days < 1.0 or not total:
            return
        if days >= 14.0:
            here, mean = hours[hour % HOURS_A_WEEK], total / HOURS_A_WEEK
        else:
            here, mean = sum(hours[hour % 24 :: 24]), total / 24
        prior = mean / days  # one day at the mean pace
        self._pace = min(max((here + prior) / (mean + prior), 1.0 / PACE_MAX), PACE_MAX)

    def quiet_ms(self, now_ms: int) -> int | None:
        """How long since the last arrival; None if there was none."""
        return None if self.last_ms is None else max(0, now_ms - self.last_ms)

    def needed_within(self, now_ms: int, horizon_ms: int) -> float:
        """P(an arrival in the next `horizon_ms`), given how long it has been quiet. In [0, 1]."""
        age = self.quiet_ms(now_ms)
        if age is None:
            return 0.0
        return self._within(age, self._mass_above(age * self._pace), self._this_hour(now_ms), horizon_ms)

    def _within(self, age: int, tail: float, this_hour: float, horizon_ms: int) -> float:
        beyond = self._mass_above((age + horizon_ms) * self._pace)
        lindy = horizon_ms / (age + horizon_ms) if horizon_ms else 0.0
        by_gaps = (tail - beyond + PRIOR_WEIGHT * lindy) / (tail + PRIOR_WEIGHT)
        return max(by_gaps, this_hour * min(horizon_ms / HOUR_MS, 1.0)) if this_hour else by_gaps

    def _this_hour(self, now_ms: int) -> float:
        """P(a request in this hour), by the share of days (of weeks after two) on which it had one; what lies further
        back counts less. One day more without than were seen keeps it honest; 0 before the first is over.
        """
        hour = now_ms // HOUR_MS
        if hour != self._asked[0]:
            days = (hour - self._since) / 24
            weight = 2.0 - 2.0 ** (1.0 - max(1.0, days / 7.0))
            if days < 14.0:
                here, weight = sum(self._active[hour % 24 :: 24]), weight * min(days, 7.0)
            else:
                here = self._active[hour % HOURS_A_WEEK]
            self._asked = (hour, min(here / (weight + 1.0), 1.0) if days >= 1.0 else 0.0)
        return self._asked[1]

    def needed_soon(self, now_ms: int, shortest_ms: int, longest_ms: int) -> float:
        """How soon it is needed, in [0, 1]: mean of `needed_within` over horizons from `shortest_ms` to `longest_ms`,
        each `HORIZON_STEP` times the last and weighted by one over its length.

        So it grows in proportion to the rate of arrivals, as what an eviction costs over time does (who is needed ten
        times as often is missed ten times as often), and no single horizon decides which rate that is.
        """
        age = self.quiet_ms(now_ms)
        if age is None:
            return 0.0
        tail, this_hour = self._mass_above(age * self._pace), self._this_hour(now_ms)
        total, weights, weight, horizon = 0.0, 0.0, 1.0, max(1, shortest_ms)
        while not weights or horizon <= longest_ms:
            total += weight * self._within(age, tail, this_hour, horizon)
            weights += weight
            weight /= HORIZON_STEP
            horizon *= HORIZON_STEP
        return total / weights

    def keep_ms(self, back: float) -> float:
        """The keep-alive with the least cost over the gaps seen, where a ms kept costs 1 and coming back costs `back`:
        the best an online policy can do if gaps go on as they were. `back` itself (ski-rental) without history.
        """
        if not self._count:
            return back
        best_ms, best, kept, beyond = 0.0, self._count * back, 0.0, self._count
        for edge_ms, count in zip(EDGES_MS, self._bins, strict=True):
            if count:
                kept += count * edge_ms * MID_BIN
                beyond -= count
                cost = kept + beyond * (edge_ms + back)
                if cost < best:
                    best_ms, best = edge_ms, cost
        return best_ms / self._pace

    def _mass_above(self, gap_ms: float) -> float:
        """How many observed gaps were longer; within a bin they count as evenly spread."""
        tails = self._tails
        if tails is None:
            self._tails = tails = list(accumulate(reversed(self._bins), initial=0.0))
        position = _position(gap_ms)
        whole = int(position)
        return tails[BINS - 1 - whole] + self._bins[whole] * (1.0 - (position - whole))


class ServiceTime:
    """How long an endpoint's requests run, from reports alone: request-time in flight ÷ requests that ended (Little's
    law; while none has ended, all that has run so far). And how fast a replica serves when it has all it can do: what
    ended while others were held ÷ replica-time.
    """

    __slots__ = ("_at_once", "_ended", "_full_ended", "_full_ms", "_last_ms", "_run_ms")

    def __init__(self) -> None:
        self._run_ms, self._ended, self._last_ms = 0.0, 0.0, 0
        self._full_ms, self._full_ended = 0.0, 0.0
        self._at_once = 0.0

    def observe(self, now_ms: int, in_flight: int, ended: int, full: int = 0) -> None:
        """`in_flight` ran since the last report, on replicas of which `full` had no free slot; `ended` are over."""
        passed_ms, ended = now_ms - self._last_ms, max(0, ended)
        self._at_once = self.at_once(now_ms, in_flight)
        self._last_ms = now_ms
        self._run_ms += in_flight * passed_ms
        self._ended += ended
        if self._ended > ENDED_MAX:
            self._ended *= 0.5
            self._run_ms *= 0.5
        if full:
            self._full_ms += full * passed_ms
            self._full_ended += ended
            if self._full_ended > ENDED_MAX:
                self._full_ended *= 0.5
                self._full_ms *= 0.5

    def at_once(self, now_ms: int, in_flight: int) -> float:
        """Requests in flight in the mean of about the last `RECENT_MS`, with `in_flight` since the last report."""
        passed_ms = now_ms - self._last_ms
        return self._at_once + (in_flight - self._at_once) * passed_ms / (RECENT_MS + passed_ms)

    @property
    def served_per_s(self) -> float | None:
        """Requests a replica completes in a second when it has all it can do; None before `MEASURED_MIN` of them."""
        return self._full_ended * 1_000 / max(self._full_ms, 1.0) if self._full_ended >= MEASURED_MIN else None

    @property
    def mean_ms(self) -> float:
        return self._run_ms / max(self._ended, 1.0)
