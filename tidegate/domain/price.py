"""Price versions: what a token and an accelerator-hour cost from an instant on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """One line of the price book, in force from `effective_ms` until the next one with the same terms.

    Its terms are a `plan` (what a deployment's `price_plan` names), or any of `tenant`, `endpoint`, `model` and `mode`
    (then `plan` is empty; what is empty matches anything). Amounts are integer nano-USD: a token, an accelerator-hour
    (`accelerator_kinds` are (kind, amount) that differ from it), and the least a billable request costs
    (`minimum_nano_usd`). `batch_percent` is the batch price in percent. `ends`: from here on these terms price nothing.
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
    tenant: str = ""
    endpoint: str = ""
    model: str = ""
    mode: str = ""
    minimum_nano_usd: int = 0
    accelerator_kinds: tuple[tuple[str, int], ...] = ()
    ends: bool = False

    def hour_nano_usd(self, kind: str) -> int:
        """An hour of one accelerator of that kind."""
        return dict(self.accelerator_kinds).get(kind, self.accelerator_hour_nano_usd)
