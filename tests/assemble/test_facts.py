"""What billing is told of endpoints."""

from types import SimpleNamespace
from typing import Any

from tests.billing.world import MODEL
from tidegate.assemble.billing import endpoint_facts
from tidegate.domain.endpoint import Deployment, Mode


def test_an_adapter_on_a_base_of_its_own_tenant_holds_no_accelerators_beside_it() -> None:
    def deployment(endpoint: str, **more: Any) -> Deployment:
        tenant = endpoint.partition("/")[0]
        return Deployment(endpoint, tenant, MODEL, Mode.DEDICATED, accelerators_per_replica=2, **more)

    deployments = (
        deployment("acme/base", min_replicas=3),
        deployment("acme/tuned", base="acme/base"),
        deployment("birch/tuned", base="acme/base"),
    )
    state = SimpleNamespace(version=1, deployments=deployments)
    control: Any = SimpleNamespace(desired=SimpleNamespace(state=state))
    held = {name: facts.accelerators for name, facts in (endpoint_facts(control) or {}).items()}
    assert held == {"acme/base": 6, "acme/tuned": 0, "birch/tuned": 2}
    state.version = 0
    assert endpoint_facts(control) is None
