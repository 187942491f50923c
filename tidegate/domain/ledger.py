"""Money as the ledger keeps it: double entry, append-only, integer nano-USD.

A transaction is a handful of entries that sum to zero. A tenant's account holds what the tenant owes (positive), the
revenue accounts, one a kind of thing sold, the mirror image. Nothing is ever updated: a correction is another
transaction with the opposite entries.
"""

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import NamedTuple

from tidegate.domain.usage import UsageRecord

NO_PRICE = 0  # `price_version` of a transaction for which no price was in force
REVENUE_INPUT = "revenue/input"
REVENUE_CACHED_INPUT = "revenue/cached_input"
REVENUE_OUTPUT = "revenue/output"
REVENUE_ACCELERATOR_TIME = "revenue/accelerator_time"
REVENUE_MINIMUM = "revenue/minimum"
REVENUE_DRAWDOWN = "revenue/drawdown"
REVENUE_EXPIRED = "revenue/expired_commitments"
CREDITS = "credits"


def tenant_account(tenant: str) -> str:
    return f"tenant/{tenant}"


def commitment_account(contract: str) -> str:
    """What a tenant has prepaid and not yet used: negative; entries that draw it down carry the tokens."""
    return f"commitment/{contract}"


class Entry(NamedTuple):
    """`amount` is nano-USD: positive on a tenant's account, negative on a revenue account. `quantity` of a revenue
    entry is what was sold: tokens, or milliseconds of one accelerator; 0 on a tenant's account.
    """

    account: str
    quantity: int
    amount: int


class RatedUsage(NamedTuple):
    """A usage record, the price version it was rated with, and the entries of its transaction (none: no charge)."""

    record: UsageRecord
    price_version: int
    entries: tuple[Entry, ...]


class Charged(NamedTuple):
    """A usage record as the ledger has it: `number` is its transaction, `nano_usd` what the tenant owes for it."""

    number: int
    record: UsageRecord
    price_version: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class RatedTime:
    """Accelerator time of a dedicated endpoint within one hour: `duration_ms` is summed over its accelerators."""

    endpoint: str
    tenant: str
    hour_ms: int
    duration_ms: int
    price_version: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Posted:
    """What a page came to: `duplicates` were in the ledger already; `unrated`: billable without a price in force."""

    records: int
    duplicates: int
    unrated: int


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """What billing must know of a deployment: since when it exists, how many accelerators it would hold all the time
    (accelerators of a replica × base replicas, at least one replica), its price plan and its mode.
    """

    created_ms: int
    accelerators: int
    price_plan: str
    mode: str


@dataclass(frozen=True, slots=True)
class FactsSpan:
    """`facts` of `endpoint` held from `start_ms` until the next span of that endpoint; None: it did not exist."""

    endpoint: str
    start_ms: int
    facts: EndpointFacts | None


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A transaction of no request and no hour: `kind` is purchase | lapse | minimum | credit | rerate |
    rerate_reversal, or one of the last two with ``_undone``.

    Its `id` is what it can be posted once under; `reference` names the contract or re-rating. `quantity` is tokens.
    """

    id: str
    kind: str
    reference: str
    tenant: str
    at_ms: int
    entries: tuple[Entry, ...]
    endpoint: str = ""
    mode: str = ""
    quantity: int = 0
    note: str = ""

    @property
    def nano_usd(self) -> int:
        """What the tenant owes more (or less) by it."""
        owed = tenant_account(self.tenant)
        return sum(entry.amount for entry in self.entries if entry.account == owed)


class TimeState(StrEnum):
    """What an accelerator's time went into. Of these a tenant can owe for BUSY and IDLE only: a replica stood ready."""

    BUSY = auto()
    IDLE = auto()
    ACTIVATING = auto()
    DRAINING = auto()
    ASLEEP = auto()
    FREE = auto()
    UNREPORTED = auto()


class TimeCell(NamedTuple):
    """Accelerator time within one hour, in microseconds: `share_us` divides the accelerator among its replicas by their
    bytes (all shares of an accelerator sum to wall time; 0 while asleep), `held_us` is undivided, a replica at a time.

    `lender` is whose room was used, empty when nobody's; `endpoint` is empty when nobody used it.
    """

    hour_ms: int
    node: str
    accelerator: str
    kind: str
    endpoint: str
    mode: str
    state: TimeState
    lender: str
    held_us: int
    share_us: int


class StateSum(NamedTuple):
    """`TimeCell`s of one hour added up over the accelerators of one kind."""

    hour_ms: int
    kind: str
    endpoint: str
    mode: str
    state: TimeState
    lender: str
    held_us: int
    share_us: int


@dataclass(frozen=True, slots=True)
class TimePage:
    """All time of one node in [start_ms, until_ms)."""

    node: str
    start_ms: int
    until_ms: int
    cells: tuple[TimeCell, ...]


@dataclass(frozen=True, slots=True)
class TimeReport:
    """`settled_ms`: no time before it will be reported later, once `pages` are posted."""

    pages: tuple[TimePage, ...]
    settled_ms: int


class UsageGroup(StrEnum):
    """What usage can be summed by."""

    ENDPOINT = auto()
    MODEL = auto()
    TENANT = auto()
    MODE = auto()
    HOUR = auto()
    KEY = auto()


@dataclass(frozen=True, slots=True)
class UsageKey:
    """One cell of the finest sum the ledger keeps: an hour (its first epoch millisecond) of one combination."""

    hour_ms: int
    tenant: str
    key: str
    endpoint: str
    model: str
    mode: str
    price_version: int


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Sums over usage records and the tenant entries of their transactions. Tokens are all that were consumed;
    `billed_*` and `*_nano_usd` are what was charged. `billed_input` does not include `billed_cached`. `drawn_*` was
    paid from commitments instead.
    """

    requests: int = 0
    billed_requests: int = 0
    refused_requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    billed_input: int = 0
    billed_cached: int = 0
    billed_output: int = 0
    input_nano_usd: int = 0
    cached_nano_usd: int = 0
    output_nano_usd: int = 0
    minimum_nano_usd: int = 0
    drawn_tokens: int = 0
    drawn_nano_usd: int = 0

    @property
    def total_nano_usd(self) -> int:
        """What the tenant owes for it."""
        return self.input_nano_usd + self.cached_nano_usd + self.output_nano_usd + self.minimum_nano_usd


@dataclass(frozen=True, slots=True)
class TimeSum:
    """Accelerator time charged to a dedicated endpoint at one price: milliseconds of one accelerator, nano-USD."""

    endpoint: str
    tenant: str
    price_version: int
    duration_ms: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class OverflowSum:
    """Requests a tenant sent to `called` that `endpoint` served, by reason, and what they were charged there."""

    tenant: str
    called: str
    endpoint: str
    reason: str
    requests: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One request as a trace: what `usage export` writes and `simulate` reads. `number` is its transaction."""

    number: int
    arrived_ms: int
    endpoint: str
    input_tokens: int
    output_tokens: int
