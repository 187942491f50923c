"""What the admin API shows, built from desired state and the core's beliefs. Pure."""

from collections.abc import Mapping
from dataclasses import asdict

from tidegate.control import promises
from tidegate.control.canaries import PERMILLE
from tidegate.control.keys import key_state
from tidegate.control.meters import Meters
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import ApiKey, Deployment, EndpointState, ModelProfile, Tenant
from tidegate.domain.fleet import Node, Tier
from tidegate.domain.ports import Activity
from tidegate.policy import view as core
from tidegate.wire import admin


def tenant_view(tenant: Tenant) -> admin.TenantView:
    return admin.TenantView(tenant.id, tenant.created_ms)


def key_view(key: ApiKey, now_ms: int) -> admin.KeyView:
    return admin.KeyView(
        id=key.id,
        tenant=key.tenant,
        admin=key.tenant is None,
        hint=key.hint,
        state=key_state(key, now_ms),
        created_ms=key.created_ms,
        expires_ms=key.expires_ms,
        revoked_ms=key.revoked_ms,
    )


def key_created(key: ApiKey, secret: str, now_ms: int) -> admin.KeyCreated:
    return admin.KeyCreated(
        id=key.id,
        tenant=key.tenant,
        admin=key.tenant is None,
        hint=key.hint,
        state=key_state(key, now_ms),
        created_ms=key.created_ms,
        expires_ms=key.expires_ms,
        secret=secret,
    )


def may_see(identity: admin.Identity, line: Activity) -> bool:
    """A tenant sees what happens to its own endpoints. Why the core moved a replica may name other tenants' endpoints,
    so of the core's lines it sees only changes of state, whose reasons are safe.
    """
    if identity.admin:
        return True
    tenant, slash, _ = line.subject.partition("/")
    return bool(slash) and identity.may_read(tenant) and (line.actor != "core" or line.kind == "state")


def activity_view(line: Activity) -> admin.ActivityView:
    return admin.ActivityView(line.at_ms, line.actor, line.kind, line.subject, line.reason)


def endpoint_view(
    wanted: Deployment, fleet: Mapping[str, core.EndpointView], meters: Meters, settings: ControlSettings, now_ms: int
) -> admin.EndpointView:
    """`fleet` is the core's view by endpoint; it lacks one in the instant before the core has heard of it."""
    name, seen = wanted.endpoint, fleet.get(wanted.base or wanted.endpoint)
    return admin.EndpointView(
        name=name,
        tenant=wanted.tenant,
        state=seen.state if seen else _state_without_replicas(wanted),
        tier=seen.tier if seen else Tier.DISK,
        reason=seen.reason if seen else "",
        mode=wanted.mode,
        model=_model(wanted.model),
        generation=wanted.generation,
        min_replicas=wanted.min_replicas,
        max_replicas=wanted.max_replicas,
        concurrency_target=wanted.concurrency_target,
        slots=wanted.slots,
        accelerators_per_replica=wanted.accelerators_per_replica,
        accelerator_bytes=wanted.accelerator_bytes,
        slo=admin.SloBody(
            ttft_ms=wanted.slo.ttft_ms, tpot_ms=wanted.slo.tpot_ms, percentile=wanted.slo.percentile
        ),
        regions=list(wanted.regions),
        engine=wanted.engine,
        engine_args=dict(wanted.engine_args),
        price_plan=wanted.price_plan,
        paused=wanted.paused,
        created_ms=wanted.created_ms,
        overflow=_overflow(wanted),
        fallback=admin.FallbackBody(to=wanted.fallback) if wanted.fallback else None,
        lend=wanted.lend,
        schedule=[
            admin.ScheduleBody(
                cron=e.cron,
                min_replicas=e.min_replicas,
                max_replicas=e.max_replicas,
                utc_offset_minutes=e.utc_offset_minutes,
            )
            for e in wanted.schedule
        ],
        scaling=admin.ScalingBody(**asdict(wanted.scaling)),
        base=wanted.base or None,
        limits=admin.LimitsView(settings.queued_max, settings.hold_ms_max, wanted.model.context_tokens_max),
        concurrency=promises.concurrency(wanted, seen),
        activation_bounds={tier: promises.bound(times) for tier, times in meters.activation_ms.get(name, {}).items()},
        slo_status=promises.slo_status(wanted, meters, now_ms),
        canary=_canary(wanted, fleet, meters, now_ms),
        rollback_to=wanted.previous.generation if wanted.previous else None,
        slo_since_ms=meters.attainment.since_ms,
        replicas=[_replica(replica) for replica in seen.replicas] if seen else [],
        queued=seen.queued if seen else 0,
        in_flight=seen.in_flight if seen else 0,
        eta_ms=seen.eta_ms if seen else 0,
        activations=meters.activations.get(name, 0),
        activation_ms_last=meters.activation_ms_last.get(name),
    )  # fmt: skip


