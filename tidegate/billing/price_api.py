"""The price book in `/api/v1/prices`."""

import asyncio
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tidegate.billing.http import Guarded, answer, body_as, known
from tidegate.billing.periods import iso, parse_instant
from tidegate.billing.service import Billing
from tidegate.domain.errors import Refusal
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import TOKENS_PER_MILLION, nano_usd, nano_usd_per_token, usd
from tidegate.money.prices import DEFAULT_PLAN, terms_of
from tidegate.wire.admin import Identity, Listing
from tidegate.wire.billing import PriceCreate, PriceView

PRICE_USD_MAX = 1_000_000  # beyond any price, and sums of it stay far within 64 bits


def price_routes(billing: Billing, guarded: Guarded) -> list[Route]:
    async def prices(request: Request, identity: Identity) -> Response:
        """Versions in the price book: those of plans, and those whose terms name nobody else."""
        known(request, "plan")
        versions = await asyncio.to_thread(billing.prices.versions, request.query_params.get("plan"))
        mine = [v for v in versions if identity.tenant is None or _may_read(identity.tenant, v)]
        return answer(Listing([_view(version) for version in mine]))

    async def add_price(request: Request, identity: Identity) -> Response:
        """Add a price version. It never touches what was rated already."""
        version = price_of(await body_as(request, PriceCreate), billing.clock.now_ms())
        if owner := version.tenant or version.endpoint.partition("/")[0]:
            await billing.check_tenant(owner)
        if version.ends:
            book = await asyncio.to_thread(billing.prices.versions)
            if terms_of(version) not in map(terms_of, book):
                raise Refusal("not_found", "`ends`: there is no price with these terms", param="ends")
        added = await billing.add_price(version)
        return answer(_view(added), status=201)

    return [
        Route("/api/v1/prices", guarded(prices), methods=["GET"]),
        Route("/api/v1/prices", guarded(add_price, admin=True), methods=["POST"]),
    ]


def _may_read(tenant: str, version: PriceVersion) -> bool:
    """What was agreed with one tenant is no other's business; the rest is no secret to whoever pays."""
    owner = version.tenant or version.endpoint.partition("/")[0]
    return owner in ("", tenant)


def price_of(body: PriceCreate, now_ms: int) -> PriceVersion:
    """The version a body asks for. Raises Refusal naming the field for terms that contradict each other, an instant in
    the past, and an amount that is missing, negative, not finite, too fine or too big.
    """
    if body.currency != "USD":
        message = f"`currency`: {body.currency[:16]!r}; accepted: USD"
        raise Refusal("invalid_request", message, param="currency")
    named = any((body.tenant, body.endpoint, body.model, body.mode))
    if body.plan is not None and named:
        message = "`plan` excludes `tenant`, `endpoint`, `model` and `mode`: a plan is what endpoints name"
        raise Refusal("invalid_request", message, param="plan")
    input_price = _amount(body, "input_usd_per_million", nano_usd_per_token)
    cached = body.cached_input_usd_per_million
    return PriceVersion(
        id=0,
        plan="" if named else body.plan or DEFAULT_PLAN,
        tenant=body.tenant or "",
        endpoint=body.endpoint or "",
        model=body.model or "",
        mode=body.mode.value if body.mode else "",
        effective_ms=_effective_ms(body, now_ms),
        input_nano_usd=input_price,
        cached_input_nano_usd=input_price
        if cached is None
        else _amount(body, "cached_input_usd_per_million", nano_usd_per_token),
        output_nano_usd=_amount(body, "output_usd_per_million", nano_usd_per_token),
        accelerator_hour_nano_usd=_amount(body, "accelerator_hour_usd", nano_usd),
        accelerator_kinds=tuple(
            (kind, _parse(f"accelerator_hours_usd.{kind[:40]}", text, nano_usd))
            for kind, text in sorted(body.accelerator_hours_usd.items())
        ),
        minimum_nano_usd=_amount(body, "minimum_usd", nano_usd),
        batch_percent=body.batch_percent,
        ends=body.ends,
        created_ms=now_ms,
    )


def _effective_ms(body: PriceCreate, now_ms: int) -> int:
    effective_ms = now_ms if body.effective is None else parse_instant("effective", body.effective)
    if effective_ms < now_ms and not body.retroactive:
        message = f"`effective`: {body.effective!r} is in the past; accepted: {iso(now_ms)} or later (or `retroactive`)"
        raise Refusal("invalid_request", message, param="effective")
    return effective_ms


def _amount(body: PriceCreate, field: str, convert: Callable[[str], int]) -> int:
    text: str | None = getattr(body, field)
    if body.ends:
        if text not in (None, "0"):
            raise Refusal("invalid_request", f"`{field}`: terms that end have no amounts", param=field)
        return 0
    if text is None:
        raise Refusal("invalid_request", f"`{field}`: required field is missing", param=field)
    return _parse(field, text, convert)


def _parse(field: str, text: str, convert: Callable[[str], int]) -> int:
    try:
        # Before anything is computed: "1e999999999" is 13 characters and a billion digits.
        if Decimal(text).is_finite() and Decimal(text) > PRICE_USD_MAX:
            raise Refusal("invalid_request", f"`{field}`: {text!r} is more than {PRICE_USD_MAX} USD", param=field)
        return convert(text)
    except InvalidOperation:
        raise Refusal("invalid_request", f"`{field}`: {text!r} is not a decimal amount", param=field) from None
    except ValueError as error:
        raise Refusal("invalid_request", f"`{field}`: {error}", param=field) from None


def _view(price: PriceVersion) -> PriceView:
    return PriceView(
        id=price.id,
        plan=price.plan,
        tenant=price.tenant,
        endpoint=price.endpoint,
        model=price.model,
        mode=price.mode,
        effective_ms=price.effective_ms,
        effective=iso(price.effective_ms),
        ends=price.ends,
        currency="USD",
        input_usd_per_million=usd(price.input_nano_usd * TOKENS_PER_MILLION),
        cached_input_usd_per_million=usd(price.cached_input_nano_usd * TOKENS_PER_MILLION),
        output_usd_per_million=usd(price.output_nano_usd * TOKENS_PER_MILLION),
        accelerator_hour_usd=usd(price.accelerator_hour_nano_usd),
        accelerator_hours_usd={kind: usd(amount) for kind, amount in price.accelerator_kinds},
        minimum_usd=usd(price.minimum_nano_usd),
        batch_percent=price.batch_percent,
        created_ms=price.created_ms,
    )
