"""A whole billing service over a real journal and a real SQLite ledger, on a clock that stands still."""

from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from tests.money import HOUR_MS, NOVEMBER_MS, StillClock, price
from tidegate.billing.service import Billing
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.ledger import EndpointFacts
from tidegate.domain.limits import Limits
from tidegate.domain.plan import DemandReported, EndpointApplied, NodeJoined, NodeLost, ReplicaChanged, ReplicaStatus
from tidegate.domain.replica import ReplicaState
from tidegate.domain.usage import UsageRecord
from tidegate.money.accelerator_time import AcceleratorTime
from tidegate.stores.contracts import SqlContracts
from tidegate.stores.database import migrate, open_database
from tidegate.stores.journal import JournalLimits, SegmentJournal
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.prices import SqlPriceBook

CHAT = EndpointFacts(created_ms=NOVEMBER_MS, accelerators=1, price_plan="default", mode="dedicated_serverless")
GOLD = EndpointFacts(created_ms=NOVEMBER_MS, accelerators=2, price_plan="gold", mode="dedicated_serverless")
MODEL = ModelProfile("m", "digest", ModelKind.GENERATIVE, 50, 1, 100)
NODE = Node("n1", "local", (Accelerator("gpu-0", "h200", 100), Accelerator("gpu-1", "h200", 100)), 1_000, 1_000)


class World:
    """`facts` is what the control plane would say; change it, move the clock, append records, then drain. Another World
    on the same directory is the same one after a restart. `url` is its database, a file in `directory` without it.
    """

    def __init__(self, directory: Path, url: str = "") -> None:
        engine = open_database(url or f"sqlite:///{directory / 'tidegate.db'}")
        migrate(engine)
        self.journals = directory / "journal"
        self.clock = StillClock(NOVEMBER_MS + 10 * HOUR_MS)
        self.facts: Mapping[str, EndpointFacts] | None = {"acme/chat": CHAT}
        self.ledger = SqlLedger(engine)
        self.time = AcceleratorTime(0, self.ledger.time_marks())
        self.prices = SqlPriceBook(engine)
        self.contracts = SqlContracts(engine)
        self.limits: tuple[Limits, ...] = ()
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
            time=self.time,
            limits=lambda: self.limits,
            contracts=self.contracts,
            tenants=lambda: ("acme", "birch"),
        )

    def gateway(self, boot: str = "boot-1", **limits: int) -> SegmentJournal:
        return SegmentJournal(self.journals, boot, JournalLimits(**limits))

    def node_joins(self, at_ms: int) -> None:
        """A node with two accelerators of 100 bytes."""
        self.time.event(NodeJoined(NODE), at_ms)

    def node_is_lost(self, at_ms: int) -> None:
        self.time.event(NodeLost(NODE.id), at_ms)

    def replica(self, at_ms: int, endpoint: str, mode: str, state: ReplicaState, *, nbytes: int = 100) -> None:
        """What a node says of a replica that holds `nbytes` on both accelerators."""
        wanted = Deployment(endpoint, endpoint.partition("/")[0], MODEL, Mode(mode), accelerator_bytes=nbytes)
        self.time.event(EndpointApplied(wanted), at_ms)
        status = ReplicaStatus(f"{endpoint}-1", endpoint, NODE.id, 1, state, ("gpu-0", "gpu-1"))
        self.time.event(ReplicaChanged(status), at_ms)

    def in_flight(self, at_ms: int, endpoint: str, requests: int) -> None:
        busy = (f"{endpoint}-1",) if requests else ()
        self.time.event(DemandReported("g1", endpoint, 0, requests, requests, busy=busy), at_ms)

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
