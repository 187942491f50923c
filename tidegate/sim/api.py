"""`simulate` and `plan`: from files to a verdict. Raises Refusal for bad input, OSError for an unreadable file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile, Slo
from tidegate.domain.errors import Refusal
from tidegate.policy.reconcile import FleetCore
from tidegate.sim import baselines, trace
from tidegate.sim.bound import lower_bound
from tidegate.sim.meter import Meter
from tidegate.sim.nodes import SimNode
from tidegate.sim.profile import FleetProfile, ModelSpec, load
from tidegate.sim.world import World

KV_TOKENS_MIN = 16_384
WORKSPACE_BYTES = 1_000_000_000  # activations of one chunk, and the process itself
KV_REQUESTS_MIN = 8
KV_SLOWDOWN = 2.0  # decode beside others, against decode alone
SLOTS_MAX = 256
ACCELERATORS_MAX = 64
FIRST_LOADS_MS = 1_800_000.0  # a fleet is met some time after its endpoints were applied, not in that very second
DEDICATED = ("dedicated", "dedicated:0.5", "dedicated:0.35", "dedicated:0.25")
Progress = Callable[[int], None]


def simulate(
    trace_path: Path | str,
    *,
    policy: str = "tidegate",
    fleet: Path | str | None = None,
    accelerators: int | None = None,
    slo_ttft_ms: float = 2_000.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Replay a trace under one policy. The keys of the result are the public contract of `tidegate simulate`."""
    path = Path(trace_path)
    profile = load(Path(fleet) if fleet is not None else None)
    summary = trace.summarize(path)
    began = perf_counter()
    setup = baselines.prepare(policy, profile, deployments(profile, summary, slo_ttft_ms), accelerators, path)
    meter = Meter(slo_ttft_ms, profile.tpot_ms)
    world = build_world(profile, setup, meter)
    world.run(trace.rows(path), progress)
    return verdict(policy, world, setup.accelerators, summary.span_ms, perf_counter() - began)


def plan(
    trace_path: Path | str,
    *,
    fleet: Path | str | None = None,
    attainment: float = 0.99,
    slo_ttft_ms: float = 2_000.0,
    policies: Sequence[str] = baselines.POLICIES,
) -> dict[str, Any]:
    """By policy the fewest accelerators that serve a share `attainment` of all requests within the SLO, and a bound.

    None where not even `ACCELERATORS_MAX` do. Searched upwards from the lower bound; a run ends as soon as it has
    missed too often.
    """
    path = Path(trace_path)
    profile = load(Path(fleet) if fleet is not None else None)
    summary = trace.summarize(path)
    wanted = deployments(profile, summary, slo_ttft_ms)
    bound = lower_bound(profile, path, attainment, slo_ttft_ms)
    misses_max = summary.requests * (1.0 - attainment)
    found: dict[str, int | None] = {}
    for policy in policies:
        found[policy] = None
        # What dedicated needs follows from the trace: the share of its accelerators that the busiest minute may take.
        counts = range(bound.accelerators, ACCELERATORS_MAX + 1)
        tries = [(p, None) for p in DEDICATED] if policy == "dedicated" else [(policy, n) for n in counts]
        for name, count in tries:
            setup = baselines.prepare(name, profile, wanted, count, path)
            meter = Meter(slo_ttft_ms, profile.tpot_ms)
            build_world(profile, setup, meter).run(trace.rows(path), misses_max=misses_max)
            if meter.requests - meter.attained <= misses_max:
                found[policy] = setup.accelerators
                break
    return {
        "attainment": attainment,
        "slo_ttft_ms": slo_ttft_ms,
        "policies": found,
        "lower_bound": {"name": bound.name, "accelerators": bound.accelerators},
    }


def build_world(profile: FleetProfile, setup: "baselines.Setup", meter: Meter) -> World:
    world = World(profile, FleetCore(setup.settings), meter)
    left, number = setup.accelerators, 0
    while left > 0:
        world.add_node(SimNode(f"node-{number}", min(left, profile.node.accelerators), profile))
        left -= profile.node.accelerators
        number += 1
    for deployment in setup.deployments:
        world.apply(deployment)
    world.run_until(FIRST_LOADS_MS)
    meter.forget_swaps()
    return world


