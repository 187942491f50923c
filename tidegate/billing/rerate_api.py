"""Rating a period again, and taking that back: explicit acts of an operator, in `/api/v1/prices/rerates`."""

import asyncio
import secrets

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tidegate.billing.contract_api import adjustment_view
from tidegate.billing.http import Guarded, answer, body_as
from tidegate.billing.periods import Period, iso, parse_period
from tidegate.billing.service import Billing
from tidegate.domain.contract import Rerate
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import Adjustment
from tidegate.domain.money_ports import Contracts
from tidegate.domain.units import usd
from tidegate.money.prices import PriceTable
from tidegate.money.rerate import Rerating
from tidegate.money.tariff import by_endpoint, plan_at
from tidegate.wire.admin import Identity, Listing
from tidegate.wire.contracts import RerateCreate, RerateReport, RerateView

PAGE_RECORDS_MAX = 1_000


def rerate_routes(billing: Billing, contracts: Contracts, guarded: Guarded) -> list[Route]:
    async def rerates(request: Request, identity: Identity) -> Response:
        """Periods that were rated again."""
        return answer(Listing([_view(rerate) for rerate in await asyncio.to_thread(contracts.rerates)]))

    async def rerate(request: Request, identity: Identity) -> Response:
        """Rate a finished period again: post what was charged reversed, and what the present price book says."""
        body = await body_as(request, RerateCreate)
        now_ms = billing.clock.now_ms()
        period = parse_period(body.period, body.start, body.end, now_ms)
        await billing.drain()
        async with billing.alone():
            return answer(await asyncio.to_thread(_rerate, billing, contracts, body, period, now_ms), status=201)

    async def undo(request: Request, identity: Identity) -> Response:
        """Take a re-rating back: post the opposite of everything it posted."""
        async with billing.alone():
            name, now_ms = request.path_params["rerate"], billing.clock.now_ms()
            return answer(_view(await asyncio.to_thread(contracts.undo_rerate, name, now_ms)))

    return [
        Route("/api/v1/prices/rerates", guarded(rerates, admin=True), methods=["GET"]),
        Route("/api/v1/prices/rerates", guarded(rerate, admin=True), methods=["POST"]),
        Route("/api/v1/prices/rerates/{rerate}/undo", guarded(undo, admin=True), methods=["POST"]),
    ]


def _rerate(billing: Billing, contracts: Contracts, body: RerateCreate, period: Period, now_ms: int) -> RerateReport:
    name = body.id or "rerate-" + secrets.token_hex(6)
    known = next((r for r in contracts.rerates() if r.id == name), None)
    if known is None:
        _check(billing, period, now_ms)
        rerating = _rated_again(billing, period)
        adjustments = rerating.adjustments(name, now_ms)
        if not body.dry_run:
            contracts.rerate(Rerate(name, period.start_ms, period.end_ms, now_ms), adjustments)
        return _report(name, period, adjustments, requests=rerating.requests, changed=rerating.changed, body=body)
    if (known.start_ms, known.end_ms) != (period.start_ms, period.end_ms):
        raise Refusal("conflict", f"`id`: {name!r} was another period: {iso(known.start_ms)} on", param="id")
    posted = [a for a in contracts.adjustments(0, now_ms + 1) if a.reference == name and "undone" not in a.kind]
    return _report(name, period, posted, requests=0, changed=0, body=body)


def _check(billing: Billing, period: Period, now_ms: int) -> None:
    if period.end_ms > now_ms:
        message = f"`to`: the period is not over; accepted: {iso(now_ms)} or earlier"
        raise Refusal("invalid_request", message, param="to")
    kept_ms = billing.ledger.records_from_ms()
    if period.start_ms < kept_ms:
        message = f"`from`: records before {iso(kept_ms)} are no longer kept; without them nothing can be rated again"
        raise Refusal("invalid_request", message, param="from")


def _rated_again(billing: Billing, period: Period) -> Rerating:
    ledger, rerating = billing.ledger, Rerating(PriceTable(billing.prices.versions()))
    spans = by_endpoint(ledger.spans())
    after = (-1, 0)
    while page := ledger.records(period.start_ms, period.end_ms, None, after, PAGE_RECORDS_MAX):
        entries = ledger.entries([charged.number for charged in page])
        for charged in page:
            plan = plan_at(spans.get(charged.record.endpoint, []), charged.record.arrived_ms)
            rerating.add(charged, entries.get(charged.number, ()), plan)
        after = (page[-1].record.arrived_ms, page[-1].number)
    return rerating


def _report(
    name: str, period: Period, adjustments: list[Adjustment], *, requests: int, changed: int, body: RerateCreate
) -> RerateReport:
    difference = sum(adjustment.nano_usd for adjustment in adjustments)
    return RerateReport(
        id=name,
        start_ms=period.start_ms,
        end_ms=period.end_ms,
        dry_run=body.dry_run,
        requests=requests,
        changed=changed,
        adjustments=[adjustment_view(adjustment) for adjustment in adjustments],
        difference_nano_usd=difference,
        difference_usd=usd(difference),
    )


def _view(rerate: Rerate) -> RerateView:
    return RerateView(
        id=rerate.id,
        start=iso(rerate.start_ms),
        end=iso(rerate.end_ms),
        at=iso(rerate.at_ms),
        undone=None if rerate.reversed_ms is None else iso(rerate.reversed_ms),
    )
