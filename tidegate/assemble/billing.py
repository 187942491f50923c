"""Builds the billing service on its stores, with what the control plane knows of endpoints, tenants and limits."""

from collections.abc import Mapping

from tidegate.assemble.ground import Ground
from tidegate.assemble.settings import collectors
from tidegate.billing.service import Billing
from tidegate.config import Config
from tidegate.control.service import Control
from tidegate.domain.ledger import EndpointFacts
from tidegate.domain.ports import Clock
from tidegate.stores.dead_letters import DeadLetterFiles


def billing_service(config: Config, ground: Ground, control: Control, clock: Clock) -> Billing:
    return Billing(
        reader=ground.journal_reader,
        ledger=ground.ledger,
        prices=ground.prices,
        clock=clock,
        endpoint_facts=lambda: endpoint_facts(control),
        time=control.meters.time,
        limits=lambda: control.desired.state.limits,
        on_prices=control.budgets.priced,
        collectors=collectors(config),
        dead_letters=DeadLetterFiles(ground.data / "dead-letters"),
        record_days=config.billing.record_days,
        contracts=ground.contracts,
        tenants=lambda: {tenant.id for tenant in control.desired.state.tenants},
    )


def endpoint_facts(control: Control) -> Mapping[str, EndpointFacts] | None:
    """What billing must know of each endpoint; None until desired state is loaded: not known is not "no endpoints"."""
    if control.desired.state.version == 0:  # the first commit, of the first key, precedes every load
        return None
    return {
        d.endpoint: EndpointFacts(
            created_ms=d.created_ms,
            accelerators=d.accelerators_per_replica * max(d.min_replicas, 1),
            price_plan=d.price_plan,
            mode=d.mode.value,
        )
        for d in control.desired.state.deployments
    }
