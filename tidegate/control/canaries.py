"""A canary: a second deployment beside an endpoint's own, with another model, that gets a share of its requests.

It is an endpoint of its own to the core and in the waiting rooms (`tenant/name:canary`), so nothing else has to know of
canaries. One replica is always resident while it exists; a request it has no replica for is served by the endpoint's
own, so dropping it is instant and loses nothing. What it serves is recorded as the endpoint's, under its own model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tidegate.control.catalog import entry
from tidegate.control.refusals import refused
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment
from tidegate.wire.internal import Catalog

SUFFIX = ":canary"  # no endpoint of a tenant can be called so
PERMILLE = 1_000


def beside(owner: Deployment, made: Deployment, weight: float) -> Deployment:
    """`owner` with a canary: `made` is what the owner's own request makes of the canary's model."""
    if owner.base:
        accepted = "none on an adapter: give the adapter another endpoint, or its base a canary"
        raise refused("canary", made.model.source, accepted)
    if made.model.kind is not owner.model.kind:
        accepted = f"a {owner.model.kind} model, as its own is"
        raise refused("canary.model", made.model.kind, accepted)
    if made.model.context_tokens_max < owner.model.context_tokens_max:
        needed, has = owner.model.context_tokens_max, made.model.context_tokens_max
        accepted = f"a context of {needed} tokens or more (it has {has}), or less `context_tokens`"
        raise refused("canary.model", made.model.source, accepted)
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
