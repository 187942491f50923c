"""A whole billing service over a real journal and a real SQLite ledger, on a clock that stands still."""

from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from tests.money import HOUR_MS, NOVEMBER_MS, StillClock, price
from tidegate.billing.service import Billing
from tidegate.domain.ledger import EndpointFacts
from tidegate.domain.usage import UsageRecord
from tidegate.stores.database import migrate, open_database
from tidegate.stores.journal import JournalLimits, SegmentJournal
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.prices import SqlPriceBook

CHAT = EndpointFacts(created_ms=NOVEMBER_MS, accelerators=1, price_plan="default", mode="dedicated_serverless")
GOLD = EndpointFacts(created_ms=NOVEMBER_MS, accelerators=2, price_plan="gold", mode="dedicated_serverless")


class World:
    """`facts` is what the control plane would say; change it, move the clock, append records, then drain. Another World
    on the same directory is the same one after a restart.
    """

    def __init__(self, directory: Path) -> None:
        engine = open_database(f"sqlite:///{directory / 'tidegate.db'}")
        migrate(engine)
        self.journals = directory / "journal"
        self.clock = StillClock(NOVEMBER_MS + 10 * HOUR_MS)
        self.facts: Mapping[str, EndpointFacts] | None = {"acme/chat": CHAT}
        self.ledger = SqlLedger(engine)
        self.prices = SqlPriceBook(engine)
        if not self.prices.versions():
            self.prices.add(price(effective_ms=0))
        self.billing = self.start_billing()

    def start_billing(self) -> Billing:
        return Billing(
            reader=SegmentJournalReader(self.journals),
            ledger=self.ledger,
            prices=self.prices,
            clock=self.clock,
            endpoint_facts=lambda: self.facts,
        )

    def gateway(self, boot: str = "boot-1", **limits: int) -> SegmentJournal:
        return SegmentJournal(self.journals, boot, JournalLimits(**limits))

    def metric(self, name: str) -> float | None:
        """As whoever serves ``/metrics`` would show it: registered with a registry of theirs."""
        theirs = CollectorRegistry()
        theirs.register(self.billing.metrics.registry)
        lines = generate_latest(theirs).decode().splitlines()
        return next((float(line.split()[1]) for line in lines if line.split()[0] == name), None)

    async def write(self, *records: UsageRecord, boot: str = "boot-1") -> None:
        """A gateway that writes these records and ends."""
        journal = self.gateway(boot)
        for record in records:
            await journal.append(record)
        journal.close()
