"""Where batch lines of an endpoint are done: a deployment of the same model beside it, of the lowest class, which is
there only while there are lines to do.

The core treats it like any endpoint of mode batch: it gets accelerators nobody else wants, and is aborted at once when
somebody does. Nobody can call it but the batch runner, and what it does is recorded as the endpoint's own, in mode
batch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tidegate.control.adapters import placed
from tidegate.control.catalog import entry
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.wire.internal import Catalog, KeyEntry

SUFFIX = ":batch"  # no endpoint of a tenant can be called so
REPLICAS_MAX = 64


def lanes(deployments: Iterable[Deployment], wanted: Mapping[str, bool]) -> dict[str, Deployment]:
    """The lanes of the endpoints in `wanted`, by the lane's name; True competes with serverless endpoints. An endpoint
    of mode batch needs none. The lines of an adapter are done in the lane of its base.
    """
    known = {deployment.endpoint: deployment for deployment in deployments}
    rush: dict[str, bool] = {}
    for name in wanted.keys() & known.keys():
        owner = known[name].base or name
        rush[owner] = rush.get(owner, False) or wanted[name]
    owners = [d for d in placed(known.values()).values() if d.endpoint in rush and d.mode is not Mode.BATCH]
    return {owner.endpoint + SUFFIX: _lane(owner, rush[owner.endpoint]) for owner in owners}


def _lane(owner: Deployment, rush: bool) -> Deployment:
    """How the model runs is the owner's; what the owner promises its callers (minimum, schedule, fallback) is not."""
    return Deployment(
        endpoint=owner.endpoint + SUFFIX,
        tenant=owner.tenant,
        model=owner.model,
        mode=Mode.SERVERLESS if rush else Mode.BATCH,
        generation=owner.generation,
        max_replicas=REPLICAS_MAX,
        concurrency_target=owner.slots,
        slots=owner.slots,
        accelerators_per_replica=owner.accelerators_per_replica,
        accelerator_bytes=owner.accelerator_bytes,
        host_bytes=owner.host_bytes,
        one_copy=owner.one_copy,
        slo=owner.slo,
        regions=owner.regions,
        engine=owner.engine,
        engine_args=owner.engine_args,
        price_plan=owner.price_plan,
        paused=owner.paused,
        created_ms=owner.created_ms,
        movable=owner.movable,
    )


def with_lanes(
    catalog: Catalog, lanes: Mapping[str, Deployment], changes: int, runner_digest: str, settings: ControlSettings
) -> Catalog:
    """`catalog` with what gateways must know of batch work. `changes` is how often lanes have changed: a gateway takes
    the newer version.
    """
    own = [
        replace(entry(lane, settings), mode=Mode.BATCH, serves=lane.endpoint.removesuffix(SUFFIX), shared=False)
        for lane in lanes.values()
    ]
    carried = [
        replace(e, endpoint=e.endpoint + SUFFIX, mode=Mode.BATCH, serves=e.endpoint, base=e.base + SUFFIX)
        for e in catalog.endpoints
        if e.base and e.base + SUFFIX in lanes
    ]
    runner = (KeyEntry(runner_digest, "batch-runner", None, runner=True),) if runner_digest else ()
    return replace(catalog, version=catalog.version + changes, keys=catalog.keys + runner, batch=(*own, *carried))
