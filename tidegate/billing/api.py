"""The billing part of `/api/v1`: usage, export, prices, invoices, balances. Starlette routes; refusals and faults are
raised, and answered by the application they are mounted in.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import wraps
from typing import TypeVar

import msgspec
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tidegate.billing.periods import Period, iso, parse_instant, parse_period
from tidegate.billing.service import Billing
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import UsageGroup
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import TOKENS_PER_MILLION, nano_usd, nano_usd_per_token, usd
from tidegate.wire.admin import Identity, Listing, decode
from tidegate.wire.billing import PriceCreate, PriceView

# `authorize(request, admin)`: who asks. Raises Refusal when the key is not good, or is a tenant's and `admin` is
# true.
Authorize = Callable[[Request, bool], Awaitable[Identity] | Identity]
Handler = Callable[[Request, Identity], Awaitable[Response]]
E = TypeVar("E", bound=StrEnum)

PRICE_USD_MAX = 1_000_000  # beyond any price, and sums of it stay far within 64 bits
BODY_BYTES_MAX = 64 << 10


class ExportFormat(StrEnum):
    CSV = "csv"


def routes(billing: Billing, authorize: Authorize) -> list[Route]:
    """The routes, for `control.api` to mount beside its own."""
    api = _Api(billing)

    def guarded(handler: Handler, *, admin: bool = False) -> Callable[[Request], Awaitable[Response]]:
        @wraps(handler)  # the OpenAPI document shows the handler's name and docstring
        async def endpoint(request: Request) -> Response:
            identity = authorize(request, admin)
            return await handler(request, identity if isinstance(identity, Identity) else await identity)

        return endpoint

    return [
        Route("/api/v1/usage", guarded(api.usage), methods=["GET"]),
        Route("/api/v1/usage/export", guarded(api.export), methods=["GET"]),
        Route("/api/v1/prices", guarded(api.prices), methods=["GET"]),
        Route("/api/v1/prices", guarded(api.add_price, admin=True), methods=["POST"]),
        Route("/api/v1/invoices", guarded(api.invoices), methods=["GET"]),
        Route("/api/v1/invoices/{tenant}", guarded(api.invoice), methods=["GET"]),
        Route("/api/v1/balances", guarded(api.balances, admin=True), methods=["GET"]),
    ]


class _Api:
    """The handlers. A tenant's key sees that tenant only, whatever it asks for."""

    def __init__(self, billing: Billing) -> None:
        self._billing = billing
        self._statements = billing.statements

    async def usage(self, request: Request, identity: Identity) -> Response:
        """Usage of a period by endpoint, model, tenant, mode, hour or key, up to the last request that ended."""
        _known(request, "by", "period", "from", "to", "tenant")
        by = _choice(request, "by", UsageGroup, UsageGroup.ENDPOINT)
        period, tenant = self._period(request), _tenant(request, identity)
        await self._billing.drain()
        return _json(await asyncio.to_thread(self._statements.usage, period, by, tenant))

    async def export(self, request: Request, identity: Identity) -> Response:
        """Usage as a trace in CSV: ``t_s`` (seconds into the period), endpoint, input and output tokens."""
        _known(request, "format", "period", "from", "to", "tenant")
        _choice(request, "format", ExportFormat, ExportFormat.CSV)
        period, tenant = self._period(request), _tenant(request, identity)
        await self._billing.drain()
        body = iterate_in_threadpool(self._csv(period, tenant))
        return StreamingResponse(_encoded(body), media_type="text/csv; charset=utf-8")

    def _csv(self, period: Period, tenant: str | None) -> Iterator[str]:
        yield "t_s,endpoint,input_tokens,output_tokens\n"
        for rows in self._statements.export(period, tenant):
            yield "".join(
                f"{_seconds(row.arrived_ms - period.start_ms)},{_csv_text(row.endpoint)},"
                f"{row.input_tokens},{row.output_tokens}\n"
                for row in rows
            )

    async def prices(self, request: Request, identity: Identity) -> Response:
        """Every version in the price book, or of one plan. It is no secret: whoever pays may read it."""
        _known(request, "plan")
        versions = await asyncio.to_thread(self._billing.prices.versions, request.query_params.get("plan"))
        return _json(Listing([_price_view(version) for version in versions]))

    async def add_price(self, request: Request, identity: Identity) -> Response:
        """Add a price version. It never touches what was rated already, so it cannot begin in the past."""
        body = decode(await _body(request), PriceCreate)
        now_ms = self._billing.clock.now_ms()
        effective_ms = now_ms if body.effective is None else parse_instant("effective", body.effective)
        if effective_ms < now_ms:
            message = f"`effective`: {body.effective!r} is in the past; accepted: {iso(now_ms)} or later"
            raise Refusal("invalid_request", message, param="effective")
        version = replace(_price(body), effective_ms=effective_ms, created_ms=now_ms)
        added = await asyncio.to_thread(self._billing.prices.add, version)
        return _json(_price_view(added), status=201)

    async def invoices(self, request: Request, identity: Identity) -> Response:
        """Invoices of a period: of every tenant, or of the one whose key asks."""
        _known(request, "period", "from", "to", "as_of")
        period, as_of_ms = self._period(request), self._as_of(request)
        await self._billing.drain()
        if identity.tenant is not None:
            return _json(
                Listing([await asyncio.to_thread(self._statements.invoice, identity.tenant, period, as_of_ms)])
            )
        return _json(Listing(await asyncio.to_thread(self._statements.invoices, period, as_of_ms)))

    async def invoice(self, request: Request, identity: Identity) -> Response:
        """One tenant's invoice of a period, line by line, beside what dedicated would have cost."""
        _known(request, "period", "from", "to", "as_of")
        tenant = request.path_params["tenant"]
        if not identity.may_read(tenant):
            raise Refusal("not_found", f"there is no tenant {tenant[:64]!r}")
        period, as_of_ms = self._period(request), self._as_of(request)
        await self._billing.drain()
        return _json(await asyncio.to_thread(self._statements.invoice, tenant, period, as_of_ms))

    async def balances(self, request: Request, identity: Identity) -> Response:
        """What was ever charged to each account of the ledger; all accounts together are zero."""
        await self._billing.drain()
        return _json(Listing(await asyncio.to_thread(self._statements.balances)))

    def _period(self, request: Request) -> Period:
        query = request.query_params
        return parse_period(query.get("period"), query.get("from"), query.get("to"), self._billing.clock.now_ms())

    def _as_of(self, request: Request) -> int:
        text = request.query_params.get("as_of")
        return self._billing.clock.now_ms() if text is None else parse_instant("as_of", text)


