"""Invoices: lines of quantity × unit price from the sums of the ledger, beside what other modes would have cost. Pure.

The same to the byte whenever it is made, once the requests that arrived in the period have ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from msgspec import structs

from tidegate.billing.periods import Period
from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import NO_PRICE, Adjustment, FactsSpan, OverflowSum, TimeSum, UsageKey, UsageSum
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import MS_PER_HOUR, NANO_USD_PER_USD, TOKENS_PER_MILLION, accelerator_time_nano_usd, usd
from tidegate.money.prices import PriceTable
from tidegate.money.rating import reserved_pieces
from tidegate.money.same_traffic import PER_TOKEN
from tidegate.wire.billing import DedicatedLine, Invoice, InvoiceLine, ModeLine, OverflowLine

_ITEM_ORDER = (
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "minimum_charges",
    "committed_tokens",
    "accelerator_hours",
    "purchase",
    "lapse",
    "minimum",
    "credit",
    "rerate_reversal",
    "rerate",
    "rerate_reversal_undone",
    "rerate_undone",
)


@dataclass(frozen=True, slots=True)
class Book:
    """What invoices of one period (cut at `end_ms`) are made from, read once for all tenants.

    `costs`: (tenant, endpoint, mode) → nano-USD of the same traffic in that mode.
    """

    period: Period
    end_ms: int
    usage: Sequence[tuple[UsageKey, UsageSum]]
    time: Sequence[TimeSum]
    spans: dict[str, list[FactsSpan]]
    prices: PriceTable
    costs: dict[tuple[str, str, Mode], int]
    adjustments: Sequence[Adjustment] = ()
    overflow: Sequence[OverflowSum] = ()

    def tenants(self) -> list[str]:
        """Who used something, or had an endpoint."""
        found = {key.tenant for key, _ in self.usage} | {time.tenant for time in self.time}
        found |= {adjustment.tenant for adjustment in self.adjustments}
        for endpoint, spans in self.spans.items():
            if reserved_pieces(spans, self.period.start_ms, self.end_ms, self.prices):
                found.add(owner(endpoint))
        return sorted(found)


def make_invoice(book: Book, tenant: str) -> Invoice:
    lines = [*_token_lines(book, tenant), *_time_lines(book, tenant), *_adjustment_lines(book, tenant)]
    lines.sort(key=lambda line: (line.endpoint, line.mode, line.price_version, _ITEM_ORDER.index(line.item)))
    used = {key.endpoint for key, _ in book.usage if key.tenant == tenant}
    owned = {endpoint for endpoint in book.spans if owner(endpoint) == tenant}
    dedicated = [line for endpoint in sorted(used | owned) for line in _dedicated_lines(book, endpoint)]
    total = sum(line.nano_usd for line in lines)
    would_be = sum(line.nano_usd for line in dedicated)
    same_traffic = [*_mode_lines(book, tenant, used, dedicated)]
    return Invoice(
        tenant=tenant,
        start_ms=book.period.start_ms,
        end_ms=book.period.end_ms,
        as_of_ms=book.end_ms,
        finished=book.end_ms >= book.period.end_ms,
        lines=lines,
        total_nano_usd=total,
        total_usd=usd(total),
        dedicated=dedicated,
        dedicated_total_nano_usd=would_be,
        dedicated_total_usd=usd(would_be),
        saved_nano_usd=would_be - total,
        saved_usd=usd(would_be - total),
        same_traffic=same_traffic,
        same_traffic_totals=[
            _mode_line("", mode, sum(line.nano_usd for line in same_traffic if line.mode == mode))
            for mode in (*PER_TOKEN, Mode.DEDICATED)
        ],
        overflow=[_overflow_line(line) for line in book.overflow if line.tenant == tenant],
    )


def owner(endpoint: str) -> str:
    """The tenant of ``tenant/name``."""
    return endpoint.partition("/")[0]


def _mode_lines(book: Book, tenant: str, used: set[str], dedicated: Sequence[DedicatedLine]) -> Iterator[ModeLine]:
    held = {line.endpoint: line.nano_usd for line in dedicated}
    for endpoint in sorted(used | set(held)):
        for mode in PER_TOKEN:
            yield _mode_line(endpoint, mode, book.costs.get((tenant, endpoint, mode), 0))
        yield _mode_line(endpoint, Mode.DEDICATED, held.get(endpoint, 0))


def _mode_line(endpoint: str, mode: Mode, amount: int) -> ModeLine:
    return ModeLine(endpoint=endpoint, mode=mode.value, nano_usd=amount, usd=usd(amount))


def _overflow_line(line: OverflowSum) -> OverflowLine:
    return OverflowLine(
        called=line.called,
        endpoint=line.endpoint,
        reason=line.reason,
        requests=line.requests,
        nano_usd=line.nano_usd,
        usd=usd(line.nano_usd),
    )


def _token_lines(book: Book, tenant: str) -> Iterator[InvoiceLine]:
    """One line an endpoint, mode, price version and item; keys of the tenant are added up."""
    cells: dict[tuple[str, str, int], list[UsageSum]] = {}
    for key, cell in book.usage:
        if key.tenant == tenant:
            cells.setdefault((key.endpoint, key.mode, key.price_version), []).append(cell)
    for (endpoint, mode, version), sums in cells.items():
        price = book.prices.version(version)
        for item, quantity, amount in (
            ("input_tokens", sum(s.billed_input for s in sums), sum(s.input_nano_usd for s in sums)),
            ("cached_input_tokens", sum(s.billed_cached for s in sums), sum(s.cached_nano_usd for s in sums)),
            ("output_tokens", sum(s.billed_output for s in sums), sum(s.output_nano_usd for s in sums)),
            ("minimum_charges", sum(s.minimum_nano_usd > 0 for s in sums), sum(s.minimum_nano_usd for s in sums)),
            ("committed_tokens", sum(s.drawn_tokens for s in sums), 0),
        ):
            if quantity:
                yield _line(endpoint, mode, item, quantity, price, amount)


def _time_lines(book: Book, tenant: str) -> Iterator[InvoiceLine]:
    for time in book.time:
        if time.tenant == tenant:
            price = book.prices.version(time.price_version)
            line = _line(time.endpoint, Mode.DEDICATED, "accelerator_hours", time.duration_ms, price, time.nano_usd)
            at_one_price = accelerator_time_nano_usd(time.duration_ms, price.accelerator_hour_nano_usd) if price else 0
            hours = -(-(book.period.end_ms - book.period.start_ms) // MS_PER_HOUR)
            # Kinds of accelerator at prices of their own have no unit price together (an hour rounds by one at most).
            yield line if abs(at_one_price - time.nano_usd) <= hours else structs.replace(line, unit_usd="0")


def _adjustment_lines(book: Book, tenant: str) -> Iterator[InvoiceLine]:
    """What was bought, credited or rated again, at the instant it was; a lapse is a line that costs nothing more."""
    for adjustment in book.adjustments:
        if adjustment.tenant == tenant:
            endpoint = adjustment.endpoint or adjustment.reference or adjustment.id
            yield _line(endpoint, adjustment.mode, adjustment.kind, adjustment.quantity, None, adjustment.nano_usd)


def _line(endpoint: str, mode: str, item: str, quantity: int, price: PriceVersion | None, amount: int) -> InvoiceLine:
    return InvoiceLine(
        endpoint=endpoint,
        mode=str(mode),
        item=item,
        quantity=quantity,
        price_version=price.id if price else NO_PRICE,
        unit_usd=_unit_usd(item, mode, price),
        nano_usd=amount,
        usd=usd(amount),
    )


def _unit_usd(item: str, mode: str, price: PriceVersion | None) -> str:
    """What a million tokens or an accelerator-hour costs in this mode, exactly."""
    if price is None or item in ("minimum_charges", "committed_tokens"):
        return "0"
    unit = {
        "input_tokens": price.input_nano_usd * TOKENS_PER_MILLION,
        "cached_input_tokens": price.cached_input_nano_usd * TOKENS_PER_MILLION,
        "output_tokens": price.output_nano_usd * TOKENS_PER_MILLION,
        "accelerator_hours": price.accelerator_hour_nano_usd,
    }[item]
    percent = price.batch_percent if mode == Mode.BATCH else 100
    return f"{Decimal(unit * percent) / (100 * NANO_USD_PER_USD):f}"


def _dedicated_lines(book: Book, endpoint: str) -> Iterator[DedicatedLine]:
    pieces = reserved_pieces(book.spans.get(endpoint, []), book.period.start_ms, book.end_ms, book.prices)
    if pieces:
        amount = sum(piece.nano_usd for piece in pieces)
        held_ms = sum(piece.accelerator_ms for piece in pieces)
        yield DedicatedLine(endpoint=endpoint, accelerator_ms=held_ms, nano_usd=amount, usd=usd(amount))
