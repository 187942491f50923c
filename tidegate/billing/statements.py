"""Usage and invoices: folds over the ledger, the price book and what is known of endpoints. Synchronous.

Each is a function of what the stores hold and of its arguments, never of the clock: asked again with the same
`as_of_ms`, an invoice of a finished period is the same to the byte.
"""

from collections.abc import Callable, Sequence

from tidegate.billing.accelerator_time import time_view
from tidegate.billing.invoices import Book, make_invoice, owner
from tidegate.billing.periods import Period, iso
from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import Adjustment, UsageGroup, UsageKey, UsageSum, tenant_account
from tidegate.domain.money_ports import Contracts, Ledger, PriceBook
from tidegate.domain.units import usd
from tidegate.money.economics import MachineCost
from tidegate.money.prices import PriceTable
from tidegate.money.same_traffic import cuts, token_costs
from tidegate.money.tariff import by_endpoint
from tidegate.wire.accelerator_time import TimeView
from tidegate.wire.billing import BalanceView, Invoice, UsageReport, UsageRow

_GROUPS: dict[UsageGroup, Callable[[UsageKey], str]] = {
    UsageGroup.ENDPOINT: lambda key: key.endpoint,
    UsageGroup.MODEL: lambda key: key.model,
    UsageGroup.TENANT: lambda key: key.tenant,
    UsageGroup.MODE: lambda key: key.mode,
    UsageGroup.HOUR: lambda key: iso(key.hour_ms),
    UsageGroup.KEY: lambda key: key.key,
}


class Statements:
    """Every method may raise StoreFault. `machines`: what accelerators cost the operator, None where nobody said."""

    def __init__(
        self,
        ledger: Ledger,
        prices: PriceBook,
        contracts: Contracts | None = None,
        machines: MachineCost | None = None,
    ) -> None:
        self._machines = machines
        self._ledger = ledger
        self._contracts = contracts
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
        """A running period is cut at `as_of_ms`."""
        return make_invoice(self._book(period, tenant, as_of_ms), tenant)

    def invoices(self, period: Period, as_of_ms: int) -> list[Invoice]:
        """Of every tenant that used something or had an endpoint in the period."""
        book = self._book(period, None, as_of_ms)
        return [make_invoice(book, tenant) for tenant in book.tenants()]

    def time(self, period: Period, now_ms: int, tenant: str | None) -> TimeView:
        return time_view(self._ledger, self._prices, period, now_ms, tenant, self._machines)

    def remembers(self, tenant: str) -> bool:
        """Whether the ledger knows of this tenant: it was charged something, or had an endpoint."""
        return tenant_account(tenant) in self._ledger.balances() or any(
            owner(span.endpoint) == tenant for span in self._ledger.spans()
        )

    def balances(self) -> list[BalanceView]:
        sums = self._ledger.balances()
        return [BalanceView(account=name, nano_usd=amount, usd=usd(amount)) for name, amount in sorted(sums.items())]

    def adjustments(self, period: Period, tenant: str | None) -> Sequence[Adjustment]:
        if self._contracts is None:
            return ()
        return self._contracts.adjustments(period.start_ms, period.end_ms, tenant)

    def _book(self, period: Period, tenant: str | None, as_of_ms: int) -> Book:
        end_ms = max(min(period.end_ms, as_of_ms), period.start_ms)
        spans = by_endpoint(self._ledger.spans())
        versions = self._prices.versions()
        prices = PriceTable(versions)
        usage: list[tuple[UsageKey, UsageSum]] = []
        costs: dict[tuple[str, str, Mode], int] = {}
        gone_ms = self._ledger.records_from_ms()
        for start_ms, until_ms in cuts((v.effective_ms for v in versions), spans, period.start_ms, end_ms, gone_ms):
            cells = self._ledger.sums(start_ms, until_ms, tenant)
            usage += cells
            for place, amount in token_costs(cells, start_ms, spans, prices).items():
                costs[place] = costs.get(place, 0) + amount
        time = self._ledger.time_sums(period.start_ms, end_ms, tenant)
        adjustments = self.adjustments(Period(period.start_ms, end_ms), tenant)
        overflow = self._ledger.overflow_sums(period.start_ms, end_ms, tenant)
        return Book(period, end_ms, usage, time, spans, prices, costs, adjustments, overflow)


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
