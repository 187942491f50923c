"""What of an offer is worth a replay: accelerators and numbers of warm workers, cheapest by the estimate first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.advisor import estimate
from tidegate.advisor.catalogue import Offer, Rental
from tidegate.advisor.hardware import Curve
from tidegate.advisor.replay import Replayed
from tidegate.advisor.traffic import HOUR_MS, Traffic

WARM_MAX = 2
CLOSE = 1.15  # whose estimate is within 15 % of the winner's is replayed too
TRIES_MAX = 12


@dataclass(frozen=True, slots=True, eq=False)
class Try:
    """One way to use an offer. `usd` and `meets` (the latency target) are estimates, but for workers of which none is
    kept warm: those were replayed.
    """

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


def warm_usd(offer: Offer, rental: Rental, span_ms: float) -> float:
    """What one worker on one accelerator costs to keep warm, beyond what it serves."""
    if offer.ping_s and offer.billing == "execution":
        pings = span_ms / (offer.ping_s * 1e3)
        return pings * offer.round_up_ms * rental.usd_per_hour / HOUR_MS
    rate = rental.usd_per_hour if rental.warm_usd_per_hour is None else rental.warm_usd_per_hour
    return span_ms * rate / HOUR_MS


def warm(offer: Offer, part: Traffic, slo_ms: float, cold_ms: float, none: Try, done: Replayed) -> list[Try]:
    """One, two … workers kept warm, from the replay of none: first workers take what they took, and so cost what being
    warm costs in place of what they cost then.
    """
    if offer.async_only:
        return []
    rental, curve = none.rental, none.curve
    rate = rental.usd_per_hour * curve.spread / HOUR_MS
    own_ms = float(np.quantile(curve.prefill_ms, 0.99))
    found, saved_ms = [], 0.0
    for count in range(1, WARM_MAX + 1):
        for begun, ready, until, number in done.intervals:
            if number == count - 1 and offer.billing == "worker":
                saved_ms += until - (begun if offer.bill_cold else ready)
            elif number == count - 1 and offer.bill_cold and ready > begun:
                saved_ms += cold_ms
        usd = none.usd - saved_ms * rate + count * warm_usd(offer, rental, part.span_ms) * curve.spread
        # With one kept warm a burst waits for a place on it, not for the worker that is starting.
        found.append(Try(rental, curve, count, usd, own_ms <= slo_ms))
    return found
