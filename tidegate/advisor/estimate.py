"""The cheap estimate of how many replicas a p99 target takes, without replaying: whole arrays at once, for curves over
many volumes.

The replicas are taken as one pool with n times the speed. Each request meets a level, how many are in service beside
it on its replica, which stretches its prefill and its tokens; waits are those behind the pool's prefills, or behind its
work beyond what fits into its places, whichever is longer. Levels are of the instant, not of the day: a burst is slow
because it is a burst. Checked against the replay (docs/advisor.md); a recommendation always rests on a replay.
"""

import numpy as np

from tidegate.advisor.hardware import Curve
from tidegate.advisor.traffic import Floats

REPLICAS_MAX = 256
ROUNDS = 2  # levels make durations, durations make levels: a third round changes the p99 by less than 1 %


def replicas(curve: Curve, t_ms: Floats, span_ms: float, slo_ms: float) -> int | None:
    """The fewest replicas with a p99 TTFT within `slo_ms`; None where there is no such number."""
    prefill = np.array(curve.prefill_ms)
    if float(np.quantile(prefill, 0.99)) > slo_ms:
        return None
    low = max(1, int(curve.work_ms.sum() / span_ms))
    high = low
    while p99_ttft_ms(curve, t_ms, high) > slo_ms:
        low, high = high + 1, high * 2
        if high > REPLICAS_MAX:
            return None
    while low < high:
        middle = (low + high) // 2
        if p99_ttft_ms(curve, t_ms, middle) <= slo_ms:
            high = middle
        else:
            low = middle + 1
    return high


def p99_ttft_ms(curve: Curve, t_ms: Floats, count: int) -> float:
    """The p99 of TTFT with `count` replicas, in ms."""
    prefill, tokens, work = np.array(curve.prefill_ms), np.array(curve.tokens), curve.work_ms
    stretch, token_ms = np.array(curve.stretch), np.array(curve.token_ms)
    # Half done on average: the work inside the places of full replicas, which waits for nobody.
    inside_ms = curve.slots * float(work.mean()) / 2.0
    over_ms = np.maximum(_behind(t_ms, work / count) - inside_ms, 0.0)
    took = prefill + tokens * token_ms[1]
    ttft = prefill
    for _ in range(ROUNDS):
        level = np.minimum((_ahead(t_ms, took) / count).astype(np.int64) + 1, curve.slots)
        own = prefill * stretch[level]
        ttft = np.maximum(_behind(t_ms, own / count), over_ms) + own
        took = ttft + tokens * token_ms[level]
    return float(np.quantile(ttft, 0.99))


def _behind(t_ms: Floats, service_ms: Floats) -> Floats:
    """What a single server still has to do when each request comes (Lindley's recursion, unrolled)."""
    total = np.cumsum(service_ms)
    before = total - service_ms
    return np.asarray(before + np.maximum.accumulate(t_ms - before) - t_ms, np.float64)


def _ahead(t_ms: Floats, took_ms: Floats) -> Floats:
    """How many are in service when each request comes, were there a place for everyone."""
    ends = np.sort(t_ms + took_ms)
    ahead = np.arange(len(t_ms)) - np.searchsorted(ends, t_ms, side="right")
    return np.asarray(np.maximum(ahead, 0), np.float64)
