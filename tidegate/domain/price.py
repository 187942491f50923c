"""Price versions: what a token and an accelerator-hour cost from an instant on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """One line of the price book. `plan` is what a deployment's `price_plan` names; the version in force at an instant
    is the newest with `effective_ms` ≤ that instant. Amounts are integer nano-USD;
    `batch_percent` is the batch price in percent.
    """

    id: int
    plan: str
    effective_ms: int
    input_nano_usd: int
    cached_input_nano_usd: int
    output_nano_usd: int
    accelerator_hour_nano_usd: int
    batch_percent: int = 50
    created_ms: int = 0
