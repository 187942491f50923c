"""Ports on the money side: the ledger, the price book, contracts, and what is delivered from them.

Adapters implement them; only `assemble` plugs them in. Every method may raise the `Fault` its docstring names.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tidegate.domain.contract import Alert, Contract, Drawn, Rerate
from tidegate.domain.ledger import (
    Adjustment,
    Charged,
    EndpointFacts,
    Entry,
    ExportRow,
    FactsSpan,
    OverflowSum,
    Posted,
    RatedTime,
    RatedUsage,
    StateSum,
    TimeCell,
    TimePage,
    TimeReport,
    TimeSum,
    UsageKey,
    UsageSum,
)
from tidegate.domain.limits import Spending
from tidegate.domain.ports import Cursor
from tidegate.domain.price import PriceVersion
from tidegate.domain.usage import UsageRecord


class PriceBook(Protocol):
    def add(self, price: PriceVersion) -> PriceVersion:
        """Stores a new version (its `id` is assigned). Never changes an old one."""
        ...

    def versions(self, plan: str | None = None) -> Sequence[PriceVersion]: ...


@dataclass(frozen=True, slots=True)
class LedgerPage:
    """What one read of a journal brings, posted whole or not at all together with the move of the cursor.

    `final` are records that will not change; `open` are the newest checkpoints of streams still running. An id occurs
    once in the page. `drawn` is what `final` takes from commitments: contract → (before, after).
    """

    start: Cursor
    next: Cursor
    final: tuple[RatedUsage, ...]
    open: tuple[UsageRecord, ...] = ()
    drawn: Mapping[str, tuple[Drawn, Drawn]] = field(default_factory=dict)


class Ledger(Protocol):
    """Append-only money. Every method is one transaction of its own; StoreFault when the database cannot do it."""

    def cursor(self, boot: str) -> Cursor:
        """How far the journal of `boot` has been posted; its beginning when nothing has."""
        ...

    def post(self, page: LedgerPage) -> Posted:
        """Posts a page. Records whose id is known are ignored. StoreFault when the cursor is not at `page.start`, when
        a commitment is not as the page says it was, and when a record that draws from one is known.
        """
        ...

    def known(self, ids: Collection[str]) -> Collection[str]:
        """Those of the ids that are posted."""
        ...

    def open_records(self, boot: str) -> Sequence[UsageRecord]:
        """Checkpoints of `boot` that never became final."""
        ...

    def post_time(self, times: Sequence[RatedTime]) -> int:
        """Posts accelerator time; an (endpoint, hour) already posted is ignored. How many were new."""
        ...

    def time_marks(self) -> Mapping[str, int]:
        """Node → the instant up to which its accelerator time was added."""
        ...

    def add_time(self, page: TimePage) -> None:
        """Adds a node's time. A page already added is ignored, one that overlaps is a StoreFault."""
        ...

    def state_sums(self, start_ms: int, end_ms: int) -> Sequence[StateSum]:
        """Where accelerator time went in the hours that begin in [start_ms, end_ms), an hour at a time."""
        ...

    def accelerator_sums(self, start_ms: int, end_ms: int) -> Sequence[TimeCell]:
        """The same by accelerator and state only, all hours as one."""
        ...

    def observe(self, now_ms: int, facts: Mapping[str, EndpointFacts]) -> None:
        """Remembers what changed since the last call: new, altered and vanished endpoints."""
        ...

    def spans(self) -> Sequence[FactsSpan]:
        """Everything ever observed, by endpoint and start."""
        ...

    def sums(
        self, start_ms: int, end_ms: int, tenant: str | None = None, *, hourly: bool = False
    ) -> Sequence[tuple[UsageKey, UsageSum]]:
        """Usage that arrived in [start_ms, end_ms), in the order of its keys. Refusal("invalid_request") for a part of
        an hour whose records are gone. Not `hourly`: one cell for all hours,
        with `start_ms` in place of the hour.
        """
        ...

    def time_sums(self, start_ms: int, end_ms: int, tenant: str | None = None) -> Sequence[TimeSum]:
        """Accelerator time billed for the hours that begin in [start_ms, end_ms), by endpoint and price version."""
        ...

    def overflow_sums(self, start_ms: int, end_ms: int, tenant: str | None = None) -> Sequence[OverflowSum]:
        """Requests that arrived in [start_ms, end_ms) and were not served by the endpoint they were sent to."""
        ...

    def time_posted_until(self) -> int:
        """End of the last hour whose accelerator time was posted; 0 when none was."""
        ...

    def spent(self, of: Spending, end_ms: int, boots: Collection[str]) -> Mapping[str, int]:
        """Nano-USD for tokens, charged or drawn, of requests that arrived within that window, which ends at `end_ms`:
        by gateway what `boots` did from `of.since_ms` on, under the empty name everything else.
        """
        ...

    def balances(self) -> Mapping[str, int]:
        """Nano-USD on every account that was ever posted to. They sum to zero."""
        ...

    def export(
        self, start_ms: int, end_ms: int, tenant: str | None, after: tuple[int, int], rows_max: int
    ) -> Sequence[ExportRow]:
        """Requests the engine answered, by arrival, after the (arrived_ms, number) of a previous row; first (-1, 0)."""
        ...

    def records(
        self, start_ms: int, end_ms: int, tenant: str | None, after: tuple[int, int], rows_max: int
    ) -> Sequence[Charged]:
        """The same whole, with what each was charged; refusals are left out."""
        ...

    def entries(self, numbers: Collection[int]) -> Mapping[int, tuple[Entry, ...]]:
        """The entries of transactions, of those that have any."""
        ...

    def records_after(self, number: int, rows_max: int) -> Sequence[Charged]:
        """Records in the order in which they were posted, after a transaction; refusals are left out."""
        ...

    def delivered(self, sink: str) -> int:
        """The last transaction that collector `sink` has taken; 0 when none."""
        ...

    def set_delivered(self, sink: str, number: int) -> None: ...

    def purge(self, before_ms: int, delivered: int | None, rows_max: int) -> int:
        """Removes records (not their sums, not their entries) of requests that arrived before an hour, up to a
        transaction; how many.
        """
        ...

    def records_from_ms(self) -> int:
        """Records of requests that arrived before this instant may be gone."""
        ...


