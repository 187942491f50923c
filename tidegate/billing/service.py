"""The billing service: keeps the ledger up to date with the journals, and answers what was used and what it costs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from tidegate.billing.commitments import Alerts
from tidegate.billing.delivery import Collector, Delivery
from tidegate.billing.ingest import Ingest
from tidegate.billing.metrics import BillingMetrics
from tidegate.billing.retention import keep_records
from tidegate.billing.statements import Statements
from tidegate.domain.contract import Contract
from tidegate.domain.errors import Refusal, StoreFault
from tidegate.domain.ledger import EndpointFacts, TimeReport
from tidegate.domain.limits import Limits
from tidegate.domain.money_ports import Contracts, DeadLetters, Ledger, PriceBook, TimeSource
from tidegate.domain.ports import Clock, JournalReader
from tidegate.domain.price import PriceVersion
from tidegate.money.economics import MachineCost
from tidegate.quota.treasury import Spent

log = logging.getLogger(__name__)

POLL_MS = 250
RETRY_MS_MAX = 5_000


class Billing:
    """`endpoint_facts` tells what is known of every endpoint now, None until the control plane has loaded its state; it
    is called on the event loop. `time` is where accelerator time comes from; without it, none is charged. `limits`
    name the budgets whose spending is added up. `on_prices` is told the whole price book after each change to it.
    `collectors` are sent an event for each request; what one of them will never take goes to `dead_letters`. Usage
    records are kept for `record_days` days, 0 for ever. `contracts` are prepaid commitments, `tenants` says who could
    have one, and `machines` what accelerators cost the operator.
    """

    def __init__(
        self,
        *,
        reader: JournalReader,
        ledger: Ledger,
        prices: PriceBook,
        clock: Clock,
        endpoint_facts: Callable[[], Mapping[str, EndpointFacts] | None],
        time: TimeSource | None = None,
        limits: Callable[[], Sequence[Limits]] = tuple,
        on_prices: Callable[[Sequence[PriceVersion]], Awaitable[None]] | None = None,
        collectors: Sequence[Collector] = (),
        dead_letters: DeadLetters | None = None,
        record_days: int = 0,
        contracts: Contracts | None = None,
        tenants: Callable[[], Collection[str]] = tuple,
        machines: MachineCost | None = None,
    ) -> None:
        self.ledger = ledger
        self.prices = prices
        self.clock = clock
        self.statements = Statements(ledger, prices, contracts, machines)
        self.contracts = contracts
        self.tenants = tenants
        self.metrics = BillingMetrics(self._lag_s)
        self._ingest = Ingest(reader, ledger, prices, self.metrics, contracts)
        self._endpoint_facts = endpoint_facts
        self._time = time
        self._limits = limits
        self._on_prices = on_prices
        assert not collectors or dead_letters is not None, "what a collector refuses must be kept somewhere"
        self._deliveries = [Delivery(c, ledger, dead_letters, self.metrics) for c in collectors if dead_letters]
        self._sinks = [collector.name for collector in collectors]
        self._record_days = record_days
        self._turn = asyncio.Lock()
        self._caught_up_ms = clock.now_ms()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            for delivery in self._deliveries:
                group.create_task(delivery.run())
            if self.contracts is not None:
                group.create_task(Alerts(self.contracts, self.clock).run())
            if self._record_days:
                group.create_task(keep_records(self.ledger, self.clock, self._record_days, self._sinks))

    async def _follow(self) -> None:
        """Drains for ever. While a store is away it tries again, at most every `RETRY_MS_MAX`."""
        retry_ms = POLL_MS
        while True:
            try:
                await self.drain()
                retry_ms = POLL_MS
            except StoreFault as fault:
                log.warning("the ledger is behind: %s", fault.reason)
                retry_ms = min(retry_ms * 2, RETRY_MS_MAX)
            await asyncio.sleep(retry_ms / 1000)

    async def check_tenant(self, tenant: str) -> None:
        """Somebody there is, or somebody who was removed and is still in the ledger. Raises Refusal, StoreFault."""
        if tenant in self.tenants() or await asyncio.to_thread(self.statements.remembers, tenant):
            return
        raise Refusal("not_found", f"`tenant`: there is no tenant {tenant[:64]!r}", param="tenant")

    @property
    def spent(self) -> Spent | None:
        """What the ledger has of each budget; None before the journals were first read to their ends."""
        return self._ingest.spending.known

    @property
    def refusing(self) -> Sequence[Contract]:
        """Contracts that refuse what they do not cover, as of the last look at them."""
        return self._ingest.refusing

    async def add_price(self, version: PriceVersion) -> PriceVersion:
        """Raises Refusal conflict when a version with the same terms begins at the same instant, StoreFault."""
        added = await asyncio.to_thread(self.prices.add, version)
        if self._on_prices is not None:
            await self._on_prices(await asyncio.to_thread(self.prices.versions))
        return added

    async def drain(self, *, checkpoint: bool = False) -> int:
        """Posts everything that is in the journals now; how many records that were. Raises StoreFault.

        `checkpoint`: also accelerator time up to this instant, instead of once in a while.
        """
        records, more = 0, True
        while more:
            async with self._turn:
                now_ms = self.clock.now_ms()
                time = self._reported(now_ms, checkpoint=checkpoint)
                turn = await asyncio.to_thread(self._ingest.turn, now_ms, self._endpoint_facts(), time, self._limits())
                if self._time is not None:
                    for page in time.pages:
                        self._time.confirm(page)
            records, more = records + turn.records, turn.more
        self._caught_up_ms = now_ms
        return records

    def alone(self) -> asyncio.Lock:
        """Held by whoever must not see the ledger grow meanwhile."""
        return self._turn

    def _reported(self, now_ms: int, *, checkpoint: bool) -> TimeReport:
        if self._time is None:
            return TimeReport((), 0)
        return self._time.report(now_ms, checkpoint_ms=0) if checkpoint else self._time.report(now_ms)

    def _lag_s(self) -> float:
        return max(0, self.clock.now_ms() - self._caught_up_ms) / 1000
