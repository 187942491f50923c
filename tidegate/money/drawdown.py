"""Prepaid commitments: which of them pays for a request, and what that is worth. Pure, exact.

The instant a request *arrived* decides. Of the commitments of its tenant that are in force then and take its model and
mode, the lowest priority number pays first, then the one that expires first, then the oldest; a request may take from
several. A token is a token: prompt, cached, generated, batch. Prompt tokens are covered before cached ones, those
before generated ones; what no commitment covers is charged at the overage plan of the last one asked, or as ever.

A commitment of T tokens bought for P is worth ⌊P·n/T⌋ after n tokens, so that all its parts sum to P exactly.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tidegate.domain.contract import Contract, Drawn
from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import (
    NO_PRICE,
    REVENUE_DRAWDOWN,
    REVENUE_EXPIRED,
    REVENUE_MINIMUM,
    Adjustment,
    Entry,
    RatedUsage,
    commitment_account,
    tenant_account,
)
from tidegate.domain.price import PriceVersion
from tidegate.domain.usage import UsageRecord
from tidegate.money.rating import rate

GRACE_MS = 3_600_000  # a lapse waits this long: for requests that arrived in time and have not ended yet
ALERTS_PERCENT = (50, 80, 100)


@dataclass(frozen=True, slots=True)
class Taken:
    contract: Contract
    tokens: int
    nano_usd: int


class Commitments:
    """All contracts with what was drawn of them, and how `cover` moves that on. Nothing is kept until it is posted."""

    def __init__(self, contracts: Iterable[tuple[Contract, Drawn]]) -> None:
        self._drawn: dict[str, Drawn] = {}
        self._before: dict[str, Drawn] = {}
        self._of: dict[str, list[Contract]] = {}
        for contract, drawn in contracts:
            self._drawn[contract.id] = drawn
            self._of.setdefault(contract.tenant, []).append(contract)
        for mine in self._of.values():
            mine.sort(key=lambda c: (c.priority, c.expires_ms, c.created_ms, c.id))

    def __bool__(self) -> bool:
        return bool(self._of)

    def all(self) -> list[tuple[Contract, Drawn]]:
        return [(contract, self._drawn[contract.id]) for mine in self._of.values() for contract in mine]

    def refusing(self, now_ms: int) -> tuple[Contract, ...]:
        """Those that end in refusals and are not over, in the order in which they pay."""
        return tuple(c for mine in self._of.values() for c in mine if c.refuses and now_ms < c.expires_ms)

    def concern(self, record: UsageRecord) -> list[Contract]:
        """The commitments in force for it, in the order in which they pay; usually none."""
        if record.tenant not in self._of or not record.billable or record.mode == Mode.DEDICATED:
            return []
        return [c for c in self._of[record.tenant] if _in_force(c, record)]

    def cover(self, record: UsageRecord, contracts: Iterable[Contract]) -> list[Taken]:
        """Takes what the record used, as far as it goes."""
        wanted, taken = record.input_tokens + record.output_tokens, []
        for contract in contracts:
            drawn = self._drawn[contract.id]
            late = record.arrived_ms >= contract.expires_ms
            tokens = min(wanted, spendable(contract, drawn, late=late))
            if tokens <= 0:
                continue
            amount = worth(contract, drawn.total + tokens) - worth(contract, drawn.total)
            self._before.setdefault(contract.id, drawn)
            self._drawn[contract.id] = (
                replace(drawn, rolled=drawn.rolled + tokens) if late else replace(drawn, used=drawn.used + tokens)
            )
            taken.append(Taken(contract, tokens, amount))
            wanted -= tokens
        return taken

    def changes(self) -> dict[str, tuple[Drawn, Drawn]]:
        """What `cover` has moved since the last call: contract → (before, after)."""
        moved = {contract: (before, self._drawn[contract]) for contract, before in self._before.items()}
        self._before = {}
        return moved


def spendable(contract: Contract, drawn: Drawn, *, late: bool) -> int:
    """Tokens left for a request that arrived before (or, `late`, after) the contract's expiry."""
    left = contract.tokens - drawn.total
    return min(left, _rollover(contract, drawn) - drawn.rolled) if late else left


