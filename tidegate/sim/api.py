"""`simulate`: from files to a verdict. Raises Refusal for bad input, OSError for an unreadable file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile, Slo
from tidegate.domain.errors import Refusal
from tidegate.policy.reconcile import FleetCore
from tidegate.sim import baselines, harvest, trace
from tidegate.sim.compute import CHUNK_MS, GANG_EFFICIENCY
from tidegate.sim.meter import Meter
from tidegate.sim.nodes import SimNode
from tidegate.sim.profile import FleetProfile, ModelSpec, load
from tidegate.sim.timeline import Timeline
from tidegate.sim.world import World

KV_TOKENS_MIN = 16_384
KV_REQUESTS_MIN = 8
KV_SLOWDOWN = 2.0  # decode beside others, against decode alone
REPLICAS_MAX = 8
WORKSPACE_SHARE = 0.25
FIRST_LOADS_MS = 1_800_000.0  # a fleet is met some time after its endpoints were applied, not in that very second
Progress = Callable[[int, int], None]
"""(requests simulated, requests in the trace)"""


def simulate(
    trace_path: Path | str,
    *,
    policy: str = "tidegate",
    fleet: Path | str | None = None,
    accelerators: int | None = None,
    slo_ttft_ms: float = 2_000.0,
    batch_trace: Path | str | None = None,
    batch_model: str | None = None,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
) -> dict[str, Any]:
    """Replay a trace under one policy. The keys of the result are the public contract of `tidegate simulate`.

    `batch_trace` is a job done on what the traffic leaves idle (see `harvest`), with the fleet's model `batch_model`.
    `timeline`, when given, is filled with what happened when.
    """
    path = Path(trace_path)
    profile = load(Path(fleet) if fleet is not None else None)
    summary = trace.summarize(path)
    began = perf_counter()
    setup = baselines.prepare(policy, profile, deployments(profile, summary, slo_ttft_ms), accelerators, path)
    job = None
    if batch_trace is not None:
        job = harvest.read(Path(batch_trace), profile, batch_model, setup.accelerators)
        profile = replace(profile, endpoints={**profile.endpoints, job[1].endpoint: job[1].model.source})
    meter = Meter(slo_ttft_ms, profile.tpot_ms)
    world = build_world(profile, setup, meter, timeline)
    if job is not None:
        world.begin_job(*job)
    if timeline is not None:
        timeline.open(world.now_ms, summary.span_ms)
    tell = None if progress is None else (lambda done: progress(done, summary.requests))
    world.run(trace.rows(path), tell)
    if timeline is not None:
        timeline.close(world.now_ms)
    return verdict(policy, world, setup.accelerators, summary.span_ms, perf_counter() - began)


def build_world(
    profile: FleetProfile, setup: "baselines.Setup", meter: Meter, timeline: Timeline | None = None
) -> World:
    world = World(profile, FleetCore(setup.settings), meter)
    if timeline is not None:
        world.timeline = timeline
        world.watch.append(timeline.command)
    gangs = any(d.accelerators_per_replica > 1 for d in setup.deployments)
    for number, size in enumerate(baselines.node_sizes(profile, setup.accelerators)):
        node = SimNode(f"node-{number}", size, profile, gangs=gangs)
        if timeline is not None:
            timeline.lanes_of(node.node)
        world.add_node(node)
    for deployment in setup.deployments:
        world.apply(deployment)
    world.run_until(FIRST_LOADS_MS)
    meter.begin(world.now_ms)
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
    token_ms = model.weight_bytes / profile.accelerator.memory_bytes_per_ms
    # KV for what decodes at once in the busiest seconds (Little's law): requests come at most as fast as one engine
    # prefills them, and a token takes the longer the more of each round prefill has; engines that take turns leave each
    # a quarter of the TPOT's SLO at the best. At most a quarter of an accelerator's memory.
    busy = min(1.0, totals.busiest / trace.BURST_MS * prefill_ms)
    at_once = busy / prefill_ms * mean_out * (max(KV_SLOWDOWN * token_ms, profile.tpot_ms / 4) + busy * CHUNK_MS)
    room_tokens = profile.accelerator.memory_bytes // 4 // model.kv_bytes_per_token
    wished = max(KV_TOKENS_MIN, int(max(KV_REQUESTS_MIN, at_once) * mean))
    kv_tokens = max(min(wished, room_tokens), context + KV_TOKENS_MIN // 2)
    # As many as fit: whoever waits does so in the waiting room, which knows who can still be served in time; the
    # engine's own queue does not.
    slots = max(4, min(baselines.SLOTS_MAX, 1 * kv_tokens // mean))
    # In flight when a saturated engine's queue takes half the SLO: where another replica is wanted.
    target = max(2, min(slots, int((slo_ttft_ms / 2.0 + mean_out * token_ms) / prefill_ms)))
    whole = model.weight_bytes + kv_tokens * model.kv_bytes_per_token
    spread = _spread(profile, model, whole, slo_ttft_ms)
    if -(-whole // spread) + profile.accelerator.workspace_bytes > profile.accelerator.memory_bytes:
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
        max_replicas=REPLICAS_MAX,
        concurrency_target=target,
        slots=slots,
        accelerators_per_replica=spread,
        accelerator_bytes=-(-whole // spread) + profile.accelerator.workspace_bytes,
        host_bytes=model.weight_bytes,
        slo=Slo(ttft_ms=max(1, int(slo_ttft_ms)), tpot_ms=int(profile.tpot_ms)),
        movable=True,
    )


def _spread(profile: FleetProfile, model: ModelSpec, whole: int, slo_ttft_ms: float) -> int:
    """Accelerators a replica: as few as hold it. Where they are linked (`gang_max`) and workspace on one more costs at
    most a share `WORKSPACE_SHARE` of its weights: two, which lose a twentieth to the all-reduces and halve a wake and a
    decode step (and no accelerator is too full for a model that another has room for: AlpaServe, arXiv 2302.11665);
    more, which lose a fifth and leave fewer groups beside each other, only while a wake takes over half the SLO.
    """
    hardware, spread, workspace = profile.accelerator, 1, profile.accelerator.workspace_bytes
    while spread * 2 <= min(profile.node.accelerators, max(GANG_EFFICIENCY)):
        fits = -(-whole // spread) + workspace <= hardware.memory_bytes
        wake_ms = profile.node.wake_fixed_ms + model.weight_bytes / spread / hardware.link_bytes_per_ms
        soon = spread > 1 and wake_ms <= slo_ttft_ms / 2.0
        dear = spread * 2 > hardware.gang_max or spread * 2 * workspace > WORKSPACE_SHARE * model.weight_bytes
        if fits and (soon or dear):
            break
        spread *= 2
    return spread


def verdict(policy: str, world: World, accelerators: int, span_ms: float, wall_s: float) -> dict[str, Any]:
    meter = world.meter
    shares = meter.shares()
    batch_ms = sum(c.batch_ms for node in world.nodes.values() for c in node.computes)
    job = world.job
    requests = max(meter.requests, 1)
    return {
        "policy": policy,
        "requests": meter.requests,
        "accelerators": accelerators,
        "accelerator_hours": round(accelerators * span_ms / 3.6e6, 3),
        "busy_accelerator_hours": round(world.live_ms() / 3.6e6, 3),
        "slo_attainment": round(meter.attained / requests, 6),
        "endpoint_attainment_min": round(min(shares.values()), 6) if shares else None,
        "endpoints_below_99": sum(1 for share in shares.values() if share < 0.99),
        "ttft_ms": {name: round(meter.ttft.quantile(q), 1) for name, q in QUANTILES},
        "activations": meter.activations,
        "cold_share": round(meter.cold / requests, 6),
        "batch_tokens": job.tokens if job is not None else 0,
        "thrash_ratio": round(meter.undone / meter.evictions, 4) if meter.evictions else 0.0,
        "wall_s": round(wall_s, 2),
        "ttft_beyond_prefill_ms": {name: round(meter.beyond.quantile(q), 1) for name, q in QUANTILES},
        "starts": meter.starts,
        "evictions": meter.evictions,
        "refused": meter.misses.get("refused", 0),
        "misses": dict(sorted(meter.misses.items())),
        "missed_most": {name: dict(sorted(found.misses.items())) for name, found in meter.missed_most(MISSED_MOST)},
        "missed_by_hour": {str(hour): meter.missed_by_hour[hour] for hour in sorted(meter.missed_by_hour)},
        "pooled_rest_attainment": round(meter.pooled_rest(), 6),
        **(job.verdict(accelerators, batch_ms) if job is not None else {}),
    }


MISSED_MOST = 8
QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
