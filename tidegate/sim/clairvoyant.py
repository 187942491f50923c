"""What keeping idle replicas costs over the clairvoyant optimum, endpoint by endpoint, on the gaps of a trace.

One endpoint alone: during a gap between requests its place can be kept, which costs what batch work would earn there,
or given up, which costs the wake at the end of the gap. A clairvoyant pays min(gap, wake). `policy.eviction.KeepAlive`
on `policy.forecast.ArrivalHistory` is what the core does, gap by gap, knowing only those before. Fixed keep-alives
stand beside it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.policy.eviction import KeepAlive
from tidegate.policy.forecast import ArrivalHistory
from tidegate.policy.reconcile.regret import BATCH_WORTH_PER_MS
from tidegate.sim import trace
from tidegate.sim.profile import load

FIXED_S = (5, 60, 600, 3_600)
GAPS_MIN = 10


@dataclass(slots=True)
class _Endpoint:
    back_ms: float
    history: ArrivalHistory = field(default_factory=ArrivalHistory)
    policy: KeepAlive = field(default_factory=KeepAlive)
    guard: KeepAlive = field(default_factory=KeepAlive)
    fixed: list[KeepAlive] = field(default_factory=lambda: [KeepAlive() for _ in FIXED_S])
    gaps: int = 0

    def arrive(self, now_ms: int) -> None:
        gap_ms = self.history.quiet_ms(now_ms)
        if gap_ms is not None:
            back, gap = self.back_ms, float(gap_ms)
            self.policy.ended(gap, self.policy.instant(self.history.keep_ms(back), back), back)
            self.guard.ended(gap, back, back)
            for keep, keep_s in zip(self.fixed, FIXED_S, strict=True):
                keep.ended(gap, keep_s * 1_000.0, back)
            self.gaps += 1
        self.history.observe(now_ms, 1)


def report(trace_path: Path | str, *, fleet: Path | str | None = None) -> dict[str, Any]:
    """Cost over the clairvoyant optimum, 1.0 is its equal: over all gaps together (`pooled`), the mean and the worst
    endpoint of those with `GAPS_MIN` gaps. Raises Refusal for bad input, OSError for an unreadable file.
    """
    profile = load(Path(fleet) if fleet is not None else None)
    endpoints: dict[str, _Endpoint] = {}
    for at_ms, name, _, _ in trace.rows(Path(trace_path)):
        endpoint = endpoints.get(name)
        if endpoint is None:
            wake_ms = profile.node.wake_fixed_ms
            wake_ms += profile.model_of(name).weight_bytes / profile.accelerator.link_bytes_per_ms
            endpoint = endpoints[name] = _Endpoint(wake_ms / BATCH_WORTH_PER_MS)
        endpoint.arrive(int(at_ms))
    counted = [e for e in endpoints.values() if e.gaps >= GAPS_MIN]
    ways = {"tidegate": [e.policy for e in counted], "ski-rental": [e.guard for e in counted]}
    ways |= {f"keep {keep_s} s": [e.fixed[index] for e in counted] for index, keep_s in enumerate(FIXED_S)}
    return {"endpoints": len(counted), "over_clairvoyant": {way: _ratios(costs) for way, costs in ways.items()}}


def _ratios(costs: list[KeepAlive]) -> dict[str, float]:
    each = [c.paid / c.best for c in costs if c.best]
    best = sum(c.best for c in costs)
    return {
        "pooled": round(sum(c.paid for c in costs) / best, 4) if best else 1.0,
        "mean": round(sum(each) / len(each), 4) if each else 1.0,
        "worst": round(max(each, default=1.0), 4),
    }