class DeadLetters(Protocol):
    def append(self, sink: str, why: str, event: Mapping[str, object]) -> None:
        """Keeps an event that collector `sink` will never take. StoreFault when it cannot be kept."""
        ...


class Contracts(Protocol):
    """Prepaid commitments and their books, in the ledger's database. Every method may raise StoreFault."""

    def add(self, contract: Contract, purchase: Adjustment) -> None:
        """Stores it and posts its purchase. Refusal conflict when there is another with its id; the same again is
        nothing.
        """
        ...

    def all(self) -> Sequence[tuple[Contract, Drawn]]:
        """By tenant and id."""
        ...

    def lapse(self, contract: str, before: Drawn, after: Drawn, lapse: Adjustment) -> None:
        """Posts a lapse. StoreFault when the contract is not as it was."""
        ...

    def adjust(self, adjustments: Sequence[Adjustment]) -> int:
        """Posts those whose ids are not known; how many those were."""
        ...

    def adjustments(self, start_ms: int, end_ms: int, tenant: str | None = None) -> Sequence[Adjustment]:
        """Posted in [start_ms, end_ms), in that order; with their entries."""
        ...

    def rerate(self, rerate: Rerate, adjustments: Sequence[Adjustment]) -> None:
        """Posts a re-rating whole. Refusal conflict when its id is known, or a part of its period is rated again."""
        ...

    def undo_rerate(self, rerate: str, now_ms: int) -> Rerate:
        """Posts the opposite of all it posted, once. Refusal not_found."""
        ...

    def rerates(self) -> Sequence[Rerate]:
        """In the order in which they were made."""
        ...

    def cross(self, contract: str, percents: Sequence[int], now_ms: int) -> None:
        """Thresholds that were crossed: an alert for each that has none yet."""
        ...

    def alerts(self, contract: str | None = None) -> Sequence[Alert]:
        """All of one contract; those not ended yet of all when none is named."""
        ...

    def alerted(self, alert: Alert) -> None:
        """Keeps how it goes with an alert."""
        ...


class TimeSource(Protocol):
    """Where accelerator time comes from. Called on the event loop; never waits."""

    def report(self, now_ms: int, *, checkpoint_ms: int = ...) -> TimeReport:
        """Pages not yet confirmed, of nodes that have `checkpoint_ms` or more to tell."""
        ...

    def confirm(self, page: TimePage) -> None:
        """The ledger has it: it need not be offered again."""
        ...
