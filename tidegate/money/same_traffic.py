"""What the traffic of an endpoint would have cost in each mode, from sums over the very requests that were made. Pure.

Tokens are those the tenant was charged for or drew from a commitment; of a dedicated endpoint, those it consumed. They
are priced anew with the version that mode would have had, so where the mode is the endpoint's own, the line is what was
charged (minimums and commitments apart). `dedicated` is what holding the endpoint's accelerators would have cost.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import FactsSpan, UsageKey, UsageSum
from tidegate.domain.units import MS_PER_HOUR
from tidegate.money.prices import PriceTable, Sold
from tidegate.money.rating import percent_half_even
from tidegate.money.tariff import plan_at

PER_TOKEN = (Mode.SERVERLESS, Mode.DEDICATED_SERVERLESS, Mode.BATCH)


def cuts(
    prices_ms: Iterable[int], spans: Mapping[str, Sequence[FactsSpan]], start_ms: int, end_ms: int, gone_ms: int = 0
) -> list[tuple[int, int]]:
    """The stretches of [start_ms, end_ms) in which neither a price nor an endpoint's plan changed. Before `gone_ms`
    there are sums of whole hours only: a change within one is taken to be at its beginning.
    """
    changes = set(prices_ms)
    for found in spans.values():
        plan = ""
        for span in found:
            if span.facts is not None and span.facts.price_plan != plan:
                plan = span.facts.price_plan
                changes.add(span.start_ms)
    kept = {at if at >= gone_ms else at - at % MS_PER_HOUR for at in changes}
    instants = [start_ms, *sorted(at for at in kept if start_ms < at < end_ms), end_ms]
    return list(pairwise(instants)) if start_ms < end_ms else []


def token_costs(
    cells: Iterable[tuple[UsageKey, UsageSum]],
    at_ms: int,
    spans: Mapping[str, Sequence[FactsSpan]],
    prices: PriceTable,
) -> dict[tuple[str, str, Mode], int]:
    """(tenant, endpoint, mode) → nano-USD, for sums of a stretch that begins at `at_ms` and is not cut by a change."""
    costs: dict[tuple[str, str, Mode], int] = {}
    for key, cell in cells:
        plan = plan_at(spans.get(key.endpoint, ()), at_ms)
        fresh, cached, output = _tokens(key.mode, cell)
        for mode in PER_TOKEN:
            price = prices.in_force(plan, at_ms, Sold(key.tenant, key.endpoint, key.model, mode.value))
            if price is None:
                continue
            amounts = fresh * price.input_nano_usd, cached * price.cached_input_nano_usd, output * price.output_nano_usd
            percent = price.batch_percent if mode is Mode.BATCH else 100
            place = (key.tenant, key.endpoint, mode)
            costs[place] = costs.get(place, 0) + sum(percent_half_even(amount, percent) for amount in amounts)
    return costs


def _tokens(mode: str, cell: UsageSum) -> tuple[int, int, int]:
    """(input that was not cached, cached input, output)."""
    if mode == Mode.DEDICATED or cell.drawn_tokens:
        return cell.input_tokens - cell.cached_tokens, cell.cached_tokens, cell.output_tokens
    return cell.billed_input, cell.billed_cached, cell.billed_output
