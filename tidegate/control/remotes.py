"""Endpoints served by an API elsewhere: ``engine = "remote"``, ``model = "remote://PROVIDER/their-model"``.

Providers are the operator's to declare: an endpoint names one, and so can never send a key to a place of its choosing.
The capacity core never hears of these endpoints; gateways route to the provider themselves.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from tidegate.control.refusals import refused
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile, Slo
from tidegate.wire.admin import EndpointApply
from tidegate.wire.internal import RemoteTarget

SCHEME = "remote://"
# What an endpoint without replicas may say of itself; everything else must be left as it is.
OWN = {"model", "mode", "engine", "slo", "price_plan", "context_tokens", "paused", "regions"}


def profile(source: str, providers: Mapping[str, RemoteTarget]) -> ModelProfile:
    """What is known of a model elsewhere: nothing of its weights. Raises Refusal naming the providers there are."""
    provider, model = _parts(source)
    if provider not in providers or not model:
        known = ", ".join(sorted(providers)) or "(none: declare one under [remotes.NAME])"
        raise refused("model", source, f"remote://PROVIDER/MODEL with a declared provider: {known}")
    digest = hashlib.sha256(source.encode()).hexdigest()
    return ModelProfile(source, digest, ModelKind.GENERATIVE, 0, 0, providers[provider].context_tokens_max)


def target(deployment: Deployment, providers: Mapping[str, RemoteTarget]) -> RemoteTarget | None:
    """Where gateways send its requests; None where the provider is no longer declared."""
    provider, model = _parts(deployment.model.source)
    found = providers.get(provider)
    return None if found is None else replace(found, model=model, paused=deployment.paused)


def deployment(
    endpoint: str, tenant: str, body: EndpointApply, model: ModelProfile, found: RemoteTarget, now_ms: int
) -> Deployment:
    """The first generation of a remote endpoint. Raises Refusal naming a field that only makes sense with replicas."""
    plain = EndpointApply(model=body.model)
    for name in EndpointApply.__struct_fields__:
        if name not in OWN and getattr(body, name) != getattr(plain, name):
            raise refused(name, getattr(body, name), "leaving it out: engine remote has no replicas of its own")
    if body.mode not in (Mode.SERVERLESS, Mode.DEDICATED_SERVERLESS):
        raise refused("mode", body.mode.value, "serverless or dedicated_serverless: nothing is reserved there")
    if body.regions is not None and body.regions != [found.region]:
        raise refused("regions", ", ".join(body.regions), f"{found.region}, where provider {found.provider} computes")
    context = body.context_tokens or model.context_tokens_max
    if context > model.context_tokens_max:
        raise refused("context_tokens", context, f"at most {model.context_tokens_max}, as its provider is declared")
    return Deployment(
        endpoint=endpoint,
        tenant=tenant,
        model=replace(model, context_tokens_max=context),
        mode=body.mode,
        min_replicas=0,
        max_replicas=0,
        concurrency_target=found.concurrency_max,
        slots=found.concurrency_max,
        accelerators_per_replica=0,
        slo=Slo(body.slo.ttft_ms, body.slo.tpot_ms, body.slo.percentile),
        regions=(found.region,),
        engine="remote",
        price_plan=body.price_plan,
        paused=body.paused,
        created_ms=now_ms,
    )


def provider_of(model: ModelProfile) -> str:
    """The name its source gives."""
    return _parts(model.source)[0]


def _parts(source: str) -> tuple[str, str]:
    provider, _, model = source.removeprefix(SCHEME).partition("/")
    return provider, model
