"""The cheap estimate: what a replay would cost, without replaying; whole arrays at once, for curves over many volumes.

Dedicated replicas are sized on two pooled queues with n servers' speed: of prefills, and of all work beyond what fits
into the places of the replicas. Workers are paid for the union of their requests' intervals, the k-th worker taking
those that find k - 1 full. Checked against the replay (docs/advisor.md); a recommendation always rests on a replay.
"""

import numpy as np

from tidegate.advisor.hardware import Curve
from tidegate.advisor.replay import WorkerRules
from tidegate.advisor.traffic import Floats

REPLICAS_MAX = 256
WORKERS_MAX = 64


def replicas(curve: Curve, t_ms: Floats, span_ms: float, slo_ms: float) -> int | None:
    """The fewest replicas with a p99 TTFT within `slo_ms`; None where there is no such number."""
    prefill = np.array(curve.prefill_ms)[: len(t_ms)]
    if float(np.quantile(prefill, 0.99)) > slo_ms:
        return None
    work = curve.work_ms[: len(t_ms)]
    ahead = _ahead(t_ms, prefill + np.array(curve.tokens)[: len(t_ms)] * curve.token_ms[1])
    low = max(1, int(work.sum() / span_ms))
    high = low
    while not _enough(curve, t_ms, prefill, work, ahead, high, slo_ms):
        low, high = high + 1, high * 2
        if high > REPLICAS_MAX:
            return None
    while low < high:
        middle = (low + high) // 2
        if _enough(curve, t_ms, prefill, work, ahead, middle, slo_ms):
            high = middle
        else:
            low = middle + 1
    return high


def _enough(
    curve: Curve, t_ms: Floats, prefill: Floats, work: Floats, ahead: Floats, count: int, slo_ms: float
) -> bool:
    level = min(curve.slots, int(ahead.mean() / count) + 1)
    own = prefill * curve.stretch[level]
    # Half done on average: the work inside the places of full replicas, which waits for nobody.
    inside_ms = curve.slots * float(work.mean()) / 2.0
    waits = _behind(t_ms, own / count) + np.maximum(_behind(t_ms, work / count) - inside_ms, 0.0)
    return float(np.quantile(waits + own, 0.99)) <= slo_ms


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


def worker_ms(curve: Curve, t_ms: Floats, rules: WorkerRules) -> tuple[float, int]:
    """(time of all workers beyond the always warm ones, from start to stop; how many starts)."""
    took = _durations(curve, t_ms)
    level = _ahead(t_ms, took).astype(np.int64) // curve.slots
    paid, starts = 0.0, 0
    for k in range(rules.warm, min(WORKERS_MAX, int(level.max(initial=0)) + 1)):
        mine = level == k
        if not mine.any():
            continue
        begin, end = t_ms[mine], t_ms[mine] + took[mine] + rules.idle_ms
        # A worker that starts keeps its requests waiting `cold_ms`, and is alive that much longer.
        reach = np.maximum.accumulate(end)
        fresh = np.concatenate([[True], begin[1:] > reach[:-1] + rules.cold_ms])
        groups = np.flatnonzero(fresh)
        last = np.concatenate([groups[1:] - 1, [len(begin) - 1]])
        starts += len(groups)
        paid += float((reach[last] - begin[groups]).sum()) + len(groups) * rules.cold_ms
    return paid, starts


def executed_ms(curve: Curve, t_ms: Floats) -> float:
    """Time in which requests run, added up."""
    return float(_durations(curve, t_ms).sum())


def _durations(curve: Curve, t_ms: Floats) -> Floats:
    """Twice: with one in service, then with as many as that puts in service beside each other."""
    prefill, tokens = np.array(curve.prefill_ms)[: len(t_ms)], np.array(curve.tokens)[: len(t_ms)]
    token_ms = np.array(curve.token_ms)
    took = prefill + tokens * token_ms[1]
    for _ in range(2):
        ahead = _ahead(t_ms, took).astype(np.int64)
        took = prefill + tokens * token_ms[np.minimum(ahead % curve.slots + 1, curve.slots)]
    return np.asarray(took, np.float64)
