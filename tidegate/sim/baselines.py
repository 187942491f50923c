"""Who the policy is measured against: the same simulator, the same safety rules, another way to decide.

* `dedicated`: each endpoint has its own accelerators, enough for its peak, always.
* `fixed-keepalive`: an endpoint keeps its place for a fixed time after its last request; nobody is evicted for another.
* `lru`: an idle endpoint stays until its place is needed, then the least recently used goes (llama-swap, Ollama).
* `knative`: KPA with scale to zero: gone after a quiet stable window of 60 s and a grace of 30 s; nobody is evicted.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.errors import Refusal
from tidegate.policy.costs import CostPriors
from tidegate.policy.reconcile import CoreSettings
from tidegate.sim.profile import FleetProfile

POLICIES = ("tidegate", "dedicated", "fixed-keepalive", "lru", "knative")
ACCELERATORS_DEFAULT = 8


@dataclass(frozen=True, slots=True)
class Setup:
    settings: CoreSettings
    deployments: list[Deployment]
    accelerators: int


def prepare(
    policy: str, profile: FleetProfile, wanted: list[Deployment], accelerators: int | None, trace: Path
) -> Setup:
    """Settings, deployments and the number of accelerators for a run of `policy`. Raises Refusal for an unknown one."""
    node = profile.node
    settings = CoreSettings(
        priors=CostPriors(
            host_bytes_per_ms=int(profile.accelerator.link_bytes_per_ms),
            disk_bytes_per_ms=int(node.disk_bytes_per_ms),
            wake_fixed_ms=int(node.wake_fixed_ms),
            start_fixed_ms=int(node.start_ms),
        ),
    )
    count = accelerators if accelerators is not None else ACCELERATORS_DEFAULT
    match policy:
        case "tidegate":
            return Setup(settings, wanted, count)
        case "lru":
            return Setup(replace(settings, victim_order="lru", idle_ms_max=10**12), wanted, count)
        case "knative":
            return Setup(replace(settings, victim_order="none", idle_ms_max=90_000), wanted, count)
        case "dedicated":
            whole = profile.accelerator.memory_bytes
            placed = [
                replace(d, mode=Mode.DEDICATED, min_replicas=1, max_replicas=1, accelerator_bytes=whole) for d in wanted
            ]
            return Setup(settings, placed, sum(d.accelerators_per_replica * d.min_replicas for d in placed))
    if policy == "fixed-keepalive" or policy.startswith("fixed-keepalive:"):
        keep_s = float(policy.partition(":")[2] or 60)
        return Setup(replace(settings, victim_order="none", idle_ms_max=int(keep_s * 1000)), wanted, count)
    raise Refusal("invalid_request", f"policy {policy!r} is not one of {', '.join(POLICIES)}", param="policy")
