"""Who the policy is measured against: the same simulator, the same safety rules, another way to decide.

* `dedicated`: each endpoint has its own accelerators, enough for its busiest minute, always.
* `fixed-keepalive`: an endpoint keeps its place for a fixed time after its last request; nobody is evicted for another.
* `lru`: an idle endpoint stays until its place is needed, then the least recently used goes (llama-swap, Ollama).
* `knative`: KPA with scale to zero: gone after a quiet stable window of 60 s and a grace of 30 s; nobody is evicted.
"""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.errors import Refusal
from tidegate.policy.costs import CostPriors
from tidegate.policy.reconcile import CoreSettings
from tidegate.sim import trace
from tidegate.sim.profile import FleetProfile

POLICIES = ("tidegate", "dedicated", "fixed-keepalive", "lru", "knative")
PEAK_SHARE = 0.7
SLOTS_MAX = 256  # vLLM's default of `max_num_seqs` for its API server
IDLE_MS_NEVER = 10**12


@dataclass(frozen=True, slots=True)
class Setup:
    settings: CoreSettings
    deployments: list[Deployment]
    accelerators: int


def prepare(
    policy: str, profile: FleetProfile, wanted: list[Deployment], accelerators: int | None, path: Path
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
    count = accelerators if accelerators is not None else profile.node.accelerators
    largest = node_sizes(profile, count)[-1]
    wanted = [spread_over(profile, d, min(d.accelerators_per_replica, largest)) for d in wanted]
    match policy:
        case "tidegate":  # no keep-alive: a place nobody else wants costs nothing to keep
            return Setup(replace(settings, idle_ms_max=IDLE_MS_NEVER), wanted, count)
        case "lru":
            return Setup(replace(settings, victim_order="lru", idle_ms_max=IDLE_MS_NEVER), wanted, count)
        case "knative":
            return Setup(replace(settings, victim_order="none", idle_ms_max=90_000), wanted, count)
    if policy == "dedicated" or policy.startswith("dedicated:"):
        peaks = _peak_replicas(profile, path, float(policy.partition(":")[2] or PEAK_SHARE))
        placed = [_dedicated(profile, d, peaks[d.endpoint]) for d in wanted]
        return Setup(settings, placed, sum(d.accelerators_per_replica * d.min_replicas for d in placed))
    if policy == "fixed-keepalive" or policy.startswith("fixed-keepalive:"):
        keep_s = float(policy.partition(":")[2] or 60)
        return Setup(replace(settings, victim_order="none", idle_ms_max=int(keep_s * 1000)), wanted, count)
    raise Refusal("invalid_request", f"policy {policy!r} is not one of {', '.join(POLICIES)}", param="policy")


def node_sizes(profile: FleetProfile, accelerators: int) -> list[int]:
    """As few nodes as there must be, of like size, the largest first."""
    nodes = max(1, ceil(accelerators / profile.node.accelerators))
    return [accelerators // nodes + (number < accelerators % nodes) for number in range(nodes)]


def spread_over(profile: FleetProfile, deployment: Deployment, accelerators: int) -> Deployment:
    """The same over at most so many accelerators (a power of two)."""
    spread, workspace = 1 << (accelerators.bit_length() - 1), profile.accelerator.workspace_bytes
    whole = (deployment.accelerator_bytes - workspace) * deployment.accelerators_per_replica
    return replace(deployment, accelerators_per_replica=spread, accelerator_bytes=-(-whole // spread) + workspace)


def _dedicated(profile: FleetProfile, deployment: Deployment, replicas: int) -> Deployment:
    """On as few accelerators as hold it, since it never has to wake; all of their memory is its KV."""
    memory, workspace = profile.accelerator.memory_bytes, profile.accelerator.workspace_bytes
    whole = (deployment.accelerator_bytes - workspace) * deployment.accelerators_per_replica
    spread = 1
    while -(-whole // spread) + workspace > memory:
        spread *= 2
    weights = deployment.model.weight_bytes
    more_kv = ((memory - workspace) * spread - weights) / (whole - weights)
    return replace(
        deployment,
        mode=Mode.DEDICATED,
        min_replicas=replicas,
        max_replicas=replicas,
        slots=max(deployment.slots, min(SLOTS_MAX, int(deployment.slots * more_kv))),
        accelerators_per_replica=spread,
        accelerator_bytes=memory,
    )


def _peak_replicas(profile: FleetProfile, path: Path, share: float) -> dict[str, int]:
    """Replicas that keep the work of the busiest minute, prefills and reading of KV, within `share` of the compute."""
    hardware = profile.accelerator
    busiest: dict[str, float] = {}
    minute, work = -1, dict[str, float]()
    for at_ms, endpoint, input_tokens, output_tokens in trace.rows(path):
        if int(at_ms // 60_000.0) != minute:
            minute, work = int(at_ms // 60_000.0), {}
        model = profile.model_of(endpoint)
        prefill_ms = input_tokens * 2.0 * model.params / (hardware.dense_flop_per_ms * model.flop_rate_factor)
        read_bytes = (output_tokens - 1) * (input_tokens + output_tokens / 2) * model.kv_bytes_per_token
        work[endpoint] = work.get(endpoint, 0.0) + prefill_ms + read_bytes / hardware.memory_bytes_per_ms
        busiest[endpoint] = max(busiest.get(endpoint, 0.0), work[endpoint])
    return {endpoint: max(1, ceil(peak / 60_000.0 / share)) for endpoint, peak in busiest.items()}
