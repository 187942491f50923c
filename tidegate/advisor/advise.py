"""From traffic to advice: every offer replayed, the best of each mode, the hybrid optimum, break-even, the decision.

`advise` returns the public contract of `tidegate advise -o json` and of `/api/v1/advice`; all of it is plain JSON.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tidegate.advisor import breakeven, decide, hybrid
from tidegate.advisor.breakeven import BreakEven, Sides
from tidegate.advisor.catalogue import Offer, Provider, Rental
from tidegate.advisor.columns import refuse
from tidegate.advisor.costs import Costing, Need, Outcome
from tidegate.advisor.decide import ModeRow
from tidegate.advisor.hybrid import Hybrid
from tidegate.advisor.replay import WorkerRules
from tidegate.advisor.shape import Shape, measure
from tidegate.advisor.traffic import Floats, Traffic

MODES = ("serverless", "dedicated", "dedicated_serverless", "batch")
RESAMPLES = 400
HEAT_DAYS_MAX = 21
Progress = Callable[[str, int, int], None]
"""(what is being replayed, offers done, offers in all)"""


@dataclass(frozen=True, slots=True)
class Question:
    """`async_share` of the requests may wait a day. `providers`: whose offers are looked at, all when empty."""

    need: Need
    async_share: float = 0.0
    providers: tuple[str, ...] = ()
    current: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    provider: Provider
    offer: Offer
    outcome: Outcome
    allowed: str  # why it may not be recommended, or ""

    @property
    def name(self) -> str:
        return f"{self.provider.name}/{self.offer.id}"

    @property
    def fine(self) -> bool:
        return not self.allowed and not self.outcome.why_not

    @property
    def why(self) -> str:
        return self.allowed or self.outcome.why_not


def advise(
    traffic: Traffic,
    catalogue: Sequence[Provider],
    question: Question,
    today: datetime.date,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Raises Refusal for a question that cannot be answered (an unknown provider, a share outside 0 to 1)."""
    shape = measure(traffic)
    offers = [(p, o) for p in _asked(catalogue, question) for o in p.offer]
    now, later = _split(traffic, question.async_share)
    costing = Costing(now if now is not None else traffic, question.need)
    priced: list[Priced] = []
    for number, (provider, offer) in enumerate(offers):
        if progress is not None:
            progress(f"{provider.name}/{offer.id}", number, len(offers))
        looked_at = now is not None or offer.async_only or offer.billing == "tokens"
        outcome = costing.cost(offer) if looked_at else costing.nothing("not replayed: nobody waits for these requests")
        priced.append(Priced(provider, offer, outcome, _not_allowed(offer, question.need)))
    if progress is not None:
        progress("hybrid, break-even", len(offers), len(offers))
    batch = _batch(priced, later, question.need) if later is not None else None
    mixed = _hybrid(costing, priced) if now is not None else None
    even = _break_even(costing, priced) if now is not None else None
    modes = [_mode(mode, priced, costing, now is None) for mode in MODES if mode != "batch"]
    modes.append(_batch_mode(batch, priced, traffic, costing, question.async_share))
    modes.append(_hybrid_mode(mixed))
    best = decide.recommended(modes)
    return {
        "trace": traffic.name,
        "model": question.need.model.name,
        "slo_ttft_ms": question.need.slo_ttft_ms,
        "tpot_ms": question.need.tpot_ms,
        "notes": [*traffic.notes, *_apart_note(traffic, question.need)],
        "shape": _shape(shape, traffic),
        "modes": [asdict(row) for row in modes],
        "recommended": best.mode if best else None,
        "recommended_offer": best.offer if best else None,
        "break_even": _even(even),
        "hybrid": asdict(mixed) if mixed else None,
        "batch": batch,
        "decision": [asdict(s) for s in decide.path(modes, shape, even, question.need, question.async_share)],
        "changes": decide.changes(modes, even, question.need, question.current),
        "offers": [_offer(one, costing, today) for one in priced],
        "replays": costing.replays,
    }


def _asked(catalogue: Sequence[Provider], question: Question) -> list[Provider]:
    if not 0.0 <= question.async_share <= 1.0:
        raise refuse(f"--async-share: {question.async_share:g}; expected a share from 0 to 1")
    if question.current is not None and question.current not in (*MODES, "hybrid"):
        raise refuse(f"--current: {question.current[:40]!r}; accepted: {', '.join(MODES)}, hybrid")
    names = [provider.name for provider in catalogue]
    for name in question.providers:
        if name not in names:
            raise refuse(f"--provider: {name[:40]!r} is not in the catalogue; there are {', '.join(names)}")
    return [p for p in catalogue if not question.providers or p.name in question.providers]


def _split(traffic: Traffic, share: float) -> tuple[Traffic | None, Traffic | None]:
    """(who waits, who does not): every 1 ÷ share-th request may wait, evenly through the trace."""
    if share <= 0.0:
        return traffic, None
    if share >= 1.0:
        return None, traffic
    late = (np.arange(len(traffic)) * share) % 1.0 < share
    return traffic.chosen(~late), traffic.chosen(late)


