"""Usage and invoices: folds over the ledger, the price book and what is known of endpoints. Synchronous.

Each is a function of what the stores hold and of its arguments, never of the clock: asked again with the same
`as_of_ms`, an invoice of a finished period is the same to the byte.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from tidegate.billing.periods import Period, iso
from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import NO_PRICE, ExportRow, FactsSpan, TimeSum, UsageGroup, UsageKey, UsageSum
from tidegate.domain.ports import Ledger, PriceBook
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import NANO_USD_PER_USD, TOKENS_PER_MILLION, usd
from tidegate.money.prices import PriceTable
from tidegate.money.rating import reserved_pieces
from tidegate.wire.billing import BalanceView, DedicatedLine, Invoice, InvoiceLine, UsageReport, UsageRow

EXPORT_PAGE_ROWS_MAX = 5_000

_GROUPS: dict[UsageGroup, Callable[[UsageKey], str]] = {
    UsageGroup.ENDPOINT: lambda key: key.endpoint,
    UsageGroup.MODEL: lambda key: key.model,
    UsageGroup.TENANT: lambda key: key.tenant,
    UsageGroup.MODE: lambda key: key.mode,
    UsageGroup.HOUR: lambda key: iso(key.hour_ms),
    UsageGroup.KEY: lambda key: key.key,
}


@dataclass(frozen=True, slots=True)
class _Book:
    """What invoices of one period are made from, read once for all tenants."""

    usage: Sequence[tuple[UsageKey, UsageSum]]
    time: Sequence[TimeSum]
    spans: dict[str, list[FactsSpan]]
    prices: PriceTable


class Statements:
    """Every method may raise StoreFault."""

    def __init__(self, ledger: Ledger, prices: PriceBook) -> None:
        self._ledger = ledger
        self._prices = prices

    def usage(self, period: Period, by: UsageGroup, tenant: str | None) -> UsageReport:
        """Usage of one tenant, or of all (None), summed by `by`, in the order of the groups."""
        cells = self._ledger.sums(period.start_ms, period.end_ms, tenant, hourly=by is UsageGroup.HOUR)
        groups: dict[str, list[UsageSum]] = {}
        for key, cell in cells:
            groups.setdefault(_GROUPS[by](key), []).append(cell)
        rows = [_usage_row(group, sums) for group, sums in sorted(groups.items())]
        total = _usage_row("total", [cell for _, cell in cells])
        return UsageReport(by=by.value, start_ms=period.start_ms, end_ms=period.end_ms, rows=rows, total=total)

    def invoice(self, tenant: str, period: Period, as_of_ms: int) -> Invoice:
        return _invoice(self._book(period, tenant), tenant, period, as_of_ms)

    def invoices(self, period: Period, as_of_ms: int) -> list[Invoice]:
        """Of every tenant that used something or had an endpoint in the period."""
        book = self._book(period, None)
        tenants = {key.tenant for key, _ in book.usage} | {time.tenant for time in book.time}
        end_ms = min(period.end_ms, as_of_ms)
        for endpoint, spans in book.spans.items():
            if reserved_pieces(spans, period.start_ms, end_ms, book.prices):
                tenants.add(_owner(endpoint))
        return [_invoice(book, tenant, period, as_of_ms) for tenant in sorted(tenants)]

    def balances(self) -> list[BalanceView]:
        sums = self._ledger.balances()
        return [BalanceView(account=name, nano_usd=amount, usd=usd(amount)) for name, amount in sorted(sums.items())]

    def export(self, period: Period, tenant: str | None) -> Iterator[Sequence[ExportRow]]:
        """Requests in the order of their arrival, in pages of at most `EXPORT_PAGE_ROWS_MAX`."""
        after = (-1, 0)
        while True:
            rows = self._ledger.export(period.start_ms, period.end_ms, tenant, after, EXPORT_PAGE_ROWS_MAX)
            if not rows:
                return
            yield rows
            after = (rows[-1].arrived_ms, rows[-1].number)

    def _book(self, period: Period, tenant: str | None) -> _Book:
        spans: dict[str, list[FactsSpan]] = {}
        for span in self._ledger.spans():
            spans.setdefault(span.endpoint, []).append(span)
        return _Book(
            self._ledger.sums(period.start_ms, period.end_ms, tenant),
            self._ledger.time_sums(period.start_ms, period.end_ms, tenant),
            spans,
            PriceTable(self._prices.versions()),
        )


def _invoice(book: _Book, tenant: str, period: Period, as_of_ms: int) -> Invoice:
    lines = [*_token_lines(book, tenant), *_time_lines(book, tenant)]
    lines.sort(key=lambda line: (line.endpoint, line.mode, line.price_version, _ITEM_ORDER.index(line.item)))
    end_ms = min(period.end_ms, as_of_ms)
    used = {key.endpoint for key, _ in book.usage if key.tenant == tenant}
    owned = {endpoint for endpoint in book.spans if _owner(endpoint) == tenant}
    dedicated = [
        line
        for endpoint in sorted(used | owned)
        for line in _dedicated_lines(endpoint, book.spans.get(endpoint, []), period.start_ms, end_ms, book.prices)
    ]
    total = sum(line.nano_usd for line in lines)
    would_be = sum(line.nano_usd for line in dedicated)
    return Invoice(
        tenant=tenant,
        start_ms=period.start_ms,
        end_ms=period.end_ms,
        as_of_ms=end_ms,
        finished=as_of_ms >= period.end_ms,
        lines=lines,
        total_nano_usd=total,
        total_usd=usd(total),
        dedicated=dedicated,
        dedicated_total_nano_usd=would_be,
        dedicated_total_usd=usd(would_be),
        saved_nano_usd=would_be - total,
        saved_usd=usd(would_be - total),
    )


_ITEM_ORDER = ("input_tokens", "cached_input_tokens", "output_tokens", "accelerator_hours")


def _token_lines(book: _Book, tenant: str) -> Iterator[InvoiceLine]:
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
        ):
            if quantity:
                yield _line(endpoint, mode, item, quantity, price, amount)


def _time_lines(book: _Book, tenant: str) -> Iterator[InvoiceLine]:
    for time in book.time:
        if time.tenant == tenant:
            price = book.prices.version(time.price_version)
            yield _line(time.endpoint, Mode.DEDICATED, "accelerator_hours", time.duration_ms, price, time.nano_usd)


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
    if price is None:
        return "0"
    unit = {
        "input_tokens": price.input_nano_usd * TOKENS_PER_MILLION,
        "cached_input_tokens": price.cached_input_nano_usd * TOKENS_PER_MILLION,
        "output_tokens": price.output_nano_usd * TOKENS_PER_MILLION,
        "accelerator_hours": price.accelerator_hour_nano_usd,
    }[item]
    percent = price.batch_percent if mode == Mode.BATCH else 100
    return f"{Decimal(unit * percent) / (100 * NANO_USD_PER_USD):f}"


def _dedicated_lines(
    endpoint: str, spans: Sequence[FactsSpan], start_ms: int, end_ms: int, prices: PriceTable
) -> Iterator[DedicatedLine]:
    pieces = reserved_pieces(spans, start_ms, end_ms, prices)
    if pieces:
        amount = sum(piece.nano_usd for piece in pieces)
        held_ms = sum(piece.accelerator_ms for piece in pieces)
        yield DedicatedLine(endpoint=endpoint, accelerator_ms=held_ms, nano_usd=amount, usd=usd(amount))


def _usage_row(group: str, sums: Sequence[UsageSum]) -> UsageRow:
    amount = sum(s.total_nano_usd for s in sums)
    return UsageRow(
        group=group,
        requests=sum(s.requests for s in sums),
        billed_requests=sum(s.billed_requests for s in sums),
        refused_requests=sum(s.refused_requests for s in sums),
        input_tokens=sum(s.input_tokens for s in sums),
        cached_tokens=sum(s.cached_tokens for s in sums),
        output_tokens=sum(s.output_tokens for s in sums),
        nano_usd=amount,
        usd=usd(amount),
    )


def _owner(endpoint: str) -> str:
    """The tenant of ``tenant/name``."""
    return endpoint.partition("/")[0]
