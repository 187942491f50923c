"""Which price a record pays: the plan its endpoint had, the version in force, both when the request arrived. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from tidegate.domain.ledger import FactsSpan
from tidegate.domain.price import PriceVersion
from tidegate.domain.usage import UsageRecord
from tidegate.money.prices import DEFAULT_PLAN, FOREVER_MS, FOUND_MAX, PriceTable, Sold


class Tariff:
    """A price book and what is known of endpoints. Nearly every record is like one before it: the price of the same
    endpoint, tenant, model and mode within a stretch in which nothing changed is a look into a table.
    """

    def __init__(self, prices: PriceTable, spans: Mapping[str, Sequence[FactsSpan]]) -> None:
        self.prices = prices
        self._spans = spans
        self._found: dict[tuple[str, str, str, str], tuple[int, int, PriceVersion | None]] = {}

    def price(self, record: UsageRecord) -> PriceVersion | None:
        sold = (record.tenant, record.endpoint, record.model, record.mode)
        found = self._found.get(sold)
        at_ms = record.arrived_ms
        if found is None or not found[0] <= at_ms < found[1]:
            if len(self._found) >= FOUND_MAX:
                self._found.clear()
            found = self._found[sold] = self._search(Sold(*sold), at_ms)
        return found[2]

    def plan_at(self, endpoint: str, at_ms: int) -> str:
        owner = endpoint.partition(":")[0]  # a canary's accelerators are paid at its endpoint's plan
        return plan_at(self._spans.get(owner, ()), at_ms)

    def _search(self, sold: Sold, at_ms: int) -> tuple[int, int, PriceVersion | None]:
        starts = [-FOREVER_MS, *(span.start_ms for span in self._spans.get(sold.endpoint, ())), FOREVER_MS]
        place = bisect_right(starts, at_ms)
        from_ms, until_ms, version = self.prices.stretch(self.plan_at(sold.endpoint, at_ms), at_ms, sold)
        return max(from_ms, starts[place - 1]), min(until_ms, starts[place]), version


def by_endpoint(spans: Iterable[FactsSpan]) -> dict[str, list[FactsSpan]]:
    """Spans of all endpoints, in the order of time, as those of each."""
    found: dict[str, list[FactsSpan]] = {}
    for span in spans:
        found.setdefault(span.endpoint, []).append(span)
    return found


def plan_at(spans: Sequence[FactsSpan], at_ms: int) -> str:
    """The price plan of the endpoint whose spans these are at an instant; the nearest one known outside of them."""
    index = bisect_right(spans, at_ms, key=lambda span: span.start_ms) - 1
    for span in [*reversed(spans[: index + 1]), *spans[index + 1 :]]:
        if span.facts is not None:
            return span.facts.price_plan
    return DEFAULT_PLAN
