"""What the configuration declares, put into the stores at start: prices and endpoints. Idempotent."""

from collections.abc import Sequence

from tidegate.config import Config, EndpointConfig, PriceConfig
from tidegate.control.service import Control
from tidegate.domain.errors import Refusal
from tidegate.domain.ports import PriceBook
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import nano_usd, nano_usd_per_token
from tidegate.wire.admin import EndpointApply

ACTOR = "configuration"


def set_prices(book: PriceBook, config: Config, now_ms: int) -> None:
    """A new version of each plan whose configured price differs from the one in force.

    Prices nobody configured only fill an empty book, so that a default never undoes `tidegate prices set`.
    """
    configured = "prices" in config.model_fields_set
    for plan, price in config.prices.items():
        versions = book.versions(plan)
        in_force = max((v for v in versions if v.effective_ms <= now_ms), key=lambda v: v.effective_ms, default=None)
        if in_force is None:
            book.add(_version(plan, price, 0, now_ms))
        elif configured and _amounts(_version(plan, price, now_ms, now_ms)) != _amounts(in_force):
            book.add(_version(plan, price, now_ms, now_ms))


def _version(plan: str, price: PriceConfig, effective_ms: int, now_ms: int) -> PriceVersion:
    return PriceVersion(
        id=0,
        plan=plan,
        effective_ms=effective_ms,
        input_nano_usd=nano_usd_per_token(price.input_usd_per_million_tokens),
        cached_input_nano_usd=nano_usd_per_token(price.cached_input_usd_per_million_tokens),
        output_nano_usd=nano_usd_per_token(price.output_usd_per_million_tokens),
        accelerator_hour_nano_usd=nano_usd(price.accelerator_hour_usd),
        batch_percent=price.batch_percent,
        created_ms=now_ms,
    )


def _amounts(price: PriceVersion) -> tuple[int, ...]:
    return (
        price.input_nano_usd,
        price.cached_input_nano_usd,
        price.output_nano_usd,
        price.accelerator_hour_nano_usd,
        price.batch_percent,
    )


async def apply_endpoints(control: Control, wanted: Sequence[EndpointConfig]) -> list[tuple[str, str]]:
    """Applies each endpoint as `PUT /api/v1/endpoints` would. What is refused is returned as (endpoint, reason).

    A refused endpoint must not keep the others from being served, so it is reported and left out.
    """
    refused = []
    for endpoint in wanted:
        body = EndpointApply(
            model=endpoint.model,
            mode=endpoint.mode,
            min_replicas=endpoint.min_replicas,
            max_replicas=endpoint.max_replicas,
            accelerator_memory=endpoint.accelerator_memory,
            price_plan=endpoint.price_plan,
        )
        try:
            await control.apply(endpoint.name, body, ACTOR)
        except Refusal as refusal:
            refused.append((endpoint.name, refusal.message))
    return refused
