"""The billing service: keeps the ledger up to date with the journals, and answers what was used and what it costs."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from tidegate.billing.ingest import Ingest
from tidegate.billing.metrics import BillingMetrics
from tidegate.billing.statements import Statements
from tidegate.domain.errors import StoreFault
from tidegate.domain.ledger import EndpointFacts
from tidegate.domain.ports import Clock, JournalReader, Ledger, PriceBook

log = logging.getLogger(__name__)

POLL_MS = 250
RETRY_MS_MAX = 5_000


class Billing:
    """`endpoint_facts` tells what is known of every endpoint now, None while the control plane has not loaded its
    state.

    It is called on the event loop.
    """

    def __init__(
        self,
        *,
        reader: JournalReader,
        ledger: Ledger,
        prices: PriceBook,
        clock: Clock,
        endpoint_facts: Callable[[], Mapping[str, EndpointFacts] | None],
    ) -> None:
        self.ledger = ledger
        self.prices = prices
        self.clock = clock
        self.statements = Statements(ledger, prices)
        self.metrics = BillingMetrics(self._lag_s)
        self._ingest = Ingest(reader, ledger, prices, self.metrics)
        self._endpoint_facts = endpoint_facts
        self._turn = asyncio.Lock()
        self._caught_up_ms = clock.now_ms()

    async def run(self) -> None:
        """Until cancelled. While a store is away it tries again, at most every `RETRY_MS_MAX`."""
        retry_ms = POLL_MS
        while True:
            try:
                await self.drain()
                retry_ms = POLL_MS
            except StoreFault as fault:
                log.warning("the ledger is behind: %s", fault.reason)
                retry_ms = min(retry_ms * 2, RETRY_MS_MAX)
            await asyncio.sleep(retry_ms / 1000)

    async def drain(self) -> int:
        """Posts everything that is in the journals now; how many records that were. Raises StoreFault."""
        records, more = 0, True
        while more:
            async with self._turn:
                now_ms = self.clock.now_ms()
                turn = await asyncio.to_thread(self._ingest.turn, now_ms, self._endpoint_facts())
            records, more = records + turn.records, turn.more
        self._caught_up_ms = now_ms
        return records

    def _lag_s(self) -> float:
        return max(0, self.clock.now_ms() - self._caught_up_ms) / 1000
