"""Replays: every request of the trace, in order, on replicas with slots, cold starts, idle times and autoscaling.

A replica has `slots` places, one prefill queue and one book of work. A request waits for a place, then for the prefills
before it; its tokens then take as long as the number in service makes them, and never end before the replica could have
done the work of all it has taken (work is conserved, so a replica under overload falls behind as a real one does).
Three ways to have replicas:

* `fixed`: n replicas, the least loaded takes the request;
* `reactive`: n changes a while after load passed a target, as cloud autoscalers do;
* `workers`: a worker is started when no place is free and ends a while after its last request. The first worker with a
  place takes the request, so later workers see only the overflow of earlier ones: one replay tells the overflow of
  *every* number of base replicas at once (see `hybrid`).
"""

from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tidegate.advisor.hardware import Curve
from tidegate.advisor.traffic import Floats

REFUSED_MS = 600_000.0
"""A wait that nobody waits out: a replay in which more than one request in fifty waits longer is lost, and ends."""
CONTROL_MS = 60_000.0
WARM_UP_MS = 600_000.0
DOWN_AFTER = 15  # control periods of less need before a reactive pool gets smaller (as SageMaker's alarms)
NEVER = float("inf")
TICK = 10_000

Progress = Callable[[int], None]
Interval = tuple[float, float, float, int]  # from, ready and until, in ms, and whose number it was


@dataclass(slots=True, eq=False)
class Replayed:
    """`ttft_ms` per request (for fixed-time work: until its answer), `cold` how many met a replica that was starting.

    `intervals` are replicas' times (start, ready, end, number), `busy_ms` is replica time with at least one request,
    `executed_ms` what each request took from its place on, `index` the worker of each. When `lost` the queue grew
    without end and the rest of the numbers say nothing.
    """

    ttft_ms: Floats
    executed_ms: Floats
    intervals: list[Interval]
    busy_ms: float
    cold: int
    lost: bool
    index: list[int]


class Replica:
    """One replica's state; instants in ms."""

    __slots__ = ("alive_until", "begun", "busy_ms", "busy_until", "done", "ends", "prefilled", "ready")

    def __init__(self, begun: float, ready: float) -> None:
        self.begun, self.ready = begun, ready
        self.ends: list[float] = []
        self.prefilled = self.done = self.busy_until = self.alive_until = ready
        self.busy_ms = 0.0

    def taken(self, now: float) -> int:
        ends = self.ends
        if ends and ends[0] <= now:
            del ends[: bisect_right(ends, now)]
        return len(ends)


@dataclass(slots=True, eq=False)
class _Run:
    """What is written down while requests go by."""

    curve: Curve
    work: list[float]
    ttft: list[float] = field(default_factory=list)
    executed: list[float] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    cold: int = 0
    late: int = 0
    late_ms: float = REFUSED_MS
    late_max: float = 0.02

    def admit(self, replica: Replica, i: int, now: float) -> None:
        """Request i on `replica`, whose ended requests are gone from its book. Every request of every replay comes by
        here: comparisons, because `max` takes as long as the rest.
        """
        curve, ends = self.curve, replica.ends
        count, slots = len(ends), curve.slots
        begin, level = (now, count + 1) if count < slots else (ends[count - slots], slots)
        if replica.ready > begin:
            begin = replica.ready
            self.cold += 1
        first, done, busy_until = replica.prefilled, replica.done, replica.busy_until
        first = (begin if begin > first else first) + curve.prefill_ms[i] * curve.stretch[level]
        done = (begin if begin > done else done) + self.work[i]
        end = first + curve.tokens[i] * curve.token_ms[level]
        if end < done:
            end = done
        replica.prefilled, replica.done = first, done
        insort(ends, end)
        if end > busy_until:
            replica.busy_ms += end - (begin if begin > busy_until else busy_until)
            replica.busy_until = end
        self.ttft.append(first - now)
        self.executed.append(end - begin)
        if first - now > self.late_ms:
            self.late += 1

    def over(self, replicas: list[Replica], intervals: list[Interval], busy_ms: float = 0.0) -> Replayed:
        busy_ms += sum(replica.busy_ms for replica in replicas)
        return Replayed(
            np.array(self.ttft), np.array(self.executed), intervals, busy_ms, self.cold, self.lost, self.index
        )

    @property
    def lost(self) -> bool:
        return self.late > self.late_max * len(self.curve.prefill_ms)


def _least(replicas: list[Replica], now: float) -> Replica:
    """The least loaded: fewest requests, then the shortest queue of prefills."""
    best, least = replicas[0], (NEVER, NEVER)
    for replica in replicas:
        load = (replica.taken(now), replica.prefilled)
        if load < least:
            best, least = replica, load
    return best


def _soonest(replicas: list[Replica], now: float, slots: int) -> Replica:
    """Where a request begins first, replicas on their way up included: one queue in front of all of them."""

    def begins(replica: Replica) -> tuple[float, int]:
        count = replica.taken(now)
        free = now if count < slots else replica.ends[count - slots]
        return max(free, replica.ready), count

    return min(replicas, key=begins)