def _tenant(request: Request, identity: Identity) -> str | None:
    asked = request.query_params.get("tenant")
    if identity.tenant is None:
        return asked
    if asked not in (None, identity.tenant):
        raise Refusal("permission_denied", "`tenant`: this key may read its own tenant's usage only", param="tenant")
    return identity.tenant


def _known(request: Request, *names: str) -> None:
    for name in request.query_params:
        if name not in names:
            accepted = ", ".join(names)
            raise Refusal(
                "invalid_request", f"`{name[:40]}` is not a parameter (accepted: {accepted})", param=name[:40]
            )


def _choice(request: Request, name: str, kind: type[E], default: E) -> E:
    text = request.query_params.get(name, default.value)
    try:
        return kind(text)
    except ValueError:
        accepted = ", ".join(member.value for member in kind)
        raise Refusal("invalid_request", f"`{name}`: {text[:40]!r} (accepted: {accepted})", param=name) from None


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise Refusal("body_too_large", f"the body is over {BODY_BYTES_MAX} bytes")
    return bytes(body)


def _price(body: PriceCreate) -> PriceVersion:
    """Amounts of the body, exact. Raises Refusal naming the field for what is negative, not finite, too fine or too
    big.
    """
    cached = body.cached_input_usd_per_million
    return PriceVersion(
        id=0,
        plan=body.plan,
        effective_ms=0,
        input_nano_usd=_amount("input_usd_per_million", body.input_usd_per_million, nano_usd_per_token),
        cached_input_nano_usd=_amount(
            "cached_input_usd_per_million" if cached is not None else "input_usd_per_million",
            cached if cached is not None else body.input_usd_per_million,
            nano_usd_per_token,
        ),
        output_nano_usd=_amount("output_usd_per_million", body.output_usd_per_million, nano_usd_per_token),
        accelerator_hour_nano_usd=_amount("accelerator_hour_usd", body.accelerator_hour_usd, nano_usd),
        batch_percent=body.batch_percent,
    )


def _amount(field: str, text: str, convert: Callable[[str], int]) -> int:
    try:
        # Before anything is computed: "1e999999999" is 13 characters and a billion digits.
        if Decimal(text).is_finite() and Decimal(text) > PRICE_USD_MAX:
            raise Refusal("invalid_request", f"`{field}`: {text!r} is more than {PRICE_USD_MAX} USD", param=field)
        return convert(text)
    except InvalidOperation:
        raise Refusal("invalid_request", f"`{field}`: {text!r} is not a decimal amount", param=field) from None
    except ValueError as error:
        raise Refusal("invalid_request", f"`{field}`: {error}", param=field) from None


def _price_view(price: PriceVersion) -> PriceView:
    return PriceView(
        id=price.id,
        plan=price.plan,
        effective_ms=price.effective_ms,
        effective=iso(price.effective_ms),
        input_usd_per_million=usd(price.input_nano_usd * TOKENS_PER_MILLION),
        cached_input_usd_per_million=usd(price.cached_input_nano_usd * TOKENS_PER_MILLION),
        output_usd_per_million=usd(price.output_nano_usd * TOKENS_PER_MILLION),
        accelerator_hour_usd=usd(price.accelerator_hour_nano_usd),
        batch_percent=price.batch_percent,
        created_ms=price.created_ms,
    )


def _json(answer: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


async def _encoded(texts: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for text in texts:
        yield text.encode()


def _seconds(ms: int) -> str:
    return f"{ms // 1000}.{ms % 1000:03d}"


def _csv_text(text: str) -> str:
    """Quoted where CSV needs it (RFC 4180)."""
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text