def deployments(profile: FleetProfile, summary: trace.TraceSummary, slo_ttft_ms: float) -> list[Deployment]:
    """What each endpoint's owner would have applied: its model, KV for its longest request or a few usual ones."""
    found = []
    for name in sorted(summary.endpoints):
        model = profile.model_of(name)
        found.append(_deployment(profile, name, model, summary.endpoints[name], slo_ttft_ms))
    return found


def _deployment(
    profile: FleetProfile, name: str, model: ModelSpec, totals: trace.EndpointTotals, slo_ttft_ms: float
) -> Deployment:
    context = totals.context_tokens_max
    mean_in, mean_out = totals.input_tokens / totals.requests, totals.output_tokens / totals.requests
    mean = max(1, int(mean_in + mean_out))
    prefill_ms = mean_in * 2.0 * model.params / (profile.accelerator.dense_flop_per_ms * model.flop_rate_factor)
    decode_ms = mean_out * model.weight_bytes / profile.accelerator.memory_bytes_per_ms
    # KV for the busiest minute's requests at once (Little's law), up to a quarter of an accelerator.
    at_once = totals.busiest_minute / 60_000.0 * (prefill_ms + KV_SLOWDOWN * decode_ms)
    room_tokens = profile.accelerator.memory_bytes // 4 // model.kv_bytes_per_token
    wished = max(KV_TOKENS_MIN, int(max(KV_REQUESTS_MIN, at_once) * mean))
    kv_tokens = max(min(wished, room_tokens), context + KV_TOKENS_MIN // 2)
    slots = max(4, min(SLOTS_MAX, kv_tokens // mean))
    # In flight when a saturated engine's queue takes half the SLO: where another replica is wanted.
    target = max(2, min(slots, int((slo_ttft_ms / 2.0 + decode_ms) / prefill_ms)))
    whole = model.weight_bytes + kv_tokens * model.kv_bytes_per_token + WORKSPACE_BYTES
    spread = 1
    while whole / spread > profile.accelerator.memory_bytes:
        spread *= 2
        if spread > profile.node.accelerators:
            need = f"{whole / 1e9:.1f} GB for endpoint {name!r}"
            raise Refusal("invalid_request", f"fleet: model.{model.name}: no node can hold {need}", param="fleet")
    return Deployment(
        endpoint=name,
        tenant="sim",
        model=ModelProfile(
            model.name,
            f"{name}:{model.name}",
            ModelKind.GENERATIVE,
            model.weight_bytes,
            model.kv_bytes_per_token,
            context,
        ),
        mode=Mode.DEDICATED_SERVERLESS,
        max_replicas=4,
        concurrency_target=target,
        slots=slots,
        accelerators_per_replica=spread,
        accelerator_bytes=-(-whole // spread),
        host_bytes=model.weight_bytes,
        slo=Slo(ttft_ms=max(1, int(slo_ttft_ms)), tpot_ms=int(profile.tpot_ms)),
        movable=True,
    )


def verdict(policy: str, world: World, accelerators: int, span_ms: float, wall_s: float) -> dict[str, Any]:
    meter = world.meter
    shares = meter.shares()
    devices = [device for node in world.nodes.values() for device in node.devices.values()]
    requests = max(meter.requests, 1)
    return {
        "policy": policy,
        "requests": meter.requests,
        "accelerators": accelerators,
        "accelerator_hours": round(accelerators * span_ms / 3.6e6, 3),
        "busy_accelerator_hours": round(sum(d.compute.busy_ms for d in devices) / 3.6e6, 3),
        "slo_attainment": round(meter.attained / requests, 6),
        "endpoint_attainment_min": round(min(shares.values()), 6) if shares else None,
        "endpoints_below_99": sum(1 for share in shares.values() if share < 0.99),
        "ttft_ms": {name: round(meter.ttft.quantile(q), 1) for name, q in QUANTILES},
        "activations": meter.activations,
        "cold_share": round(meter.cold / requests, 6),
        "batch_tokens": int(meter.batch_tokens),
        "thrash_ratio": round(meter.undone / meter.evictions, 4) if meter.evictions else 0.0,
        "wall_s": round(wall_s, 2),
        "ttft_beyond_prefill_ms": {name: round(meter.beyond.quantile(q), 1) for name, q in QUANTILES},
        "starts": meter.starts,
        "evictions": meter.evictions,
        "refused": meter.refused,
        "too_late": meter.late,
        "too_slow": meter.slow,
        "pooled_rest_attainment": round(meter.pooled_rest(), 6),
    }


QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