def fixed(curve: Curve, t_ms: list[float], span_ms: float, replicas: int, slo_ms: float | None = None) -> Replayed:
    """n replicas all the time. Ends early when it is lost; with `slo_ms` already when its p99 must be above that."""
    run = _Run(curve, curve.work_ms.tolist())
    if slo_ms is not None:
        run.late_ms, run.late_max = slo_ms, 0.01
    pool = [Replica(0.0, 0.0) for _ in range(replicas)]
    for i, now in enumerate(t_ms):
        run.admit(_least(pool, now), i, now)
        if run.late and run.lost:
            break
    return run.over(pool, [(0.0, 0.0, span_ms, k) for k in range(replicas)])


def reactive(
    curve: Curve, t_ms: list[float], span_ms: float, least: int, target: float, react_ms: float, most: int = 64
) -> Replayed:
    """Every minute the need is the work that arrived in it ÷ (a minute x `target`), as policies that track invocations
    per instance count it. More replicas serve `react_ms` later and are paid for from the decision on; fewer are kept
    when the need stayed lower for `DOWN_AFTER` minutes. The trace begins in the middle of traffic: the first pool is
    what its first ten minutes need.
    """
    run = _Run(curve, curve.work_ms.tolist())
    early = int(np.searchsorted(np.array(t_ms), WARM_UP_MS))
    need = float(curve.work_ms[:early].sum()) / min(WARM_UP_MS, span_ms) / target
    pool = [Replica(0.0, 0.0) for _ in range(min(most, max(least, int(np.ceil(need)))))]
    closed: list[Interval] = []
    gone_ms, arrived_ms, low, next_ms = 0.0, 0.0, 0, CONTROL_MS
    for i, now in enumerate(t_ms):
        while next_ms <= now:
            wanted = min(most, max(least, int(np.ceil(arrived_ms / CONTROL_MS / target))))
            arrived_ms = 0.0
            if wanted > len(pool):
                pool += [Replica(next_ms, next_ms + react_ms) for _ in range(wanted - len(pool))]
            low = low + 1 if wanted < len(pool) else 0
            if low >= DOWN_AFTER:
                low, leaving = 0, pool[wanted:]
                pool = pool[:wanted]
                gone_ms += sum(r.busy_ms for r in leaving)
                closed += [(r.begun, r.begun, max(next_ms, r.busy_until), wanted + k) for k, r in enumerate(leaving)]
            next_ms += CONTROL_MS
        arrived_ms += run.work[i]
        run.admit(_soonest(pool, now, curve.slots), i, now)
        if run.late and run.lost:
            break
    closed += [(r.begun, r.begun, max(span_ms, r.begun), k) for k, r in enumerate(pool)]
    return run.over(pool, closed, gone_ms)


@dataclass(frozen=True, slots=True)
class WorkerRules:
    """`cold_ms` from nothing to serving; a worker ends `idle_ms` after its last request; the first `warm` never do."""

    cold_ms: float
    idle_ms: float
    warm: int = 0
    most: int = 1000


def workers(
    curve: Curve, t_ms: list[float], span_ms: float, rules: WorkerRules, progress: Progress | None = None
) -> Replayed:
    """Scale to zero and out, on demand."""
    run = _Run(curve, curve.work_ms.tolist())
    pool = [Replica(0.0, 0.0) for _ in range(rules.warm)]
    ended: list[Interval] = []
    gone_ms, slots = 0.0, curve.slots
    for i, now in enumerate(t_ms):
        if progress is not None and i % TICK == 0:
            progress(i)
        chosen, place, least_wait, soonest = -1, -1, NEVER, -1
        for k, replica in enumerate(pool):
            ends = replica.ends  # as Replica.taken, without the call
            if ends and ends[0] <= now:
                del ends[: bisect_right(ends, now)]
            count = len(ends)
            if not count and replica.alive_until <= now and k >= rules.warm:
                place = k if place < 0 else place  # ended: the next to start takes its place
            elif count < slots:
                chosen = k
                break
            elif (wait := ends[count - slots] - now) < least_wait:
                least_wait, soonest = wait, k
        if chosen < 0 and (place >= 0 or len(pool) < rules.most):
            chosen = place if place >= 0 else len(pool)
            if chosen == len(pool):
                pool.append(Replica(now, now + rules.cold_ms))
            else:
                old = pool[chosen]
                ended.append((old.begun, old.ready, old.alive_until, chosen))
                gone_ms += old.busy_ms
                pool[chosen] = Replica(now, now + rules.cold_ms)
            if least_wait < rules.cold_ms:
                chosen = soonest  # a place falls free before the new worker is up; it starts all the same
        replica = pool[chosen if chosen >= 0 else soonest]
        run.admit(replica, i, now)
        replica.alive_until = replica.busy_until + rules.idle_ms
        run.index.append(chosen if chosen >= 0 else soonest)
        if run.late and run.lost:
            break
    for k, replica in enumerate(pool):
        until = span_ms if k < rules.warm else max(replica.alive_until, replica.ready)
        ended.append((replica.begun, replica.ready, until, k))
    return run.over(pool, ended, gone_ms)
