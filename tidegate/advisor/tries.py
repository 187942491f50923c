"""What of an offer is worth a replay: accelerators and numbers of warm workers, cheapest by the estimate first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.advisor import estimate
from tidegate.advisor.catalogue import Offer, Rental
from tidegate.advisor.hardware import Curve
from tidegate.advisor.replay import WorkerRules
from tidegate.advisor.traffic import HOUR_MS, Traffic

WARM_MAX = 2
CLOSE = 1.15  # whose estimate is within 15 % of the winner's is replayed too
TRIES_MAX = 12


@dataclass(frozen=True, slots=True, eq=False)
class Try:
    """One way to use an offer. `usd` and `meets` (the latency target) are estimates."""

    rental: Rental
    curve: Curve
    warm: int
    usd: float
    meets: bool


def ordered(tries: Sequence[Try], exhaustive: bool) -> Iterator[Try]:
    """All of them when exhaustive, else the promising ones: whoever iterates stops at the first good one, and goes on
    while `close` says so.
    """
    if exhaustive:
        yield from tries
        return
    good = sorted((t for t in tries if t.meets), key=lambda t: t.usd)
    yield from (good or sorted(tries, key=lambda t: t.usd)[:1])[:TRIES_MAX]


def reserved(part: Traffic, slo_ms: float, fit: Sequence[tuple[Rental, Curve]]) -> list[Try]:
    found = []
    for rental, curve in fit:
        count = estimate.replicas(curve, part.t_ms, part.span_ms, slo_ms)
        usd = (count or 1_000) * rental.usd_per_hour * curve.spread * part.span_ms / HOUR_MS
        found.append(Try(rental, curve, 0, usd, count is not None))
    return found


def workers(
    offer: Offer, part: Traffic, slo_ms: float, cold_ms: float, fit: Sequence[tuple[Rental, Curve]]
) -> list[Try]:
    found = []
    for rental, curve in fit:
        own_ms = float(np.quantile(curve.prefill_ms, 0.99))
        warm_rate = rental.usd_per_hour if rental.warm_usd_per_hour is None else rental.warm_usd_per_hour
        for warm in range(WARM_MAX + 1):
            rules = WorkerRules(cold_ms, offer.idle_s * 1e3, warm, offer.workers_max)
            ms, starts = estimate.worker_ms(curve, part.t_ms, rules)
            if offer.billing == "execution":
                ms = estimate.executed_ms(curve, part.t_ms) + starts * cold_ms * offer.bill_cold
            usd = (ms * rental.usd_per_hour + warm * part.span_ms * warm_rate) * curve.spread / HOUR_MS
            # With one kept warm a burst waits for a place on it, not for the worker that is starting.
            cold = not warm and starts > 0.01 * len(part) and cold_ms > slo_ms
            found.append(Try(rental, curve, warm, usd, own_ms <= slo_ms and not cold))
    return found
