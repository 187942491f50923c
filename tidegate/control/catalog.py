"""Desired state → what gateways must know of keys and endpoints. A pure function."""

from tidegate.control import adapters, remotes
from tidegate.control.engines import EngineTraits
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import ApiKey, Deployment, Mode, ModelProfile
from tidegate.domain.ports import State
from tidegate.wire.internal import Catalog, EndpointEntry, KeyEntry


def catalog(state: State, settings: ControlSettings) -> Catalog:
    """Revoked and expired keys stay in it, so that a gateway can say which of the two a key is."""
    return Catalog(
        version=state.version,
        keys=tuple(key_entry(key) for key in state.keys),
        endpoints=tuple(entry(deployment, settings) for deployment in state.deployments),
        limits=state.limits,
    )


def key_entry(key: ApiKey) -> KeyEntry:
    """What decides whether a key is good, here and in gateways."""
    return KeyEntry(key.digest, key.id, key.tenant, key.expires_ms, revoked=key.revoked_ms is not None)


def model_name(model: ModelProfile) -> str:
    """What people call a model: the last part of where it is from, without a revision, as prices name it. Usage records
    carry this, never a path.
    """
    name = model.source.rstrip("/").rsplit("/", 1)[-1]
    return (name.partition("@")[0] if model.source.startswith("hf://") else name) or model.digest


def entry(deployment: Deployment, settings: ControlSettings) -> EndpointEntry:
    """What a gateway must know of one endpoint."""
    engine = settings.engines.get(deployment.engine, EngineTraits())
    remote = remotes.target(deployment, settings.providers) if deployment.engine == "remote" else None
    return EndpointEntry(
        endpoint=deployment.endpoint,
        tenant=deployment.tenant,
        model=model_name(deployment.model),
        kind=deployment.model.kind,
        mode=deployment.mode,
        generation=deployment.generation,
        context_tokens_max=deployment.model.context_tokens_max,
        created_ms=deployment.created_ms,
        shared=deployment.mode is Mode.SERVERLESS and not deployment.base,
        hold_ms_max=settings.hold_ms_max,
        queued_max=settings.queued_max,
        metering=remote.metering if remote else engine.metering,
        remote=remote,
        cache_salt=engine.cache_salt,
        overflow=deployment.overflow,
        fallback=deployment.fallback,
        slo=deployment.slo,
        canary=deployment.canary.endpoint if deployment.canary else "",
        canary_permille=deployment.canary_permille,
        resident=deployment.mode is Mode.DEDICATED and deployment.reserved > 0,
        base=deployment.base,
        price_plan=deployment.price_plan,
        adapter=adapters.header(deployment) if deployment.base else "",
    )