def with_drawdown(record: UsageRecord, taken: list[Taken], price: PriceVersion | None) -> RatedUsage:
    """The transaction of a record of which `taken` is paid by commitments; `price` is for the rest."""
    covered = sum(part.tokens for part in taken)
    rest = _uncovered(record, covered)
    rated = rate(rest, price) if rest.input_tokens + rest.output_tokens else None
    drawdown = (
        *(Entry(commitment_account(part.contract.id), part.tokens, part.nano_usd) for part in taken),
        Entry(REVENUE_DRAWDOWN, covered, -sum(part.nano_usd for part in taken)),
    )
    version = price.id if price is not None else NO_PRICE
    return RatedUsage(record, version, (*(rated.entries if rated else ()), *drawdown))


def purchase(contract: Contract) -> Adjustment:
    """The tenant owes the price from the beginning; what it has not used is owed to it in tokens."""
    entries = (
        Entry(tenant_account(contract.tenant), 0, contract.price_nano_usd),
        Entry(commitment_account(contract.id), 0, -contract.price_nano_usd),
    )
    return Adjustment(
        f"{contract.id}/purchase", "purchase", contract.id, contract.tenant, contract.created_ms, entries,
        quantity=contract.tokens,
    )  # fmt: skip


def lapse(contract: Contract, drawn: Drawn, now_ms: int) -> tuple[Adjustment, Drawn] | None:
    """What is due to lapse by now, as an entry of its own; None when nothing is."""
    if now_ms < contract.expires_ms + GRACE_MS:
        return None
    kept = _rollover(contract, drawn) - drawn.rolled
    if now_ms >= contract.expires_ms + contract.rollover_ms + GRACE_MS:
        kept = 0
    tokens = contract.tokens - drawn.total - max(0, kept)
    if tokens <= 0:
        return None
    after = replace(drawn, lapsed=drawn.lapsed + tokens)
    amount = worth(contract, after.total) - worth(contract, drawn.total)
    entries = (Entry(commitment_account(contract.id), tokens, amount), Entry(REVENUE_EXPIRED, tokens, -amount))
    name = f"{contract.id}/lapse/{after.lapsed}"
    return Adjustment(name, "lapse", contract.id, contract.tenant, now_ms, entries, quantity=tokens), after


def minimum(contract: Contract, month: tuple[int, int], used_nano_usd: int) -> Adjustment | None:
    """What a month's tokens (charged, and drawn from commitments) fall short of the contract's minimum."""
    shortfall = contract.minimum_month_nano_usd - used_nano_usd
    if shortfall <= 0:
        return None
    entries = (Entry(tenant_account(contract.tenant), 0, shortfall), Entry(REVENUE_MINIMUM, 1, -shortfall))
    name = f"{contract.id}/minimum/{month[0]}"
    return Adjustment(name, "minimum", contract.id, contract.tenant, month[1], entries)


def crossed(contract: Contract, drawn: Drawn) -> list[int]:
    """The alert thresholds, in percent of the tokens, that have been used up."""
    used = (drawn.used + drawn.rolled) * 100
    return [percent for percent in ALERTS_PERCENT if used >= percent * contract.tokens]


def overage_plan(contracts: Iterable[Contract]) -> str:
    """The plan for what commitments in force do not cover; empty: as without them."""
    return next((c.overage_plan for c in reversed(list(contracts)) if c.overage_plan), "")


def _in_force(contract: Contract, record: UsageRecord) -> bool:
    ends_ms = contract.expires_ms + (contract.rollover_ms if contract.rollover_percent else 0)
    return contract.starts_ms <= record.arrived_ms < ends_ms and contract.takes(record.model, record.mode)


def _rollover(contract: Contract, drawn: Drawn) -> int:
    """Tokens that stay spendable after expiry, of those that were not used before it."""
    return (contract.tokens - drawn.used) * contract.rollover_percent // 100 if contract.rollover_ms else 0


def worth(contract: Contract, tokens: int) -> int:
    """What the first `tokens` of it cost, in nano-USD."""
    return contract.price_nano_usd * tokens // contract.tokens


def _uncovered(record: UsageRecord, covered: int) -> UsageRecord:
    """The record without the tokens that commitments pay: prompt first, then cached, then generated."""
    fresh = record.input_tokens - record.cached_tokens
    of_fresh = min(covered, fresh)
    of_cached = min(covered - of_fresh, record.cached_tokens)
    cached = record.cached_tokens - of_cached
    return replace(
        record,
        input_tokens=fresh - of_fresh + cached,
        cached_tokens=cached,
        output_tokens=record.output_tokens - (covered - of_fresh - of_cached),
    )
