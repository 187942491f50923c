"""The provider catalogue: dated, sourced facts, one TOML file a provider, and the user's own files beside them.

Every figure is either under `sources` or named in `assumed` with the reason; a file whose date is older than
`STALE_DAYS` is shown as stale.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import Refusal

STALE_DAYS = 180
Mode = Literal["serverless", "dedicated", "dedicated_serverless", "batch"]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]


class Facts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TokenPrice(Facts, frozen=True, kw_only=True):
    """USD per million tokens of one model; model "*" is any. Cached input costs what input costs unless given."""

    model: str
    input: NotNegative
    output: NotNegative
    cached: NotNegative | None = None

    @property
    def cached_or_input(self) -> float:
        return self.input if self.cached is None else self.cached


class Rental(Facts, frozen=True, kw_only=True):
    """USD per hour of one accelerator with the machine around it; `warm_usd_per_hour` is the rate of workers kept
    warm on purpose; `count_max` is how many one replica may span.
    """

    name: str
    usd_per_hour: NotNegative
    warm_usd_per_hour: NotNegative | None = None
    count_max: Annotated[int, Meta(ge=1, le=8)] = 1


class Offer(Facts, frozen=True, kw_only=True):
    """One thing a provider sells. `billing` says by what it bills:

    `tokens`; `execution` (time in which a request runs, rounded up to `round_up_ms` each); `worker` (a worker from its
    start, or from ready where `bill_cold` is false, to its stop, `idle_s` after its last request); `reserved` (replicas
    by the hour, `fixed` or `reactive`: added `react_s` after load passed `target` of the slots).
    `ping_s`: workers are kept warm by an empty request so often, billed as one unit of execution; 0: by being paid for.
    """

    id: str
    mode: Mode
    title: str
    billing: Literal["tokens", "execution", "worker", "reserved"]
    private: bool = True
    async_only: bool = False
    latency_promised: bool = False
    tokens: list[TokenPrice] = []
    accelerators: list[Rental] = []
    cold_start_s: NotNegative = 0.0
    load_gb_s: Positive = 1.0
    bill_cold: bool = True
    idle_s: NotNegative = 0.0
    ping_s: NotNegative = 0.0
    round_up_ms: Positive = 1.0
    workers_max: Annotated[int, Meta(ge=1)] = 1000
    slots_max: Annotated[int, Meta(ge=1)] = 256
    scaling: Literal["fixed", "reactive"] = "fixed"
    react_s: NotNegative = 300.0
    target: Annotated[float, Meta(gt=0, le=1)] = 0.7
    queue_p50_ms: NotNegative = 0.0
    queue_p99_ms: NotNegative = 0.0
    many_models: bool = False
    available: bool = True
    note: str = ""
    sources: list[str] = []
    assumed: dict[str, str] = {}

    def price_of(self, model: str) -> TokenPrice | None:
        exact = [price for price in self.tokens if price.model == model]
        return next(iter(exact or [price for price in self.tokens if price.model == "*"]), None)


class Provider(Facts, frozen=True, kw_only=True):
    """`checked` is the day the facts were read where `sources` say."""

    name: str
    title: str
    checked: datetime.date
    sources: list[str]
    offer: list[Offer]

    def stale(self, today: datetime.date) -> bool:
        return (today - self.checked).days > STALE_DAYS

    def age(self, today: datetime.date) -> str:
        days = (today - self.checked).days
        return f"checked {self.checked.isoformat()}" + (f", STALE: {days} days old" if self.stale(today) else "")


def load(extra: Sequence[Path] = ()) -> list[Provider]:
    """The built-in providers and the user's; one of the user's with the same name takes the built-in one's place.

    Raises Refusal naming file and key; OSError when a file cannot be read.
    """
    found: dict[str, Provider] = {}
    for path in [*sorted((Path(__file__).parent / "providers").glob("*.toml")), *extra]:
        provider = parse(path.name, path.read_bytes())
        found[provider.name] = provider
    return list(found.values())


def parse(file: str, text: bytes) -> Provider:
    try:
        provider = msgspec.toml.decode(text, type=Provider)
    except msgspec.DecodeError as error:  # a ValidationError is one, and its text ends with the key: `$.offer[0].mode`
        raise Refusal("invalid_request", f"{file}: {error}", param="providers") from None
    for offer in provider.offer:
        missing = _missing(offer)
        if missing:
            raise Refusal("invalid_request", f"{file}: offer {offer.id!r}: {missing}", param="providers")
    return provider


def _missing(offer: Offer) -> str:
    if offer.billing == "tokens" and not offer.tokens:
        return "billing by tokens needs [[offer.tokens]] with model, input and output"
    if offer.billing != "tokens" and not offer.accelerators:
        return f"billing {offer.billing!r} needs [[offer.accelerators]] with name and usd_per_hour"
    if not offer.sources and not offer.assumed:
        return "neither `sources` nor `assumed`: say where the figures come from"
    return ""
