"""Contracts that refuse: their tokens are reserved, settled and given back, one after the other, while in force."""

from dataclasses import replace

import pytest

from tests.money import HOUR_MS, NOVEMBER_MS
from tidegate.domain.contract import Contract
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Lease, Scope, Spending, Window
from tidegate.quota.gate import Demand, Gate, Hold

T0, FOREVER = NOVEMBER_MS, 10**15
FIRST = Contract("first", "acme", 100, 0, T0, T0 + 2 * HOUR_MS, models=("m@1",), refuses=True)
SECOND = replace(FIRST, id="second", tokens=50, starts_ms=T0 + HOUR_MS, expires_ms=T0 + 3 * HOUR_MS)
OF_FIRST = Spending(Scope.CONTRACT, "first", Window.TOTAL, T0, 0)
OF_SECOND = Spending(Scope.CONTRACT, "second", Window.TOTAL, T0 + HOUR_MS, 0)


@pytest.fixture
def gate() -> Gate:
    made = Gate()
    made.set((), 1, T0, (FIRST, SECOND))
    made.leased([Lease(OF_FIRST, 100), Lease(OF_SECOND, 50)], FOREVER)
    return made


def ask(gate: Gate, tokens: int, now_ms: int = T0, *, model: str = "m@1", mode: str = "serverless") -> Hold:
    return gate.admit(gate.chain("k", "acme", "acme/chat", model, mode), Demand(1, 1, 0, tokens), now_ms)


def used(gate: Gate) -> dict[Spending, int]:
    return {lease.of: lease.used_nano_usd for lease in gate.leases()}


def refused(gate: Gate, tokens: int, now_ms: int = T0) -> Refusal:
    with pytest.raises(Refusal) as raised:
        ask(gate, tokens, now_ms)
    return raised.value


def test_what_may_not_be_covered_is_refused_and_what_was_not_used_comes_back(gate: Gate) -> None:
    hold = ask(gate, 70)
    no = refused(gate, 31)
    assert (no.code, no.limit.kind, no.limit.current, no.limit.full) == ("insufficient_quota", "contract", 70, 100)
    assert "of 100 prepaid tokens 30 are left" in str(no)
    gate.settle(hold, 20, 0, T0, 20)
    ask(gate, 80)
    assert refused(gate, 1).limit.current == 100
    assert {lease.of: lease.used_nano_usd for lease in gate.leases()} == {OF_FIRST: 100, OF_SECOND: 0}


def test_a_request_that_is_not_billed_gives_everything_back(gate: Gate) -> None:
    gate.settle(ask(gate, 100), 20, 0, T0, 0)
    assert used(gate) == {OF_FIRST: 0, OF_SECOND: 0}


def test_the_next_contract_in_force_takes_what_the_first_cannot(gate: Gate) -> None:
    ask(gate, 90)
    assert refused(gate, 20).limit.full == 100, "the second has not begun"
    ask(gate, 20, T0 + HOUR_MS)
    assert used(gate) == {OF_FIRST: 90, OF_SECOND: 20}
    assert refused(gate, 40, T0 + 2 * HOUR_MS).limit.full == 50, "the first is over"
    ask(gate, 10**9, T0 + 3 * HOUR_MS)


def test_other_models_other_tenants_and_dedicated_endpoints_are_not_concerned(gate: Gate) -> None:
    ask(gate, 10**9, model="m@2")
    ask(gate, 10**9, mode="dedicated")
    gate.admit(gate.chain("k", "birch", "birch/chat", "m@1", "serverless"), Demand(1, 1, 0, 10**9), T0)
    assert used(gate) == {OF_FIRST: 0, OF_SECOND: 0}


def test_without_a_lease_it_is_not_known_what_is_left() -> None:
    gate = Gate()
    gate.set((), 1, T0, (FIRST,))
    assert refused(gate, 1).code == "budget_unavailable"
