"""The billing part of the admin API: usage, prices, invoices. Pure.

Amounts are given twice: `nano_usd` is exact and for adding up, `usd` is the same as decimal text for reading.
Instants are epoch milliseconds.
"""

from typing import Annotated

from msgspec import Meta, Struct, field

from tidegate.domain.endpoint import Mode
from tidegate.wire.admin import Name, Request

PriceText = Annotated[str, Meta(min_length=1, max_length=40)]


class PriceCreate(Request, frozen=True, kw_only=True):
    """A new version of a price, as decimal text: USD per million tokens, USD per accelerator-hour.

    Its terms are a `plan` (``default`` when nothing is named), or any of `tenant`, `endpoint`, `model` and `mode`.
    `effective` is an instant not in the past (ISO 8601 or epoch milliseconds as text); left out: now. In the past it
    needs `retroactive`, and then counts for what is rated from now on and for `prices rerate` only. Cached input costs
    what input costs unless given. `accelerator_hours_usd` are kinds of accelerator that differ; `minimum_usd` is the
    least a billable request costs. `ends`: from then on these terms price nothing; amounts are left out.
    """

    plan: Name | None = None
    tenant: Name | None = None
    endpoint: Annotated[str, Meta(min_length=1, max_length=160)] | None = None
    model: Annotated[str, Meta(min_length=1, max_length=160)] | None = None
    mode: Mode | None = None
    currency: str = "USD"
    effective: Annotated[str, Meta(max_length=40)] | None = None
    retroactive: bool = False
    ends: bool = False
    input_usd_per_million: PriceText | None = None
    output_usd_per_million: PriceText | None = None
    cached_input_usd_per_million: PriceText | None = None
    accelerator_hour_usd: PriceText | None = None
    accelerator_hours_usd: Annotated[dict[str, PriceText], Meta(max_length=64)] = field(default_factory=dict)
    minimum_usd: PriceText = "0"
    batch_percent: Annotated[int, Meta(ge=0, le=100)] = 50


class PriceView(Struct, frozen=True, kw_only=True):
    """One line of the price book; in force from `effective_ms` until the next version with the same terms."""

    id: int
    plan: str
    tenant: str
    endpoint: str
    model: str
    mode: str
    effective_ms: int
    effective: str
    ends: bool
    currency: str
    input_usd_per_million: str
    cached_input_usd_per_million: str
    output_usd_per_million: str
    accelerator_hour_usd: str
    accelerator_hours_usd: dict[str, str]
    minimum_usd: str
    batch_percent: int
    created_ms: int


class UsageRow(Struct, frozen=True, kw_only=True):
    """Usage of one group. `input_tokens` includes `cached_tokens`; tokens are what was consumed, charged or not.

    `nano_usd` is what the tokens were charged; accelerator time of dedicated endpoints is on the invoice.
    """

    group: str
    requests: int
    billed_requests: int
    refused_requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    nano_usd: int
    usd: str


class UsageReport(Struct, frozen=True, kw_only=True):
    by: str
    start_ms: int
    end_ms: int
    rows: list[UsageRow]
    total: UsageRow


class InvoiceLine(Struct, frozen=True, kw_only=True):
    """`quantity` × unit price = amount. `item` is input_tokens | cached_input_tokens | output_tokens |
    accelerator_hours; the unit price is USD per million tokens or per accelerator-hour; `quantity` is tokens, or
    milliseconds of one accelerator. Without a unit price: minimum_charges, and committed_tokens, which were prepaid.
    """

    endpoint: str
    mode: str
    item: str
    quantity: int
    price_version: int
    unit_usd: str
    nano_usd: int
    usd: str


class DedicatedLine(Struct, frozen=True, kw_only=True):
    """What holding the endpoint's accelerators for all of the period (so far) would have cost."""

    endpoint: str
    accelerator_ms: int
    nano_usd: int
    usd: str


class ModeLine(Struct, frozen=True, kw_only=True):
    """What the traffic of the period would have cost in `mode` (`dedicated`: what holding the accelerators would have).

    `endpoint` is empty on a total.
    """

    endpoint: str
    mode: str
    nano_usd: int
    usd: str


class OverflowLine(Struct, frozen=True, kw_only=True):
    """Requests to `called` that `endpoint` served (its price counts; the amount is in its lines), and why."""

    called: str
    endpoint: str
    reason: str
    requests: int
    nano_usd: int
    usd: str


class Invoice(Struct, frozen=True, kw_only=True):
    """`total` is the sum of `lines`; `dedicated_total` of `dedicated`. `as_of_ms` is where an unfinished period was
    cut.

    `saved_nano_usd` is how much less than dedicated the tenant pays; negative when dedicated would have been cheaper.
    """

    tenant: str
    start_ms: int
    end_ms: int
    as_of_ms: int
    finished: bool
    lines: list[InvoiceLine]
    total_nano_usd: int
    total_usd: str
    dedicated: list[DedicatedLine]
    dedicated_total_nano_usd: int
    dedicated_total_usd: str
    saved_nano_usd: int
    saved_usd: str
    same_traffic: list[ModeLine]
    same_traffic_totals: list[ModeLine]
    overflow: list[OverflowLine]


class BalanceView(Struct, frozen=True, kw_only=True):
    """Everything ever charged to an account of the ledger; all accounts together are zero."""

    account: str
    nano_usd: int
    usd: str
