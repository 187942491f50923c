"""Limits at the gateway's door: what a request may take, and what it really took. No waiting, no database.

Rules come with the catalog, prices and leases from control beside it; what was spent of the leases is told back. While
nobody has limits, a request costs one look at a flag.
"""

from collections.abc import Iterable, Mapping

from tidegate.domain.contract import Contract
from tidegate.domain.endpoint import Mode
from tidegate.domain.limits import Limits
from tidegate.domain.price import PriceVersion
from tidegate.domain.usage import UsageRecord
from tidegate.gateway.intake import Call
from tidegate.money.prices import DEFAULT_PLAN, PriceTable, Sold
from tidegate.money.rating import rate, worst_cost_nano_usd
from tidegate.quota.gate import Demand, Gate, Hold
from tidegate.wire.estimate import Bounds, bounds
from tidegate.wire.internal import BudgetLeases, BudgetUse, EndpointEntry
from tidegate.wire.openai import RequestHead


class Limiter:
    """Owned by the gateway's loop; every method returns at once. `dirty`: control is to be told what was used."""

    def __init__(self, gateway: str) -> None:
        self.gate = Gate()
        self.dirty = False
        self._gateway = gateway
        self._prices = PriceTable(())
        self._endpoints: Mapping[str, EndpointEntry] = {}
        self._rules: tuple[Limits, ...] = ()
        self._contracts: tuple[Contract, ...] = ()
        self._gateways = 1
        self._number = 0

    # --- what control says --------------------------------------------------------------------------------------------

    def rules(self, limits: tuple[Limits, ...], endpoints: Mapping[str, EndpointEntry], now_ms: int) -> None:
        self._endpoints = endpoints
        self._rules = limits
        self._set_gate(now_ms)

    def peers(self, gateways: int, now_ms: int) -> None:
        self._gateways = max(1, gateways)
        self._set_gate(now_ms)

    def contracts(self, refusing: tuple[Contract, ...], now_ms: int) -> None:
        self._contracts = refusing
        self._set_gate(now_ms)

    def prices(self, versions: Iterable[PriceVersion]) -> None:
        self._prices = PriceTable(versions)

    def leased(self, message: BudgetLeases, now_ms: int) -> None:
        """To be answered with `use`, so that control knows which caps this gateway acts on."""
        self._number = message.number
        self.gate.leased(message.leases, now_ms + message.good_ms)
        self.dirty = True

    def use(self) -> BudgetUse:
        self.dirty = False
        return BudgetUse(self._gateway, self._number, self.gate.leases())

    def linked(self) -> None:
        """A new link to control: its numbers begin anew."""
        self._number = 0
        self.dirty = True

    def _set_gate(self, now_ms: int) -> None:
        self.gate.set(self._rules, self._gateways, now_ms, self._contracts)

    # --- what requests ask --------------------------------------------------------------------------------------------

    def admit(self, call: Call, head: RequestHead) -> Hold | None:
        """What it takes, None where nobody limits it. Refusal rate_limit_exceeded, insufficient_quota and such."""
        entry, size = call.entry, len(call.body)
        meters = self.gate.chain(call.key, call.tenant, entry.serves or entry.endpoint, entry.model, entry.mode.value)
        if not meters:
            return None
        if not any(meter.purses or meter.tokens for meter in meters) and not call.line:
            return self.gate.admit(meters, Demand(size, None, 0), call.arrived_ms)
        bound = bounds(call.api, head, call.body, entry.context_tokens_max)
        tokens = None if bound.output_tokens is None else bound.output_tokens * bound.answers
        cost = self._cost(call, bound) if any(meter.purses for meter in meters) else 0
        # Batch lines have a queue of their own: what they cost is limited, how fast they come is not.
        most = bound.input_tokens + self._output_max(call, bound)
        return self.gate.admit(meters, Demand(size, tokens, cost, most), call.arrived_ms, rates=not call.line)

    def settle(self, hold: Hold, record: UsageRecord) -> None:
        """With what was recorded: the same amount that the ledger will rate it with."""
        cost = 0
        if hold.money:
            price = self._price(record.tenant, record.endpoint, record.model, record.mode, record.arrived_ms)
            cost = sum(entry.amount for entry in rate(record, price).entries[:1])
            self.dirty = True
        used = record.input_tokens + record.output_tokens
        prepaid = used if record.billable and record.mode != Mode.DEDICATED else 0
        self.gate.settle(hold, used, cost, record.ended_ms, prepaid)

    def _cost(self, call: Call, bound: Bounds) -> int:
        """The most it can cost, wherever it may be served: where it goes on overflow has a price of its own."""
        entry = call.entry
        others = (entry.overflow.to if entry.overflow else "", entry.fallback)
        places = (entry, *(self._endpoints[name] for name in others if name in self._endpoints))
        return max(self._cost_at(place, call, bound) for place in places)

    def _cost_at(self, entry: EndpointEntry, call: Call, bound: Bounds) -> int:
        price = self._price(call.tenant, entry.serves or entry.endpoint, entry.model, entry.mode.value, call.arrived_ms)
        if price is None:
            return 0
        return worst_cost_nano_usd(bound.input_tokens, self._output_max(call, bound), entry.mode.value, price)

    def _output_max(self, call: Call, bound: Bounds) -> int:
        output = call.entry.context_tokens_max if bound.output_tokens is None else bound.output_tokens
        return output * bound.answers

    def _price(self, tenant: str, endpoint: str, model: str, mode: str, at_ms: int) -> PriceVersion | None:
        entry = self._endpoints.get(endpoint)
        plan = DEFAULT_PLAN if entry is None else entry.price_plan
        return self._prices.in_force(plan, at_ms, Sold(tenant, endpoint, model, mode))
