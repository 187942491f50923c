"""Contracts that refuse once they are used up: their tokens are leased to gateways the way budgets are. Pure."""

from collections.abc import Iterable

from tidegate.domain.contract import Contract
from tidegate.domain.limits import Budget, Limits, Scope, Window


def rules(contracts: Iterable[Contract]) -> tuple[Limits, ...]:
    """A limit for each: a budget whose amounts are tokens, spent by requests that arrive from its beginning on."""
    return tuple(
        Limits(Scope.CONTRACT, c.id, budgets=(Budget(Window.TOTAL, c.tokens, c.starts_ms),)) for c in contracts
    )
