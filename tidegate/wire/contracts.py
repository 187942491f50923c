"""The contracts part of the admin API: prepaid commitments, their status, credits. Pure."""

from enum import StrEnum, auto
from typing import Annotated

from msgspec import Meta, Struct, field

from tidegate.domain.endpoint import Mode
from tidegate.wire.admin import Name, Request

Usd = Annotated[str, Meta(min_length=1, max_length=40)]
Instant = Annotated[str, Meta(max_length=40)]


class OnExhausted(StrEnum):
    """What becomes of requests that a contract in force has no tokens left for."""

    OVERAGE = auto()
    REFUSE = auto()


class ContractCreate(Request, frozen=True, kw_only=True):
    """`tokens` prepaid with `price_usd`. `id` makes the call idempotent; left out, one is made.

    Instants are ISO 8601 or epoch milliseconds; `starts` is not in the past, now when left out. `models` and `modes`
    are those it may be spent on, all when left out. `alert_secret` (``whsec_…``) is made where only `alert_url` is
    given, and shown this once. `on_exhausted`: what no commitment covers is charged (`overage`), or refused.
    """

    tenant: Name
    tokens: Annotated[int, Meta(ge=1, le=10**15)]
    price_usd: Usd
    expires: Instant
    id: Name | None = None
    starts: Instant | None = None
    priority: Annotated[int, Meta(ge=0, le=1_000)] = 100
    models: Annotated[list[str], Meta(max_length=64)] = field(default_factory=list)
    modes: Annotated[list[Mode], Meta(max_length=4)] = field(default_factory=list)
    rollover_percent: Annotated[int, Meta(ge=0, le=100)] = 0
    rollover_days: Annotated[int, Meta(ge=0, le=3_660)] = 0
    overage_plan: Name | None = None
    on_exhausted: OnExhausted = OnExhausted.OVERAGE
    minimum_month_usd: Usd = "0"
    alert_url: Annotated[str, Meta(max_length=2_000)] | None = None
    alert_secret: Annotated[str, Meta(max_length=200)] | None = None


class AlertView(Struct, frozen=True, kw_only=True):
    percent: int
    at_ms: int
    attempts: int
    ended_ms: int | None
    outcome: str


class ContractView(Struct, frozen=True, kw_only=True):
    """`state` is coming | active | rollover | exhausted | expired. `left_tokens` is what can be spent now (or, before
    it starts, then). `worth_left_usd` is the part of the price that is not used, not lapsed.
    """

    id: str
    tenant: str
    state: str
    tokens: int
    used_tokens: int
    lapsed_tokens: int
    left_tokens: int
    percent_used: int
    price_usd: str
    worth_left_usd: str
    starts: str
    expires: str
    rollover_until: str | None
    rollover_percent: int
    priority: int
    models: list[str]
    modes: list[str]
    overage_plan: str
    on_exhausted: OnExhausted
    minimum_month_usd: str
    alerts_to: str
    alerts: list[AlertView]


class ContractCreated(Struct, frozen=True, kw_only=True):
    """The only time `alert_secret` is shown."""

    contract: ContractView
    alert_secret: str | None


class CreditCreate(Request, frozen=True, kw_only=True):
    """`usd` less to pay for `tenant`. `id` makes the call idempotent."""

    tenant: Name
    usd: Usd
    id: Name | None = None
    note: Annotated[str, Meta(max_length=200)] = ""


class AdjustmentView(Struct, frozen=True, kw_only=True):
    """A transaction of no request: `kind` is purchase | lapse | minimum | credit | rerate | rerate_reversal."""

    id: str
    kind: str
    reference: str
    tenant: str
    endpoint: str
    mode: str
    at_ms: int
    quantity: int
    nano_usd: int
    usd: str
    note: str


class RerateCreate(Request, frozen=True, kw_only=True):
    """A finished period: `period` (2026-10), or `from` and `to`. `id` makes the call idempotent; `dry_run` posts
    nothing.
    """

    period: Instant | None = None
    start: Instant | None = field(default=None, name="from")
    end: Instant | None = field(default=None, name="to")
    id: Name | None = None
    dry_run: bool = False


class RerateReport(Struct, frozen=True, kw_only=True):
    """`requests` were looked at, `changed` of them come to something else (0 when the id was known already)."""

    id: str
    start_ms: int
    end_ms: int
    dry_run: bool
    requests: int
    changed: int
    adjustments: list[AdjustmentView]
    difference_nano_usd: int
    difference_usd: str


class RerateView(Struct, frozen=True, kw_only=True):
    id: str
    start: str
    end: str
    at: str
    undone: str | None
