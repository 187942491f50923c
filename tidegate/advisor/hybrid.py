"""How many dedicated replicas to reserve for the base, and what to let overflow: the exact optimum on the trace.

Requests go to the first base replica with a free place, so what reaches replica k + 1 is exactly what k replicas let
overflow: one replay gives the overflow of every k at once, and the cost of k base replicas is

    cost(k) = k x hours x hourly price + price of the tokens of the requests that reached a replica after the k-th

a newsvendor problem (reserve until the next replica's expected savings no longer pay for it) solved by trying all k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.advisor import replay
from tidegate.advisor.catalogue import Offer, Provider, Rental
from tidegate.advisor.costs import Costing, label
from tidegate.advisor.hardware import Curve
from tidegate.advisor.replay import NEVER, Replayed, WorkerRules
from tidegate.advisor.traffic import HOUR_MS, Floats

Named = tuple[Provider, Offer]
REPLICAS_MAX = 64
TRIED_MAX = 8  # the cheapest pairs of base and overflow that are asked whether they meet the target
THRESHOLDS = (1.0, 0.5, 0.25, 0.125)  # of the places of a base replica: overflow sooner, where full ones are too slow


@dataclass(frozen=True, slots=True)
class Hybrid:
    """`curve` is USD a month for 0, 1, 2 … base replicas; `replicas` is its best point with both a base and overflow.

    Requests overflow above `concurrency` at once on each base replica; `share` of them do. `why` says why there is no
    such point where `replicas` is 0.
    """

    base: str
    overflow: str
    accelerator: str
    replicas: int
    concurrency: int
    monthly_usd: float
    share: float
    p50_ttft_ms: float
    p95_ttft_ms: float
    p99_ttft_ms: float
    feasible: bool
    why: str
    curve: tuple[float, ...]


def sweep(costing: Costing, bases: Sequence[Named], overflows: Sequence[Named]) -> Hybrid | None:
    """None where there is nothing to combine: no base, no overflow by the token, or one model an endpoint."""
    part = costing.traffic
    if costing.need.apart or part.fixed_time:
        return None
    found: list[tuple[bool, float, Named, Named, Rental, Curve, Replayed, int, Floats]] = []
    replays: dict[tuple[str, int], list[tuple[Curve, Replayed]]] = {}
    hours = part.span_ms / HOUR_MS
    for base in bases:
        fit = [(r, c) for r in base[1].accelerators if (c := costing.curve_of(part, r, base[1].slots_max))]
        if not fit:
            continue
        rental, curve = min(fit, key=lambda pair: pair[0].usd_per_hour * pair[1].spread * float(pair[1].work_ms.sum()))
        key = (rental.name, curve.slots)
        if key not in replays:
            replays[key] = _replays(costing, rental, curve)
        for narrowed, done in replays[key]:
            slow = _p99(done.ttft_ms) > costing.need.slo_ttft_ms
            for overflow in overflows:
                priced = _usd_by_index(costing, overflow[1], done)
                if priced is None:
                    continue
                rate = rental.usd_per_hour * curve.spread * hours
                costs = np.arange(len(priced) + 1) * rate + priced.sum() - np.concatenate([[0.0], np.cumsum(priced)])
                both = costs[1 : len(priced)]
                k = int(np.argmin(both)) + 1 if len(both) else 0
                value = float(costs[k]) if k else float(costs[-1]) + 1e12
                found.append((slow, value, base, overflow, rental, narrowed, done, k, costs))
    if not found:
        return None
    found.sort(key=lambda one: (not one[7], *one[:2]))  # with something to overflow first
    said: list[Hybrid] = []
    for one in found[:TRIED_MAX]:
        said.append(_said(costing, *one[2:]))
        if said[-1].feasible:
            return said[-1]
    return said[0]


def _replays(costing: Costing, rental: Rental, curve: Curve) -> list[tuple[Curve, Replayed]]:
    """All places of each base replica are used before the next one; then ever fewer, until that meets the target."""
    part, found = costing.traffic, list[tuple[Curve, Replayed]]()
    for share in THRESHOLDS:
        slots = max(1, int(curve.slots * share))
        narrowed = curve if slots == curve.slots else costing.curve_of(part, rental, slots)
        if narrowed is None:
            break
        done = replay.workers(narrowed, part.t_ms.tolist(), part.span_ms, WorkerRules(0.0, NEVER, 0, REPLICAS_MAX))
        if not done.lost:
            found.append((narrowed, done))
            if _p99(done.ttft_ms) <= costing.need.slo_ttft_ms:
                break
    return found


def _p99(ttft_ms: Floats) -> float:
    return float(np.quantile(ttft_ms, 0.99))


def _said(
    costing: Costing, base: Named, overflow: Named, rental: Rental, curve: Curve, done: Replayed, k: int, costs: Floats
) -> Hybrid:
    part, months = costing.traffic, costing.traffic.months
    monthly = tuple(float(c) / months for c in costs)
    names = (f"{base[0].name}/{base[1].id}", f"{overflow[0].name}/{overflow[1].id}", label(rental.name, curve.spread))
    if not k:
        why = "one replica always has a place free: there is nothing to overflow"
        usd = monthly[1] if len(monthly) > 1 else monthly[0]
        return Hybrid(*names, 0, curve.slots, usd, 0.0, 0.0, 0.0, 0.0, False, why, monthly)
    over = np.array(done.index) >= k
    ttft = done.ttft_ms.copy()
    served = costing.by_tokens(overflow[1], part.chosen(over, f"{part.name} over {k} x {curve.slots} on {names[2]}"))
    if len(served.ttft_ms):
        ttft[over] = served.ttft_ms
    p50, p95, p99 = (float(q) for q in np.quantile(ttft, (0.5, 0.95, 0.99)))
    slo = costing.need.slo_ttft_ms
    why = f"{k} x {names[2]} reserved, {100 * over.mean():.1f} % overflow above {curve.slots} at once on each"
    if p99 > slo:
        why = f"p99 of TTFT {p99:,.0f} ms is over the target of {slo:,.0f} ms"
    return Hybrid(*names, k, curve.slots, monthly[k], float(over.mean()), p50, p95, p99, p99 <= slo, why, monthly)


def _usd_by_index(costing: Costing, offer: Offer, done: Replayed) -> Floats | None:
    """What the tokens of the requests on the 1st, 2nd … replica would cost overflowed."""
    price = offer.price_of(costing.need.model.name)
    if price is None:
        return None
    part = costing.traffic
    fresh = (part.inputs - part.cached) * price.input + part.cached * price.cached_or_input
    usd = (fresh + part.outputs * price.output) / 1e6
    return np.asarray(np.bincount(np.array(done.index), weights=usd), np.float64)