def _not_allowed(offer: Offer, need: Need) -> str:
    if not offer.available:
        return offer.note or "is no longer offered"
    if need.private and not offer.private:
        return "shared by many customers: no private model, no isolation"
    if need.promised and not offer.latency_promised:
        return "promises no latency"
    return ""


def _batch(priced: Sequence[Priced], later: Traffic, need: Need) -> dict[str, Any] | None:
    """What the requests that may wait cost at the cheapest batch offer, and what they would cost answered at once."""
    found = []
    costing = Costing(later, replace(need, slo_ttft_ms=1e12))
    for one in priced:
        if one.offer.mode == "batch" and not one.allowed:
            outcome = costing.cost(one.offer)
            if outcome.total:
                found.append((outcome.total / later.months, one.name))
    if not found:
        return None
    now = [
        o.total / later.months for one in priced if one.fine and (o := costing.cost(one.offer)).total and not o.paid_ms
    ]
    usd, name = min(found)
    return {"offer": name, "requests": len(later), "monthly_usd": usd, "at_once_usd": min(now, default=None)}


def _mode(mode: str, priced: Sequence[Priced], costing: Costing, nobody_waits: bool) -> ModeRow:
    mine = [p for p in priced if p.offer.mode == mode and (p.outcome.total or p.outcome.paid_ms)]
    fine = [p for p in mine if p.fine]
    if not mine:
        why = next((p.why for p in priced if p.offer.mode == mode), "no offer of this mode in the catalogue")
        return ModeRow(mode, None, None, None, None, None, None, 0.0, None, False, why)
    usable = [p for p in mine if not p.allowed] or mine
    best = min(fine or usable, key=lambda p: p.outcome.total)
    row = _row(mode, best, costing)
    if nobody_waits and row.feasible:
        return replace(row, why=f"{row.why}; nobody waits for these, batch is cheaper")
    return row


def _row(mode: str, one: Priced, costing: Costing) -> ModeRow:
    outcome, months = one.outcome, costing.traffic.months
    low, high = _range(outcome.usd, months)
    seen = outcome.ttft_ms if len(outcome.ttft_ms) else None
    quantiles = [float(q) for q in np.quantile(seen, (0.5, 0.95, 0.99))] if seen is not None else [None] * 3
    idle = 1.0 - outcome.busy_ms / outcome.paid_ms if outcome.paid_ms else None
    return ModeRow(
        mode=mode,
        monthly_usd=outcome.total / months,
        low_usd=low,
        high_usd=high,
        p50_ttft_ms=quantiles[0],
        p95_ttft_ms=quantiles[1],
        p99_ttft_ms=quantiles[2],
        cold_share=outcome.cold / max(1, len(costing.traffic)),
        idle_share=None if idle is None else max(0.0, idle),
        feasible=one.fine,
        why=one.why or _because(one),
        offer=one.name,
        accelerator=outcome.accelerator,
        replicas=outcome.replicas,
    )


def _because(one: Priced) -> str:
    outcome = one.outcome
    match one.offer.billing:
        case "tokens":
            return "paid by the token; nothing while it is quiet"
        case "reserved":
            return f"{outcome.replicas} x {outcome.accelerator} paid by the hour, busy or not"
        case "worker" | "execution":
            warm = f", {outcome.warm} kept warm" if outcome.warm else ""
            during = "a worker is up" if one.offer.billing == "worker" else "requests run"
            return f"{outcome.accelerator} paid by the second while {during}{warm}"


def _range(usd: Floats, months: float) -> tuple[float, float]:
    """90 % of what the month comes to when its days (or hours) are drawn again from those seen."""
    if len(usd) < 2:
        return float(usd.sum()) / months, float(usd.sum()) / months
    drawn = np.random.default_rng(11).choice(usd, (RESAMPLES, len(usd))).sum(axis=1) / months
    return float(np.quantile(drawn, 0.05)), float(np.quantile(drawn, 0.95))


def _batch_mode(
    batch: dict[str, Any] | None, priced: Sequence[Priced], traffic: Traffic, costing: Costing, share: float
) -> ModeRow:
    """Batch for all of the traffic, so that it compares; feasible only where nobody waits for any of it."""
    whole = costing if share in (0.0, 1.0) else Costing(traffic, costing.need)
    offers = [p for p in priced if p.offer.mode == "batch" and not p.allowed]
    costed = [replace_outcome(p, whole.cost(p.offer)) for p in offers]
    costed = [p for p in costed if p.outcome.total]
    if not costed:
        return ModeRow("batch", None, None, None, None, None, None, 0.0, None, False, "no batch offer with a price")
    best = min(costed, key=lambda p: p.outcome.total)
    row = _row("batch", best, whole)
    late = f"{100 * (1 - share):.0f} % of the requests have somebody waiting"
    why = "everything may take up to 24 hours" if share >= 1.0 else late
    return replace(row, feasible=share >= 1.0, why=why, p50_ttft_ms=None, p95_ttft_ms=None, p99_ttft_ms=None)


