"""What an activation costs, in milliseconds, by (model, node, tier): measured on the running fleet, with priors until
then.

A prior is bytes ÷ link rate plus a fixed part. A measurement replaces it: first as it is, then smoothed, so that one
slow load does not rule for ever (weight of the newest: 1/4).
"""

from dataclasses import dataclass

from tidegate.domain.fleet import Tier

NEWEST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class CostPriors:
    """Rates in bytes per millisecond, fixed parts in milliseconds. PCIe 4 x16 and one NVMe drive, both at what is got
    in practice (25 and 3 GB/s); a fresh engine process on a GPU machine takes tens of seconds.
    """

    host_bytes_per_ms: int = 25_000_000
    disk_bytes_per_ms: int = 3_000_000
    remote_bytes_per_ms: int = 1_000_000
    wake_fixed_ms: int = 150
    start_fixed_ms: int = 10_000


class Costs:
    """Estimates of activation time. Memory: one number for each (model, node, tier) seen."""

    def __init__(self, priors: CostPriors) -> None:
        self._priors = priors
        self._measured: dict[tuple[str, str, Tier], float] = {}
        self._anywhere: dict[tuple[str, Tier], float] = {}

    def observe(self, model: str, node: str, tier: Tier, took_ms: int) -> None:
        """A replica of `model` became READY from `tier` in `took_ms`."""
        if took_ms <= 0:
            return
        near, far = (model, node, tier), (model, tier)
        self._measured[near] = _smooth(self._measured.get(near), took_ms)
        self._anywhere[far] = _smooth(self._anywhere.get(far), took_ms)

    def activation_ms(self, model: str, node: str, tier: Tier, weight_bytes: int) -> int:
        """Time from the command to READY. This node's measurement, else another node's, else the prior."""
        known = self._measured.get((model, node, tier), self._anywhere.get((model, tier)))
        if known is not None:
            return int(known)
        priors = self._priors
        match tier:
            case Tier.ACCELERATOR:
                return 0
            case Tier.HOST:
                return priors.wake_fixed_ms + weight_bytes // priors.host_bytes_per_ms
            case Tier.DISK:
                return priors.start_fixed_ms + weight_bytes // priors.disk_bytes_per_ms
            case Tier.REMOTE:
                return priors.start_fixed_ms + weight_bytes // priors.remote_bytes_per_ms


def _smooth(old: float | None, new: int) -> float:
    return float(new) if old is None else old + NEWEST_SHARE * (new - old)
