"""What an hour of accelerator time is worth, and to whom: from sums of what accelerators did to ledger entries. Pure.

The rules (public): a dedicated endpoint pays, for each accelerator, the time a replica of its own stood ready on it, at
the price in force when the hour began; nothing while its node was down or unreported, while it loaded, woke, drained or
slept. All the rest is the platform's: valued at what the accelerator would have brought as dedicated on the plan
`default`, and entered as cost of serving, idle, lent, boot and unreported time against `platform/capacity`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import (
    NO_PRICE,
    REVENUE_ACCELERATOR_TIME,
    Entry,
    RatedTime,
    StateSum,
    TimeState,
    tenant_account,
)
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import accelerator_time_nano_usd
from tidegate.money.prices import DEFAULT_PLAN, PriceTable, Sold

CAPACITY = "platform/capacity"
READY = frozenset({TimeState.BUSY, TimeState.IDLE})
PlanAt = Callable[[str, int], str]
"""(endpoint, instant) → the endpoint's price plan."""


def rate_hour(hour_ms: int, sums: Sequence[StateSum], plan_of: PlanAt, prices: PriceTable) -> list[RatedTime]:
    """The transactions of one hour: one a dedicated endpoint, then the platform's (of no endpoint and tenant)."""
    held: dict[str, dict[str, int]] = {}
    for cell in sums:
        if cell.mode == Mode.DEDICATED and cell.state in READY and cell.held_us:
            kinds = held.setdefault(cell.endpoint, {})
            kinds[cell.kind] = kinds.get(cell.kind, 0) + cell.held_us
    rated = [_dedicated(endpoint, hour_ms, kinds, plan_of, prices) for endpoint, kinds in sorted(held.items())]
    return [*rated, *_platform(hour_ms, sums, prices.in_force(DEFAULT_PLAN, hour_ms))]


def dedicated_price(endpoint: str, at_ms: int, plan_of: PlanAt, prices: PriceTable) -> PriceVersion | None:
    """The version whose accelerator-hour an endpoint would pay as dedicated."""
    sold = Sold(endpoint.partition("/")[0], endpoint, mode=Mode.DEDICATED.value)
    return prices.in_force(plan_of(endpoint, at_ms), at_ms, sold)


def worth_nano_usd(time_us: Mapping[str, int], price: PriceVersion | None) -> int:
    """Accelerator kind → microseconds, at that price; rounded once a kind. Nothing without a price."""
    if price is None:
        return 0
    return sum(accelerator_time_nano_usd(us // 1_000, price.hour_nano_usd(kind)) for kind, us in time_us.items())


def _dedicated(endpoint: str, hour_ms: int, kinds: Mapping[str, int], plan_of: PlanAt, prices: PriceTable) -> RatedTime:
    price = dedicated_price(endpoint, hour_ms, plan_of, prices)
    amount, duration_ms = worth_nano_usd(kinds, price), sum(kinds.values()) // 1_000
    tenant = endpoint.partition("/")[0]
    entries = (Entry(tenant_account(tenant), 0, amount), Entry(REVENUE_ACCELERATOR_TIME, duration_ms, -amount))
    return RatedTime(endpoint, tenant, hour_ms, duration_ms, price.id if price else NO_PRICE, entries)


def _platform(hour_ms: int, sums: Iterable[StateSum], price: PriceVersion | None) -> list[RatedTime]:
    accounts: dict[str, dict[str, int]] = {}
    for cell in sums:
        if cell.share_us:
            kinds = accounts.setdefault(f"platform/{platform_cost(cell)}", {})
            kinds[cell.kind] = kinds.get(cell.kind, 0) + cell.share_us
    if not accounts:
        return []
    costs = [
        Entry(account, sum(kinds.values()) // 1_000, worth_nano_usd(kinds, price))
        for account, kinds in sorted(accounts.items())
    ]
    capacity = Entry(CAPACITY, 0, -sum(entry.amount for entry in costs))
    duration_ms = sum(entry.quantity for entry in costs)
    return [RatedTime("", "", hour_ms, duration_ms, price.id if price else NO_PRICE, (capacity, *costs))]


def platform_cost(cell: StateSum) -> str:
    """Which of the platform's accounts the time is a cost of, without ``platform/``."""
    if cell.lender:
        return "lent"
    match cell.state:
        case TimeState.BUSY | TimeState.IDLE if cell.mode == Mode.DEDICATED:
            return "dedicated"
        case TimeState.BUSY:
            return "serving"
        case TimeState.IDLE | TimeState.FREE | TimeState.ASLEEP:
            return "idle"
        case TimeState.ACTIVATING | TimeState.DRAINING:
            return "boot"
        case TimeState.UNREPORTED:
            return "unreported"