def _state_without_replicas(wanted: Deployment) -> EndpointState:
    """A provider elsewhere is always ready, as far as we know; of another the core has not heard yet."""
    if wanted.engine != "remote":
        return EndpointState.CREATING
    return EndpointState.PAUSED if wanted.paused else EndpointState.READY


def _model(model: ModelProfile) -> admin.ModelView:
    return admin.ModelView(
        model.source, model.digest, model.kind, model.params, model.weight_bytes, model.kv_bytes_per_token,
        model.context_tokens_max,
    )  # fmt: skip


def _canary(
    wanted: Deployment, fleet: Mapping[str, core.EndpointView], meters: Meters, now_ms: int
) -> admin.CanaryView | None:
    if (lane := wanted.canary) is None:
        return None
    seen = fleet.get(lane.endpoint)
    return admin.CanaryView(
        model=_model(lane.model),
        weight=wanted.canary_permille / PERMILLE,
        generation=lane.generation,
        state=seen.state if seen else EndpointState.CREATING,
        reason=seen.reason if seen else "",
        concurrency=promises.concurrency(lane, seen),
        slo_status=promises.slo_status(lane, meters, now_ms),
    )


def _overflow(wanted: Deployment) -> admin.OverflowBody | None:
    if (overflow := wanted.overflow) is None:
        return None
    return admin.OverflowBody(
        to=overflow.to,
        above_concurrency=overflow.above_concurrency,
        above_queue_ms=overflow.above_queue_ms,
        above_ttft_ms=overflow.above_ttft_ms,
    )


def node_view(node: Node, joined_ms: int, fleet: core.FleetView) -> admin.NodeView:
    places = {(a.node, a.accelerator): a for a in fleet.accelerators}
    host = next((h for h in fleet.hosts if h.node == node.id), None)
    residents = {r.replica: (e.endpoint, r) for e in fleet.endpoints for r in e.replicas}
    return admin.NodeView(
        id=node.id,
        region=node.region,
        joined_ms=joined_ms,
        host_memory_bytes=node.host_memory_bytes,
        host_reserved_bytes=host.reserved_bytes if host else 0,
        disk_bytes=node.disk_bytes,
        on_disk=list(host.on_disk) if host else [],
        accelerators=[
            admin.AcceleratorView(
                id=accelerator.id,
                kind=accelerator.kind,
                memory_bytes=accelerator.memory_bytes,
                reserved_bytes=seen.reserved_bytes if (seen := places.get((node.id, accelerator.id))) else 0,
                residents=_residents(seen, residents),
            )
            for accelerator in node.accelerators
        ],
    )


def _replica(replica: core.ReplicaView) -> admin.ReplicaView:
    return admin.ReplicaView(
        replica.replica, replica.node, list(replica.accelerators), replica.state, replica.generation,
        replica.accelerator_bytes, replica.host_bytes, replica.since_ms,
    )  # fmt: skip


def _residents(
    seen: core.AcceleratorView | None, replicas: Mapping[str, tuple[str, core.ReplicaView]]
) -> list[admin.ResidentView]:
    """A resident the core lists under no endpoint belongs to one that was removed and is on its way out."""
    found = [(name, *replicas[name]) for name in (seen.residents if seen else ()) if name in replicas]
    return [admin.ResidentView(name, endpoint, r.state, r.accelerator_bytes) for name, endpoint, r in found]
