"""Journal → rate → ledger. Synchronous; `Billing` runs it in a worker thread, one turn at a time.

Nothing here remembers how far it got: the cursor is in the ledger and moves in the same transaction as what was read.
So an ingest that is killed, or whose database is away for an hour, goes on where the ledger is; meanwhile the
journals wait on the gateways' disks.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tidegate.billing.commitments import ContractBooks
from tidegate.billing.metrics import BillingMetrics
from tidegate.billing.spending import SpendingFold
from tidegate.domain.contract import Contract
from tidegate.domain.errors import StoreFault
from tidegate.domain.ledger import EndpointFacts, FactsSpan, RatedUsage, StateSum, TimeReport
from tidegate.domain.limits import Limits
from tidegate.domain.money_ports import Contracts, Ledger, LedgerPage, PriceBook
from tidegate.domain.ports import Cursor, JournalPage, JournalReader
from tidegate.domain.units import MS_PER_HOUR
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.money.drawdown import Commitments, overage_plan, with_drawdown
from tidegate.money.hours import rate_hour
from tidegate.money.prices import PriceTable
from tidegate.money.rating import rate
from tidegate.money.tariff import Tariff, by_endpoint
from tidegate.quota.prepaid import rules

log = logging.getLogger(__name__)

PAGE_RECORDS_MAX = 8_000  # a transaction; the more there are, the fewer sums it writes a record
TURN_PAGES_MAX = 12


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn did. `more`: it stopped at a bound, not at the end of the journals."""

    records: int
    more: bool


