"""Endpoints that are LoRA adapters: they have no replicas, those of another endpoint, their base, carry them.

The tenant sees an endpoint like any other, with its own name, limits and bill; capacity is the base's alone. So the
fleet core never hears of them, and a request of one counts as demand of its base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from urllib.parse import quote, unquote, urlsplit

from tidegate.control.engines import ADAPTER_ROOM, LORA_SWITCH
from tidegate.control.refusals import refused
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile, Slo
from tidegate.domain.errors import Refusal
from tidegate.wire.admin import EndpointApply

OWN = ("model", "base", "slo", "price_plan")  # what an adapter decides for itself


def placed(deployments: Iterable[Deployment]) -> dict[str, Deployment]:
    """Those with replicas of their own, by endpoint."""
    return {d.endpoint: d for d in deployments if not d.base and d.engine != "remote"}


def deployment(
    endpoint: str, tenant: str, body: EndpointApply, adapter: ModelProfile, base: Deployment, now_ms: int
) -> Deployment:
    """The first generation of an adapter endpoint. Raises Refusal naming the field."""
    plain = EndpointApply(model=body.model)
    for name in EndpointApply.__struct_fields__:
        if name not in OWN and getattr(body, name) != getattr(plain, name):
            accepted = f"leaving it out: capacity is that of the base {base.endpoint}"
            raise refused(name, getattr(body, name), accepted)
    _check_base(base, tenant, adapter.weight_bytes)
    model = replace(adapter, context_tokens_max=base.model.context_tokens_max)
    return replace(
        base,
        endpoint=endpoint,
        tenant=tenant,
        base=base.endpoint,
        model=model,
        slo=Slo(body.slo.ttft_ms, body.slo.tpot_ms, body.slo.percentile),
        price_plan=body.price_plan,
        generation=1,
        created_ms=now_ms,
        engine_args=(),
        host_bytes=0,
        overflow=None,
        fallback="",
        lend=False,
    )


def find_base(endpoint: str, base: str, deployments: Mapping[str, Deployment]) -> Deployment:
    """Raises Refusal invalid_configuration when there is none that could carry an adapter of `endpoint`."""
    found = deployments.get(base)
    tenant = endpoint.partition("/")[0]
    if found is None or found.base or base == endpoint or not _may_use(tenant, found):
        mine = sorted(d.endpoint for d in deployments.values() if _takes(d) and not d.base and _may_use(tenant, d))
        shown = (
            ", ".join(mine[:10]) or f"(none; a base is applied with engine_args.{ADAPTER_ROOM}, on vllm {LORA_SWITCH})"
        )
        raise refused("base", base, f"an endpoint that takes adapters, of this tenant or serverless: {shown}")
    _check_base(found, tenant, 0)
    return found


def check(wanted: Deployment, others: Mapping[str, Deployment]) -> None:
    """Raises Refusal conflict when `wanted`, as it would be now, could not go on carrying its adapters."""
    adapters = users(wanted.endpoint, others)
    if not adapters:
        return
    before = next(d for d in others.values() if d.endpoint == adapters[0])
    try:
        _check_base(wanted, before.tenant, max(others[name].model.weight_bytes for name in adapters))
    except Refusal as refusal:
        raise Refusal("conflict", f"it carries {', '.join(adapters[:10])}: {refusal.message}") from refusal


def users(endpoint: str, others: Mapping[str, Deployment]) -> list[str]:
    """Adapter endpoints that the replicas of `endpoint` carry."""
    return sorted(d.endpoint for d in others.values() if d.base == endpoint)


def header(adapter: Deployment) -> str:
    """What a gateway asks the base's engine with: ``DIGEST FOLDER``, the folder percent-encoded."""
    source = adapter.model.source
    folder = unquote(urlsplit(source).path) if source.startswith("file://") else source
    return f"{adapter.model.digest} {quote(folder)}"


def _may_use(tenant: str, base: Deployment) -> bool:
    return base.tenant == tenant or base.mode is Mode.SERVERLESS


def _check_base(base: Deployment, tenant: str, adapter_bytes: int) -> None:
    if base.engine not in ("builtin", "vllm") or base.model.kind is not ModelKind.GENERATIVE:
        raise refused("base", base.endpoint, "a generative model on engine builtin or vllm")
    if not _may_use(tenant, base):
        raise refused("base", base.endpoint, "an endpoint of this tenant or a serverless one")
    if base.engine == "vllm":
        if not _takes(base):
            raise refused("base", base.endpoint, f'a base applied with engine_args.{LORA_SWITCH} = "true"')
        return
    need = max(1, adapter_bytes * base.slots)  # a batch may have as many adapters as it has slots
    if _room(base) < need:
        accepted = f"a base applied with engine_args.{ADAPTER_ROOM} of at least {need} bytes; it has {_room(base)}"
        raise refused("base", base.endpoint, accepted)


def _takes(base: Deployment) -> bool:
    return _room(base) > 0 or dict(base.engine_args).get(LORA_SWITCH) == "true"


def _room(base: Deployment) -> int:
    value = dict(base.engine_args).get(ADAPTER_ROOM, "0")
    return int(value) if value.isdecimal() else 0
