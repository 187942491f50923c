"""Where dedicated replicas begin to cost less than paying by the token: in utilisation, tokens, requests.

Two answers. The *closed form* is for traffic that fills a replica evenly: the hourly price ÷ the price of one request's
tokens is the requests an hour that pay for it, and that ÷ what one replica can do is its utilisation. The answer *for
this traffic* scales the trace up and down and sizes the replicas for its peaks at the latency target (by the estimate).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.advisor import estimate, hardware, replay
from tidegate.advisor.catalogue import Rental
from tidegate.advisor.costs import Costing
from tidegate.advisor.hardware import Curve
from tidegate.advisor.replay import WorkerRules
from tidegate.advisor.traffic import HOUR_MS, MONTH_HOURS, Traffic

REQUESTS_MAX = 400_000
REQUESTS_ENOUGH = 150_000  # a small trace is scaled up to these, a larger one to twice what it is
STEPS = tuple(2.0**k for k in range(-5, 9))


@dataclass(frozen=True, slots=True)
class Point:
    """The trace at `factor` times its volume. `utilisation` is its work ÷ the time of the replicas that carry it."""

    factor: float
    tokens_month: float
    replicas: int | None
    dedicated_usd: float | None
    tokens_usd: float
    workers_usd: float | None
    utilisation: float | None


@dataclass(frozen=True, slots=True)
class BreakEven:
    """`utilisation` of one always evenly filled replica at which both cost the same (above 1: never), and what that is
    in requests an hour and tokens a month. `ceiling` is the utilisation the latency target leaves this traffic on its
    dedicated replicas. `factor` is how many times this traffic has to grow (below 1: may shrink) until dedicated is
    cheaper, None: not within what was looked at. `sensitivity`: what is changed, and the utilisation then.
    """

    dedicated: str
    by_token: str
    usd_per_hour: float
    usd_per_request: float
    requests_per_hour: float
    tokens_month: float
    utilisation: float
    ceiling: float
    factor: float | None
    sensitivity: tuple[tuple[str, float | None], ...]
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """What is compared: a dedicated replica and its hourly price against tokens; workers by the second beside them."""

    dedicated: str
    rental: Rental
    curve: Curve
    by_token: str
    usd_per_request: float
    workers: tuple[Rental, WorkerRules] | None
    replicas: int


def find(costing: Costing, sides: Sides) -> BreakEven:
    traffic = costing.traffic
    hourly = sides.rental.usd_per_hour * sides.curve.spread
    per_hour = hourly / sides.usd_per_request
    per_request = float((traffic.inputs + traffic.outputs).mean())
    most = min(REQUESTS_MAX, max(REQUESTS_ENOUGH, 2 * len(traffic)))
    points = tuple(_point(costing, sides, step) for step in STEPS if 100 <= step * len(traffic) <= most)
    return BreakEven(
        dedicated=sides.dedicated,
        by_token=sides.by_token,
        usd_per_hour=hourly,
        usd_per_request=sides.usd_per_request,
        requests_per_hour=per_hour,
        tokens_month=per_hour * MONTH_HOURS * per_request,
        utilisation=per_hour / sides.curve.requests_per_hour,
        ceiling=float(sides.curve.work_ms.sum()) / (traffic.span_ms * max(1, sides.replicas)),
        factor=_crossing(points),
        sensitivity=tuple(_sensitivity(costing, sides, per_hour)),
        points=points,
    )


def _point(costing: Costing, sides: Sides, factor: float) -> Point:
    scaled = costing.traffic.scaled(factor)
    curve = _curve(costing, scaled, sides.rental, sides.curve.spread)
    need = costing.need
    count = estimate.replicas(curve, scaled.t_ms, scaled.span_ms, need.slo_ttft_ms) if curve else None
    workers = None
    if sides.workers is not None:
        rental, rules = sides.workers
        spread = hardware.fitting(need.model, hardware.known()[0][rental.name], rental.count_max) or 1
        other = _curve(costing, scaled, rental, spread)
        if other is not None:
            done = replay.workers(other, scaled.t_ms.tolist(), scaled.span_ms, rules)
            ms = sum(until - begun for begun, _, until, _ in done.intervals)
            workers = None if done.lost else ms * rental.usd_per_hour * spread / HOUR_MS / scaled.months
    hourly = sides.rental.usd_per_hour * sides.curve.spread
    return Point(
        factor=factor,
        tokens_month=float((scaled.inputs + scaled.outputs).sum()) / scaled.months,
        replicas=count,
        dedicated_usd=None if count is None else count * hourly * MONTH_HOURS,
        tokens_usd=sides.usd_per_request * len(scaled) / scaled.months,
        workers_usd=workers,
        utilisation=float(curve.work_ms.sum()) / (scaled.span_ms * count) if curve and count else None,
    )


def _curve(costing: Costing, traffic: Traffic, rental: Rental, spread: int) -> Curve | None:
    accelerator = hardware.known()[0][rental.name]
    return hardware.curve(traffic, costing.need.model, accelerator, spread, costing.need.tpot_ms, 256)


def _crossing(points: Sequence[Point]) -> float | None:
    """The smallest factor from which on dedicated costs less, between two points by proportion."""
    known = [(p.factor, p.dedicated_usd / p.tokens_usd) for p in points if p.dedicated_usd is not None]
    if not known or known[-1][1] > 1.0:
        return None
    cheaper = len(known)
    while cheaper > 0 and known[cheaper - 1][1] <= 1.0:
        cheaper -= 1
    if cheaper == 0:
        return known[0][0]
    (low, dear), (high, cheap) = known[cheaper - 1], known[cheaper]
    share = np.log(dear) / (np.log(dear) - np.log(cheap)) if dear != cheap else 1.0
    return float(low * (high / low) ** share)


def _sensitivity(costing: Costing, sides: Sides, per_hour: float) -> list[tuple[str, float | None]]:
    """The break-even utilisation when one input changes."""
    full = sides.curve.requests_per_hour
    found: list[tuple[str, float | None]] = [
        ("token prices 20 % lower", per_hour / 0.8 / full),
        ("token prices 20 % higher", per_hour / 1.2 / full),
        ("the accelerator-hour 20 % cheaper", per_hour * 0.8 / full),
        ("the accelerator-hour 20 % dearer", per_hour * 1.2 / full),
        ("throughput 20 % lower", per_hour / (0.8 * full)),
        ("throughput 20 % higher", per_hour / (1.2 * full)),
    ]
    if costing.traffic.fixed_time:
        return found
    for factor, words in ((0.5, "TPOT target halved"), (2.0, "TPOT target doubled")):
        other = Costing(costing.traffic, replace(costing.need, tpot_ms=costing.need.tpot_ms * factor))
        curve = _curve(other, costing.traffic, sides.rental, sides.curve.spread)
        found.append((words, per_hour / curve.requests_per_hour if curve else None))
    return found