def replace_outcome(one: Priced, outcome: Outcome) -> Priced:
    return Priced(one.provider, one.offer, outcome, one.allowed)


def _hybrid(costing: Costing, priced: Sequence[Priced]) -> Hybrid | None:
    bases = [
        (p.provider, p.offer)
        for p in priced
        if p.offer.billing == "reserved" and not p.allowed and not p.offer.many_models
    ]
    overflows = [
        (p.provider, p.offer)
        for p in priced
        if p.offer.billing == "tokens" and not p.offer.async_only and not p.allowed and p.outcome.total
    ]
    return hybrid.sweep(costing, bases, overflows) if bases and overflows else None


def _hybrid_mode(mixed: Hybrid | None) -> ModeRow:
    if mixed is None or not mixed.replicas:
        why = mixed.why if mixed else "needs a dedicated offer and one by the token, for one model"
        return ModeRow("hybrid", None, None, None, None, None, None, 0.0, None, False, why)
    usd = mixed.monthly_usd
    return ModeRow(
        "hybrid", usd, None, None, mixed.p50_ttft_ms, mixed.p95_ttft_ms, mixed.p99_ttft_ms, 0.0, None, mixed.feasible,
        mixed.why, f"{mixed.base} + {mixed.overflow}", mixed.accelerator, mixed.replicas,
    )  # fmt: skip


def _break_even(costing: Costing, priced: Sequence[Priced]) -> BreakEven | None:
    """Between the cheapest dedicated and the cheapest offer by the token that may be used here."""
    fixed = [p for p in priced if p.offer.billing == "reserved" and p.offer.scaling == "fixed" and not p.allowed]
    fixed = [p for p in fixed if p.outcome.paid_ms and not p.offer.many_models]
    tokens = [p for p in priced if p.offer.billing == "tokens" and not p.offer.async_only and not p.allowed]
    tokens = [p for p in tokens if p.outcome.total]
    if not fixed or not tokens or costing.need.apart:
        return None
    dedicated = min(fixed, key=lambda p: (not p.fine, p.outcome.total))
    by_token = min(tokens, key=lambda p: (not p.fine, p.outcome.total))
    rental = next(r for r in dedicated.offer.accelerators if dedicated.outcome.accelerator.endswith(r.name))
    curve = costing.curve_of(costing.traffic, rental, dedicated.offer.slots_max)
    if curve is None:
        return None
    sides = Sides(
        dedicated.name, rental, curve, by_token.name, by_token.outcome.total / len(costing.traffic),
        _workers_side(costing, priced), dedicated.outcome.replicas,
    )  # fmt: skip
    return breakeven.find(costing, sides)


def _workers_side(costing: Costing, priced: Sequence[Priced]) -> tuple[Rental, WorkerRules] | None:
    found = [p for p in priced if p.offer.billing == "worker" and not p.offer.async_only and not p.allowed]
    found = [p for p in found if p.outcome.paid_ms]
    if not found:
        return None
    best = min(found, key=lambda p: (not p.fine, p.outcome.total))
    rental = next(r for r in best.offer.accelerators if best.outcome.accelerator.endswith(r.name))
    cold_ms = (best.offer.cold_start_s + costing.need.model.weights_gb / best.offer.load_gb_s) * 1e3
    return rental, WorkerRules(cold_ms, best.offer.idle_s * 1e3, best.outcome.warm, best.offer.workers_max)


def _even(even: BreakEven | None) -> dict[str, Any] | None:
    return asdict(even) if even is not None else None


def _offer(one: Priced, costing: Costing, today: datetime.date) -> dict[str, Any]:
    known = bool(one.outcome.total or one.outcome.paid_ms)
    row = _row(one.offer.mode, one, costing)
    usd = row.monthly_usd if known else None
    facts = {
        "provider": one.provider.name,
        "title": one.offer.title,
        "billing": one.offer.billing,
        "warm": one.outcome.warm,
        "checked": one.provider.age(today),
        "stale": one.provider.stale(today),
        "assumed": one.offer.assumed,
    }
    return {**asdict(row), "monthly_usd": usd, **facts}


def _shape(shape: Shape, traffic: Traffic) -> dict[str, Any]:
    found = {k: v for k, v in asdict(shape).items() if k not in ("days", "minutes")}
    days = [[None if np.isnan(v) else round(float(v), 1) for v in day] for day in shape.days[:HEAT_DAYS_MAX]]
    return {**found, "kind": shape.kind, "endpoints": len(traffic.endpoints), "days": days}


def _apart_note(traffic: Traffic, need: Need) -> list[str]:
    count = len(traffic.endpoints)
    if count < 2:
        return []
    if need.apart:
        return [f"{count} endpoints, each a model of its own: costs are of all of them together"]
    return [f"{count} endpoints are taken as tenants of one model served together (--models-apart: a model each, "
            "--endpoint: only one of them)"]  # fmt: skip