class Ingest:
    """The only writer of usage into the ledger on this machine."""

    def __init__(
        self,
        reader: JournalReader,
        ledger: Ledger,
        prices: PriceBook,
        metrics: BillingMetrics,
        contracts: Contracts | None = None,
    ) -> None:
        self._reader = reader
        self._ledger = ledger
        self._prices = prices
        self._metrics = metrics
        self._observed: Mapping[str, EndpointFacts] | None = None
        self._spans: dict[str, list[FactsSpan]] = {}
        self._charged_until_ms = 0
        self._contracts = ContractBooks(contracts, ledger) if contracts is not None else None
        self._commitments = Commitments(())
        self.refusing: tuple[Contract, ...] = ()
        self.spending = SpendingFold(ledger)

    def turn(
        self,
        now_ms: int,
        facts: Mapping[str, EndpointFacts] | None,
        time: TimeReport,
        limits: Sequence[Limits] = (),
    ) -> Turn:
        """Brings the ledger up to date with the journals, or `TURN_PAGES_MAX` pages further. Raises StoreFault.

        `facts` is what is known of every endpoint, None while nothing is known yet; `time` is what nodes reported;
        `limits` name the budgets whose spending is added up.
        """
        try:
            return self._turn(now_ms, facts, time, limits)
        except StoreFault:
            self.spending.forget()  # a transaction whose end is not known may have been posted
            raise

    def _turn(
        self,
        now_ms: int,
        facts: Mapping[str, EndpointFacts] | None,
        time: TimeReport,
        limits: Sequence[Limits],
    ) -> Turn:
        self._observe(now_ms, facts)
        tariff = Tariff(PriceTable(self._prices.versions()), self._spans)
        self._commitments = self._contracts.load() if self._contracts is not None else Commitments(())
        self.refusing = self._commitments.refusing(now_ms)
        records = pages = 0
        boots = self._reader.boots()
        self.spending.watch((*limits, *rules(self.refusing)), boots, now_ms)
        for boot in boots:
            cursor = self._ledger.cursor(boot)
            while pages < TURN_PAGES_MAX:
                page = self._reader.read(cursor, PAGE_RECORDS_MAX)
                records += self._post(cursor, page, tariff)
                pages += 1
                if page.closed or page.next == cursor:
                    break
                cursor = page.next
        for node_time in time.pages:
            self._ledger.add_time(node_time)
        self._post_time(time.settled_ms, tariff)
        if pages < TURN_PAGES_MAX:
            self.spending.settle(boots)
            if self._contracts is not None:
                self._contracts.keep(self._commitments.all(), now_ms)
        return Turn(records, pages >= TURN_PAGES_MAX)

    # --- usage ----------------------------------------------------------------------------------------------------

    def _post(self, start: Cursor, page: JournalPage, tariff: Tariff) -> int:
        if page.damage:
            self._metrics.damage.inc()
            log.error("%s", page.damage)
        final, checkpoints = _newest(page.records)
        posted = 0
        if page.next != start or page.records:
            rated = self._rated(final, tariff)
            posted = self._count(LedgerPage(start, page.next, rated, checkpoints, self._commitments.changes()))
        if page.closed:
            posted += self._finish(page.next, tariff)
            self.spending.closed(start.boot)
        if page.closed or page.next.segment != start.segment:
            self._reader.forget(page.next)
        return posted

    def _finish(self, end: Cursor, tariff: Tariff) -> int:
        """The gateway is dead and its journal read: what its running streams had delivered by their last checkpoint."""
        left = self._ledger.open_records(end.boot)
        if not left:
            return 0
        lost = self._rated([replace(record, outcome=Outcome.GATEWAY_LOST) for record in left], tariff)
        return self._count(LedgerPage(end, end, lost, drawn=self._commitments.changes()))

    def _count(self, page: LedgerPage) -> int:
        posted = self._ledger.post(page)
        if posted.duplicates:
            self.spending.forget()
        else:
            self.spending.posted(page.final)
        self._metrics.records.inc(posted.records)
        self._metrics.duplicates.inc(posted.duplicates)
        if posted.unrated:
            self._metrics.unrated.inc(posted.unrated)
            log.error("%d billable requests had no price in force and were recorded without a charge", posted.unrated)
        return posted.records

    def _rated(self, records: Sequence[UsageRecord], tariff: Tariff) -> tuple[RatedUsage, ...]:
        """What is known already is posted once whatever it is rated with, but must not draw from a commitment again."""
        price = tariff.price
        if not self._commitments:
            return tuple([rate(record, price(record)) for record in records])
        drawing = {record.id for record in records if self._commitments.concern(record)}
        if drawing:
            drawing.difference_update(self._ledger.known(drawing))
        return tuple(
            self._drawn(record, tariff) if record.id in drawing else rate(record, price(record)) for record in records
        )

    def _drawn(self, record: UsageRecord, tariff: Tariff) -> RatedUsage:
        contracts = self._commitments.concern(record)
        taken = self._commitments.cover(record, contracts)
        overage = overage_plan(contracts)
        price = tariff.prices.in_force(overage, record.arrived_ms) if overage else tariff.price(record)
        return with_drawdown(record, taken, price) if taken else rate(record, price)

    # --- endpoints and accelerator time ---------------------------------------------------------------------------

    def _observe(self, now_ms: int, facts: Mapping[str, EndpointFacts] | None) -> None:
        if facts is not None and facts != self._observed:
            self._ledger.observe(now_ms, facts)
            self._observed = dict(facts)
        elif self._spans:
            return
        self._spans = by_endpoint(self._ledger.spans())

    def _post_time(self, settled_ms: int, tariff: Tariff) -> None:
        """Charges every hour of which nothing more will be reported, once; an hour that is over costs what it cost."""
        end_ms = settled_ms // MS_PER_HOUR * MS_PER_HOUR
        if end_ms <= self._charged_until_ms:
            return
        hours: dict[int, list[StateSum]] = {}
        for found in self._ledger.state_sums(self._ledger.time_posted_until(), end_ms):
            hours.setdefault(found.hour_ms, []).append(found)
        for hour_ms, sums in hours.items():
            self._ledger.post_time(rate_hour(hour_ms, sums, tariff.plan_at, tariff.prices))
        self._charged_until_ms = end_ms


def _newest(records: Iterable[UsageRecord]) -> tuple[list[UsageRecord], tuple[UsageRecord, ...]]:
    """Of each id the first final record, otherwise the newest checkpoint."""
    final: dict[str, UsageRecord] = {}
    checkpoints: dict[str, UsageRecord] = {}
    for record in records:
        if record.outcome is not Outcome.OPEN:
            final.setdefault(record.id, record)
        else:
            checkpoints[record.id] = record
    return list(final.values()), tuple(record for record in checkpoints.values() if record.id not in final)
