"""The limits part of the admin API: rates, concurrency and budgets of keys, tenants and endpoints. Pure."""

from typing import Annotated

from msgspec import Meta, Struct

from tidegate.domain.limits import Scope, Window
from tidegate.wire.admin import Request

Rate = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Usd = Annotated[str, Meta(min_length=1, max_length=40)]


class LimitsPut(Request, frozen=True, kw_only=True):
    """All limits of one key, tenant or endpoint: what is left out is no limit. Budgets are decimal USD as text, of what
    tokens cost in a UTC day, a UTC calendar month, and in all.
    """

    scope: Scope
    subject: Annotated[str, Meta(min_length=1, max_length=160)]
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    concurrency: Rate | None = None
    budget_day_usd: Usd | None = None
    budget_month_usd: Usd | None = None
    budget_total_usd: Usd | None = None


class BudgetView(Struct, frozen=True, kw_only=True):
    """`spent_usd` is what the ledger has in the present window, which began at `start_ms`; None while not known."""

    window: Window
    usd: str
    spent_usd: str | None
    left_usd: str | None
    start_ms: int
    end_ms: int


class LimitsView(Struct, frozen=True, kw_only=True):
    scope: Scope
    subject: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    budgets: list[BudgetView]
