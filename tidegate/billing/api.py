"""The billing part of `/api/v1`: usage, export, prices, invoices, balances. Starlette routes; refusals and faults are
raised, and answered by the application they are mounted in.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum

from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tidegate.billing.contract_api import contract_routes
from tidegate.billing.exports import MEDIA_TYPES, ExportFormat, export
from tidegate.billing.http import Authorize, Guarded, answer, choice, guard, known
from tidegate.billing.invoice_csv import as_csv
from tidegate.billing.invoice_page import as_html
from tidegate.billing.periods import Period, parse_instant, parse_period
from tidegate.billing.price_api import price_routes
from tidegate.billing.rerate_api import rerate_routes
from tidegate.billing.service import Billing
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import UsageGroup
from tidegate.wire.admin import Identity, Listing
from tidegate.wire.billing import Invoice


class InvoiceFormat(StrEnum):
    JSON = "json"
    CSV = "csv"
    HTML = "html"


def routes(billing: Billing, authorize: Authorize) -> list[Route]:
    """The routes, for `control.api` to mount beside its own."""
    api = _Api(billing)
    guarded = guard(authorize)
    return [
        Route("/api/v1/usage", guarded(api.usage), methods=["GET"]),
        Route("/api/v1/usage/time", guarded(api.time), methods=["GET"]),
        Route("/api/v1/usage/export", guarded(api.export), methods=["GET"]),
        Route("/api/v1/invoices", guarded(api.invoices), methods=["GET"]),
        Route("/api/v1/invoices/{tenant}", guarded(api.invoice), methods=["GET"]),
        Route("/api/v1/balances", guarded(api.balances, admin=True), methods=["GET"]),
        *price_routes(billing, guarded),
        *_contract_routes(billing, guarded),
    ]


def _contract_routes(billing: Billing, guarded: Guarded) -> list[Route]:
    if billing.contracts is None:
        return []
    return [
        *contract_routes(billing, billing.contracts, guarded),
        *rerate_routes(billing, billing.contracts, guarded),
    ]


class _Api:
    """The handlers. A tenant's key sees that tenant only, whatever it asks for."""

    def __init__(self, billing: Billing) -> None:
        self._billing = billing
        self._statements = billing.statements

    async def usage(self, request: Request, identity: Identity) -> Response:
        """Usage of a period by endpoint, model, tenant, mode, hour or key, up to the last request that ended."""
        known(request, "by", "period", "from", "to", "tenant")
        by = choice(request, "by", UsageGroup, UsageGroup.ENDPOINT)
        period, tenant = self._period(request), await self._tenant(request, identity)
        await self._billing.drain()
        return answer(await asyncio.to_thread(self._statements.usage, period, by, tenant))

    async def time(self, request: Request, identity: Identity) -> Response:
        """Accelerator time of a period: who had it in which state, what was lent to whom, and what it brought in."""
        known(request, "period", "from", "to", "tenant")
        period, tenant = self._period(request), await self._tenant(request, identity)
        await self._billing.drain(checkpoint=True)
        now_ms = self._billing.clock.now_ms()
        return answer(await asyncio.to_thread(self._statements.time, period, now_ms, tenant))

    async def export(self, request: Request, identity: Identity) -> Response:
        """Usage of a period: ``csv`` is a trace (``t_s``, endpoint, input and output tokens), ``focus`` is FOCUS 1.0
        in CSV, ``cloudevents`` and ``lago`` are one event a line.
        """
        known(request, "format", "period", "from", "to", "tenant")
        form = choice(request, "format", ExportFormat, ExportFormat.CSV)
        period, tenant = self._period(request), await self._tenant(request, identity)
        await self._billing.drain()
        adjustments = await asyncio.to_thread(self._statements.adjustments, period, tenant)
        body = iterate_in_threadpool(export(self._billing.ledger, form, period, tenant, adjustments))
        return StreamingResponse(_encoded(body), media_type=MEDIA_TYPES[form])

    async def invoices(self, request: Request, identity: Identity) -> Response:
        """Invoices of a period: of every tenant, or of the one whose key asks. As JSON, CSV or a page (`format`)."""
        known(request, "period", "from", "to", "as_of", "format")
        form = choice(request, "format", InvoiceFormat, InvoiceFormat.JSON)
        period, as_of_ms = self._period(request), self._as_of(request)
        await self._billing.drain()
        if identity.tenant is not None:
            found = [await asyncio.to_thread(self._statements.invoice, identity.tenant, period, as_of_ms)]
        else:
            found = await asyncio.to_thread(self._statements.invoices, period, as_of_ms)
        return answer(Listing(found)) if form is InvoiceFormat.JSON else _rendered(found, form)

    async def invoice(self, request: Request, identity: Identity) -> Response:
        """One tenant's invoice of a period, line by line, beside what the same traffic would have cost in other modes.
        As JSON, CSV or a page (`format`).
        """
        known(request, "period", "from", "to", "as_of", "format")
        form = choice(request, "format", InvoiceFormat, InvoiceFormat.JSON)
        tenant = request.path_params["tenant"]
        if not identity.may_read(tenant):
            raise Refusal("not_found", f"there is no tenant {tenant[:64]!r}")
        period, as_of_ms = self._period(request), self._as_of(request)
        await self._billing.drain()
        await self._billing.check_tenant(tenant)
        found = await asyncio.to_thread(self._statements.invoice, tenant, period, as_of_ms)
        return answer(found) if form is InvoiceFormat.JSON else _rendered([found], form)

    async def balances(self, request: Request, identity: Identity) -> Response:
        """What was ever charged to each account of the ledger; all accounts together are zero."""
        await self._billing.drain()
        return answer(Listing(await asyncio.to_thread(self._statements.balances)))

    def _period(self, request: Request) -> Period:
        query = request.query_params
        return parse_period(query.get("period"), query.get("from"), query.get("to"), self._billing.clock.now_ms())

    def _as_of(self, request: Request) -> int:
        text = request.query_params.get("as_of")
        return self._billing.clock.now_ms() if text is None else parse_instant("as_of", text)

    async def _tenant(self, request: Request, identity: Identity) -> str | None:
        asked = request.query_params.get("tenant")
        if identity.tenant is not None:
            if asked not in (None, identity.tenant):
                message = "`tenant`: this key may read its own tenant's usage only"
                raise Refusal("permission_denied", message, param="tenant")
            return identity.tenant
        if asked is not None:
            await self._billing.check_tenant(asked)
        return asked


def _rendered(invoices: Sequence[Invoice], form: InvoiceFormat) -> Response:
    if form is InvoiceFormat.CSV:
        return Response(as_csv(invoices), media_type="text/csv; charset=utf-8")
    return Response(as_html(invoices), media_type="text/html; charset=utf-8")


async def _encoded(texts: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for text in texts:
        yield text.encode()
