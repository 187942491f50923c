"""Rating a period again: what was charged is reversed, what would be charged by the present price book is posted. Pure.

A request keeps the tokens it was billed for (what a commitment paid stays paid) and the instant at which it arrived.
Sums are by tenant, endpoint and mode, over requests whose charge comes to something else.
"""

from collections.abc import Iterable
from dataclasses import replace

from tidegate.domain.ledger import (
    REVENUE_CACHED_INPUT,
    REVENUE_DRAWDOWN,
    REVENUE_INPUT,
    REVENUE_MINIMUM,
    REVENUE_OUTPUT,
    Adjustment,
    Charged,
    Entry,
    tenant_account,
)
from tidegate.domain.price import PriceVersion
from tidegate.money.prices import PriceTable, Sold
from tidegate.money.rating import rate

_TOKENS = (REVENUE_INPUT, REVENUE_CACHED_INPUT, REVENUE_OUTPUT)
_PRICED = (*_TOKENS, REVENUE_MINIMUM)

Sums = dict[str, tuple[int, int]]
"""Account → (quantity, amount)."""


class Rerating:
    def __init__(self, prices: PriceTable) -> None:
        self._prices = prices
        self._groups: dict[tuple[str, str, str], tuple[Sums, Sums]] = {}
        self.requests = 0
        self.changed = 0

    def add(self, charged: Charged, entries: Iterable[Entry], plan: str) -> None:
        """One request with the entries of its transaction, of an endpoint that had `plan` when it arrived."""
        record, entries = charged.record, list(entries)
        self.requests += 1
        was = [e for e in entries if e.account in (*_PRICED, tenant_account(record.tenant))]
        billed = {e.account: e.quantity for e in was if e.account in _TOKENS}
        if not entries:  # there was no price: all of it is billed now
            billed = {REVENUE_INPUT: record.input_tokens - record.cached_tokens,
                      REVENUE_CACHED_INPUT: record.cached_tokens, REVENUE_OUTPUT: record.output_tokens}  # fmt: skip
        fresh, cached, output = (billed.get(account, 0) for account in _TOKENS)
        if not was and entries:  # wholly paid by commitments
            return
        rest = replace(record, input_tokens=fresh + cached, cached_tokens=cached, output_tokens=output)
        drew = any(e.account == REVENUE_DRAWDOWN for e in entries)
        now = rate(rest, self._price(charged, plan, drew=drew)).entries
        if sorted(now) == sorted(was):
            return
        self.changed += 1
        old, new = self._groups.setdefault((record.tenant, record.endpoint, record.mode), ({}, {}))
        _sum(old, was)
        _sum(new, now)

    def adjustments(self, rerate: str, now_ms: int) -> list[Adjustment]:
        """A reversal and a new charge for each group."""
        made = []
        for (tenant, endpoint, mode), (old, new) in sorted(self._groups.items()):
            for kind, sums, sign in (("rerate_reversal", old, -1), ("rerate", new, 1)):
                sorted_sums = sorted(sums.items())
                entries = tuple(Entry(account, sign * q, sign * amount) for account, (q, amount) in sorted_sums)
                tokens = sum(sign * sums[account][0] for account in _TOKENS if account in sums)
                name = f"{kind}/{rerate}/{endpoint}/{mode}/{tenant}"
                if entries:
                    made.append(
                        Adjustment(name, kind, rerate, tenant, now_ms, entries, endpoint, mode, quantity=tokens)
                    )
        return made

    def _price(self, charged: Charged, plan: str, *, drew: bool) -> PriceVersion | None:
        """What a commitment did not cover stays at the plan it was charged at, which may be that for overage."""
        record, sold_at = charged.record, self._prices.version(charged.price_version)
        if drew and sold_at is not None and sold_at.plan:
            return self._prices.in_force(sold_at.plan, record.arrived_ms)
        sold = Sold(record.tenant, record.endpoint, record.model, record.mode)
        return self._prices.in_force(plan, record.arrived_ms, sold)


def undone(adjustment: Adjustment, now_ms: int) -> Adjustment:
    """Takes an adjustment back."""
    entries = tuple(Entry(account, -quantity, -amount) for account, quantity, amount in adjustment.entries)
    return replace(
        adjustment, id=f"{adjustment.id}/undone", kind=f"{adjustment.kind}_undone", at_ms=now_ms, entries=entries,
        quantity=-adjustment.quantity,
    )  # fmt: skip


def _sum(sums: Sums, entries: Iterable[Entry]) -> None:
    for account, quantity, amount in entries:
        had = sums.get(account, (0, 0))
        sums[account] = (had[0] + quantity, had[1] + amount)
