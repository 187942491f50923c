"""What usage costs: from a usage record and the price book to ledger entries. Pure, exact, integer nano-USD.

The rules (public): the price in force when the request *arrived* counts. Input tokens the engine found in its cache
cost the cached price, the others the input price. Dedicated endpoints pay for accelerator time, not for tokens. Batch
pays `batch_percent` of the price; that is the one place where tokens need rounding, done a line at a time, half to
even. Where a price has a minimum, what a request falls short of it is a line of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import (
    NO_PRICE,
    REVENUE_CACHED_INPUT,
    REVENUE_INPUT,
    REVENUE_MINIMUM,
    REVENUE_OUTPUT,
    EndpointFacts,
    Entry,
    FactsSpan,
    RatedUsage,
    tenant_account,
)
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import accelerator_time_nano_usd
from tidegate.domain.usage import UsageRecord
from tidegate.money.prices import PriceTable, Sold

# Plain texts: a record's mode is one, and comparing two of them is what a million records can afford.
_DEDICATED, _BATCH = Mode.DEDICATED.value, Mode.BATCH.value


def rate(record: UsageRecord, price: PriceVersion | None) -> RatedUsage:
    """The transaction of one final record. Without a price in force it has no entries and `NO_PRICE`: never a guess."""
    if price is None:
        return RatedUsage(record, NO_PRICE, ())
    mode = record.mode
    if mode == _DEDICATED or not record.billable:
        return RatedUsage(record, price.id, ())
    cached, output = record.cached_tokens, record.output_tokens
    fresh = record.input_tokens - cached
    of_fresh, of_cached = fresh * price.input_nano_usd, cached * price.cached_input_nano_usd
    of_output = output * price.output_nano_usd
    if mode == _BATCH:
        percent = price.batch_percent
        of_fresh, of_cached = percent_half_even(of_fresh, percent), percent_half_even(of_cached, percent)
        of_output = percent_half_even(of_output, percent)
    owed = of_fresh + of_cached + of_output
    shortfall = price.minimum_nano_usd - owed
    if shortfall > 0:
        owed = price.minimum_nano_usd
    entries = [Entry(tenant_account(record.tenant), 0, owed)]
    if fresh:
        entries.append(Entry(REVENUE_INPUT, fresh, -of_fresh))
    if cached:
        entries.append(Entry(REVENUE_CACHED_INPUT, cached, -of_cached))
    if output:
        entries.append(Entry(REVENUE_OUTPUT, output, -of_output))
    if shortfall > 0:
        entries.append(Entry(REVENUE_MINIMUM, 1, -shortfall))
    return RatedUsage(record, price.id, tuple(entries) if len(entries) > 1 else ())


def worst_cost_nano_usd(input_tokens: int, output_tokens: int, mode: str, price: PriceVersion) -> int:
    """The most a request with at most so many tokens can be charged."""
    if mode == _DEDICATED:
        return 0
    cost = input_tokens * max(price.input_nano_usd, price.cached_input_nano_usd) + output_tokens * price.output_nano_usd
    if mode == _BATCH:
        cost = -(-cost * price.batch_percent // 100) + 3  # each of three lines may be rounded up
    return max(cost, price.minimum_nano_usd)


def token_cost_nano_usd(input_tokens: int, cached_tokens: int, output_tokens: int, price: PriceVersion) -> int:
    """What tokens cost at the full per-token price; `input_tokens` includes `cached_tokens`."""
    return (
        (input_tokens - cached_tokens) * price.input_nano_usd
        + cached_tokens * price.cached_input_nano_usd
        + output_tokens * price.output_nano_usd
    )


@dataclass(frozen=True, slots=True)
class ReservedPiece:
    """A stretch over which neither facts nor price changed; `accelerator_ms` is summed over the accelerators."""

    mode: str
    accelerator_ms: int
    price_version: int
    nano_usd: int


def reserved_pieces(spans: Sequence[FactsSpan], start_ms: int, end_ms: int, prices: PriceTable) -> list[ReservedPiece]:
    """What holding the endpoint's accelerators all the time costs in [start_ms, end_ms), cut wherever facts or price
    change.
    """
    pieces = []
    for index, span in enumerate(spans):
        until = spans[index + 1].start_ms if index + 1 < len(spans) else end_ms
        start, until = max(span.start_ms, start_ms), min(until, end_ms)
        if span.facts is None or start >= until:
            continue
        plan, sold = span.facts.price_plan, Sold(span.endpoint.partition("/")[0], span.endpoint, mode=_DEDICATED)
        cuts = [start, *prices.changes(plan, start, until, sold), until]
        for begin, end in pairwise(cuts):
            pieces.append(_piece(span.facts, end - begin, prices.in_force(plan, begin, sold)))
    return pieces


def _piece(facts: EndpointFacts, duration_ms: int, price: PriceVersion | None) -> ReservedPiece:
    accelerator_ms = duration_ms * facts.accelerators
    if price is None:
        return ReservedPiece(facts.mode, accelerator_ms, NO_PRICE, 0)
    amount = accelerator_time_nano_usd(accelerator_ms, price.accelerator_hour_nano_usd)
    return ReservedPiece(facts.mode, accelerator_ms, price.id, amount)


def percent_half_even(amount: int, percent: int) -> int:
    """`amount` × `percent` / 100 in whole nano-USD, rounded half to even; exact at 100."""
    whole, rest = divmod(amount * percent, 100)
    if rest > 50 or (rest == 50 and whole % 2):
        return whole + 1
    return whole
