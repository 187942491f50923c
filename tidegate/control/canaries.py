"""A canary: a second deployment beside an endpoint's own, with another model, that gets a share of its requests.

It is an endpoint of its own to the core and in the waiting rooms (`tenant/name:canary`), so nothing else has to know of
canaries. One replica is always resident while it exists; a request it has no replica for is served by the endpoint's
own, so dropping it is instant and loses nothing. What it serves is recorded as the endpoint's, under its own model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tidegate.control.catalog import entry
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment
from tidegate.domain.errors import Refusal
from tidegate.wire.internal import Catalog

SUFFIX = ":canary"  # no endpoint of a tenant can be called so
PERMILLE = 1_000


def beside(owner: Deployment, made: Deployment, weight: float) -> Deployment:
    """`owner` with a canary: `made` is what the owner's own request makes of the canary's model."""
    if owner.base:
        raise _wrong("canary", "one of an adapter", "none: give the adapter another endpoint, or its base a canary")
    if made.model.kind is not owner.model.kind:
        accepted = f"a {owner.model.kind} model, as its own is"
        raise _wrong("canary.model", f"a {made.model.kind} model", accepted)
    if made.model.context_tokens_max < owner.model.context_tokens_max:
        accepted = f"a context of {owner.model.context_tokens_max} tokens or more, or less `context_tokens`"
        raise _wrong("canary.model", f"a context of {made.model.context_tokens_max} tokens", accepted)
    lane = replace(
        made,
        endpoint=owner.endpoint + SUFFIX,
        min_replicas=max(made.min_replicas, 1),
        overflow=None,
        fallback=owner.endpoint,
        lend=False,
    )
    return replace(owner, canary=lane, canary_permille=round(weight * PERMILLE))


def placed(deployments: Mapping[str, Deployment]) -> dict[str, Deployment]:
    """`deployments` and their canaries: what the core is told of."""
    lanes = [d.canary for d in deployments.values() if d.canary is not None]
    return {**deployments, **{lane.endpoint: lane for lane in lanes}}


def with_entries(catalog: Catalog, deployments: Iterable[Deployment], settings: ControlSettings) -> Catalog:
    """`catalog` and what gateways must know of the canaries."""
    lanes = [(d.endpoint, d.canary) for d in deployments if d.canary is not None]
    made = (replace(entry(lane, settings), serves=owner, resident=True) for owner, lane in lanes)
    return replace(catalog, endpoints=(*catalog.endpoints, *made))


def _wrong(param: str, value: str, accepted: str) -> Refusal:
    return Refusal("invalid_configuration", f"`{param}`: {value} is not accepted; accepted: {accepted}", param=param)
