"""Where accelerator time went and what it brought in: a fold over the ledger. Synchronous; stores raise StoreFault."""

from collections.abc import Iterable, Mapping, Sequence

from tidegate.billing.invoices import owner
from tidegate.billing.periods import Period
from tidegate.domain.ledger import TimeCell, TimeState
from tidegate.domain.money_ports import Ledger, PriceBook
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import usd
from tidegate.money.economics import Account, Economics, MachineCost, economics
from tidegate.money.hours import dedicated_price
from tidegate.money.prices import DEFAULT_PLAN, PriceTable
from tidegate.money.rating import reserved_pieces
from tidegate.money.tariff import by_endpoint, plan_at
from tidegate.wire.accelerator_time import EndpointTime, LentTime, PlatformTime, StateTime, TimeView


def time_view(
    ledger: Ledger, book: PriceBook, period: Period, now_ms: int, tenant: str | None, machines: MachineCost | None
) -> TimeView:
    """Of everybody, or of one tenant's endpoints. Endpoints that used accelerators, were used or existed are in it."""
    spans = by_endpoint(ledger.spans())
    prices = PriceTable(book.versions())

    def price_of(endpoint: str, at_ms: int) -> PriceVersion | None:
        if not endpoint:
            return prices.in_force(DEFAULT_PLAN, at_ms)
        return dedicated_price(endpoint, at_ms, lambda name, ms: plan_at(spans.get(name, ()), ms), prices)

    start_ms, end_ms = period.start_ms, min(period.end_ms, now_ms)
    states = ledger.state_sums(start_ms, end_ms)
    found = economics(states, ledger.sums(start_ms, end_ms), ledger.time_sums(start_ms, end_ms), price_of)
    dedicated = {
        endpoint: sum(piece.nano_usd for piece in pieces)
        for endpoint, known in spans.items()
        if (pieces := reserved_pieces(known, start_ms, end_ms, prices))
    }
    endpoints = [
        _endpoint(endpoint, found.accounts.get(endpoint, Account()), dedicated.get(endpoint, 0))
        for endpoint in sorted((set(found.accounts) | set(dedicated)) - {""})
        if tenant in (None, owner(endpoint))
    ]
    lent = [
        LentTime(lender=lender, borrower=borrower, duration_ms=us // 1_000)
        for (lender, borrower), us in sorted(found.lent_us.items())
        if tenant in (None, owner(lender))
    ]
    cells = ledger.accelerator_sums(start_ms, end_ms) if tenant is None else ()
    return TimeView(
        start_ms=start_ms,
        end_ms=end_ms,
        endpoints=endpoints,
        # Whose room a tenant's is, or who is in it, is told only where both are the tenant's own.
        lent=lent if tenant is None else [one for one in lent if owner(one.borrower) == tenant],
        accelerators=_accelerators(cells),
        platform=_platform(found, cells, machines) if tenant is None else None,
    )


def _endpoint(endpoint: str, account: Account, dedicated: int) -> EndpointTime:
    margin = account.brought_in - account.worth
    return EndpointTime(
        endpoint=endpoint,
        tenant=owner(endpoint),
        states_ms=_ms(account.states_us),
        ready_ms=account.ready_us // 1_000,
        lent_ms=account.lent_us // 1_000,
        borrowed_ms=account.borrowed_us // 1_000,
        tokens_usd=usd(account.tokens),
        time_usd=usd(account.time),
        drawn_usd=usd(account.drawn),
        dedicated_usd=usd(dedicated),
        worth_usd=usd(account.worth),
        margin_usd=usd(margin),
        margin_nano_usd=margin,
    )


def _platform(found: Economics, cells: Iterable[TimeCell], machines: MachineCost | None) -> PlatformTime:
    states_us: dict[TimeState, int] = {}
    kinds_us: dict[str, int] = {}
    for cell in cells:
        states_us[cell.state] = states_us.get(cell.state, 0) + cell.share_us
        kinds_us[cell.kind] = kinds_us.get(cell.kind, 0) + cell.share_us
    brought_in = sum(account.brought_in for account in found.accounts.values())
    worth = sum(found.costs.values())
    cost = machines.of(kinds_us) if machines is not None else None
    profit = brought_in - cost if cost is not None else None
    return PlatformTime(
        wall_ms=sum(states_us.values()) // 1_000,
        states_ms=_ms(states_us),
        brought_in_usd=usd(brought_in),
        worth_usd=usd(worth),
        idle_usd=usd(found.costs.get("idle", 0)),
        boot_usd=usd(found.costs.get("boot", 0)),
        unreported_usd=usd(found.costs.get("unreported", 0)),
        margin_usd=usd(brought_in - worth),
        margin_nano_usd=brought_in - worth,
        machines_usd=usd(cost) if cost is not None else None,
        profit_usd=usd(profit) if profit is not None else None,
        profit_nano_usd=profit,
    )


def _accelerators(cells: Sequence[TimeCell]) -> list[StateTime]:
    places: dict[tuple[str, str, str], dict[TimeState, int]] = {}
    for cell in cells:
        states = places.setdefault((cell.node, cell.accelerator, cell.kind), {})
        states[cell.state] = states.get(cell.state, 0) + cell.share_us
    return [
        StateTime(node=node, accelerator=name, kind=kind, wall_ms=sum(us.values()) // 1_000, states_ms=_ms(us))
        for (node, name, kind), us in sorted(places.items())
    ]


def _ms(states_us: Mapping[TimeState, int]) -> dict[str, int]:
    return {state.value: us // 1_000 for state, us in sorted(states_us.items()) if us >= 1_000}
