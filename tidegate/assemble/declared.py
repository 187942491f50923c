"""What the configuration declares, put into the stores at start: prices and endpoints. Idempotent."""

from collections.abc import Sequence
from dataclasses import replace

from tidegate.config import Config, EndpointConfig, PriceConfig
from tidegate.control.service import Control
from tidegate.domain.errors import Refusal
from tidegate.domain.money_ports import PriceBook
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import nano_usd, nano_usd_per_token
from tidegate.money.prices import PriceTable, Terms, terms_of
from tidegate.wire.admin import EndpointApply, FallbackBody, OverflowBody, ScalingBody

ACTOR = "configuration"


def set_prices(book: PriceBook, config: Config, now_ms: int) -> None:
    """A new version of each plan, and of each of the declared terms, whose price differs from the one in force.

    Prices nobody configured only fill an empty book, so that a default never undoes `tidegate prices set`.
    """
    configured = "prices" in config.model_fields_set
    versions = book.versions()
    table, known = PriceTable(versions), {terms_of(version) for version in versions}
    declared = [(_version(price, (plan, "", "", "", "")), configured) for plan, price in config.prices.items()]
    declared += [(_version(price, ("", *price.terms)), True) for price in config.price_terms]
    for version, insisted in declared:
        terms = terms_of(version)
        if terms not in known:
            book.add(replace(version, effective_ms=0 if version.plan else now_ms, created_ms=now_ms))
        elif insisted and not _same(version, table.newest(terms, now_ms)):
            book.add(replace(version, effective_ms=now_ms, created_ms=now_ms))


def _same(version: PriceVersion, in_force: PriceVersion | None) -> bool:
    return in_force is not None and version == replace(in_force, id=0, effective_ms=0, created_ms=0)


def _version(price: PriceConfig, terms: Terms) -> PriceVersion:
    plan, endpoint, tenant, model, mode = terms
    return PriceVersion(
        id=0,
        plan=plan,
        endpoint=endpoint,
        tenant=tenant,
        model=model,
        mode=mode,
        effective_ms=0,
        input_nano_usd=nano_usd_per_token(price.input_usd_per_million_tokens),
        cached_input_nano_usd=nano_usd_per_token(price.cached_input_usd_per_million_tokens),
        output_nano_usd=nano_usd_per_token(price.output_usd_per_million_tokens),
        accelerator_hour_nano_usd=nano_usd(price.accelerator_hour_usd),
        accelerator_kinds=tuple((kind, nano_usd(text)) for kind, text in sorted(price.accelerator_hours_usd.items())),
        minimum_nano_usd=nano_usd(price.minimum_usd),
        batch_percent=price.batch_percent,
    )


async def apply_endpoints(control: Control, wanted: Sequence[EndpointConfig]) -> list[tuple[str, str]]:
    """Applies each endpoint as `PUT /api/v1/endpoints` would. What is refused is returned as (endpoint, reason).

    A refused endpoint must not keep the others from being served, so it is reported and left out.
    """
    waiting = list(wanted)
    while True:  # one may name another that is declared after it (overflow, fallback): tried again after the rest
        refused = [(endpoint, why) for endpoint in waiting if (why := await _apply(control, endpoint))]
        if len(refused) in (0, len(waiting)):
            return [(endpoint.name, why) for endpoint, why in refused]
        waiting = [endpoint for endpoint, _ in refused]


async def _apply(control: Control, endpoint: EndpointConfig) -> str:
    """Why it is refused; empty when it was applied."""
    over = endpoint.overflow
    body = EndpointApply(
        model=endpoint.model,
        mode=endpoint.mode,
        min_replicas=endpoint.min_replicas,
        max_replicas=None if endpoint.engine == "remote" else endpoint.max_replicas,
        engine=endpoint.engine,
        engine_args=endpoint.engine_args,
        profile=endpoint.profile,
        slots=endpoint.slots,
        context_tokens=endpoint.context_tokens,
        accelerator_memory=endpoint.accelerator_memory,
        price_plan=endpoint.price_plan,
        regions=list(endpoint.regions) if endpoint.regions else None,
        overflow=OverflowBody(**over.model_dump()) if over else None,
        fallback=FallbackBody(to=endpoint.fallback) if endpoint.fallback else None,
        lend=endpoint.lend,
        scaling=ScalingBody(**endpoint.scaling.model_dump()),
    )
    try:
        await control.apply(endpoint.name, body, ACTOR)
    except Refusal as refusal:
        return refusal.message
    return ""
