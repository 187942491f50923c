"""Builds the billing service on its stores, with what the control plane knows of endpoints, tenants and limits."""

from collections.abc import Mapping

from tidegate.assemble.ground import Ground
from tidegate.assemble.settings import collectors
from tidegate.billing.service import Billing
from tidegate.config import Config
from tidegate.config.sections import BillingConfig
from tidegate.control.service import Control
from tidegate.domain.ledger import EndpointFacts
from tidegate.domain.ports import Clock
from tidegate.domain.units import nano_usd
from tidegate.money.economics import MachineCost
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
        machines=_machines(config.billing),
    )


def _machines(billing: BillingConfig) -> MachineCost | None:
    if billing.machine_hour_usd is None and not billing.machine_hours_usd:
        return None
    kinds = {kind: nano_usd(hour) for kind, hour in billing.machine_hours_usd.items()}
    return MachineCost(nano_usd(billing.machine_hour_usd or "0"), kinds)


def endpoint_facts(control: Control) -> Mapping[str, EndpointFacts] | None:
    """What billing must know of each endpoint; None until desired state is loaded: not known is not "no endpoints"."""
    if control.desired.state.version == 0:  # the first commit, of the first key, precedes every load
        return None
    tenants = {d.endpoint: d.tenant for d in control.desired.state.deployments}
    return {
        d.endpoint: EndpointFacts(
            created_ms=d.created_ms,
            # Whoever has the base has its accelerators already: an adapter on it would hold none beside them.
            accelerators=0 if tenants.get(d.base) == d.tenant else d.accelerators_per_replica * max(d.min_replicas, 1),
            price_plan=d.price_plan,
            mode=d.mode.value,
        )
        for d in control.desired.state.deployments
    }
