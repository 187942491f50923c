"""Budgets: leases, reservations and the ledger in every order of events never spend more than the budget."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.money import HOUR_MS, NOVEMBER_MS
from tidegate.domain.contract import Contract
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Budget, Lease, Limits, Scope, Spending, Window
from tidegate.quota import prepaid
from tidegate.quota.gate import Demand, Gate, Hold
from tidegate.quota.treasury import Spent, Treasury, spendings

DAY = Spending(Scope.TENANT, "acme", Window.DAY, 7, NOVEMBER_MS)
TOMORROW = DAY._replace(start_ms=NOVEMBER_MS + 24 * HOUR_MS)
NOON = NOVEMBER_MS + 12 * HOUR_MS
FOREVER = 10**15


def rule(full: int, window: Window = Window.DAY) -> Limits:
    return Limits(Scope.TENANT, "acme", budgets=(Budget(window, full, 7),))


def contract(full: int) -> Contract:
    return Contract("c", "acme", full, 0, NOVEMBER_MS, FOREVER, refuses=True)


def nothing(*gateways: str) -> Spent:
    return Spent({DAY: {}, TOMORROW: {}}, frozenset(), frozenset(gateways))


def a_gate(full: int) -> Gate:
    gate = Gate()
    gate.set([rule(full)], 1, NOON)
    return gate


def ask(gate: Gate, cost: int, now_ms: int = NOON) -> Hold:
    """A request that may cost so much money, and as many tokens."""
    return gate.admit(gate.chain("k", "acme", "acme/chat"), Demand(1, 1, cost, cost), now_ms)


def refused(gate: Gate, cost: int, now_ms: int = NOON) -> Refusal:
    with pytest.raises(Refusal) as raised:
        ask(gate, cost, now_ms)
    return raised.value


def test_without_a_lease_a_budget_is_unknown_and_a_lease_grows_old() -> None:
    gate = a_gate(100)
    assert refused(gate, 1).code == "budget_unavailable"
    gate.leased([Lease(DAY, 100)], NOON + 10)
    ask(gate, 1)
    assert refused(gate, 1, NOON + 10).code == "budget_unavailable"
    gate.leased([], NOON + 20)
    ask(gate, 1, NOON + 10)


def test_a_reservation_is_the_most_it_can_cost_and_the_rest_is_given_back() -> None:
    gate = a_gate(100)
    gate.leased([Lease(DAY, 100)], FOREVER)
    hold = ask(gate, 60)
    no = refused(gate, 41)
    assert (no.code, no.limit.kind, no.limit.current, no.limit.full) == ("insufficient_quota", "budget", 60, 100)
    assert (no.retry_after_ms, no.headers["x-should-retry"]) == (12 * HOUR_MS, "false")
    gate.settle(hold, 1, 10, NOON)
    ask(gate, 90)
    assert refused(gate, 1).limit.current == 100


def test_a_total_budget_does_not_come_back() -> None:
    gate = Gate()
    gate.set([rule(100, Window.TOTAL)], 1, NOON)
    gate.leased([Lease(Spending(Scope.TENANT, "acme", Window.TOTAL, 7, 0), 0)], FOREVER)
    assert refused(gate, 1).retry_after_ms is None
    ask(gate, 0)


def test_a_request_that_runs_past_midnight_belongs_to_the_day_it_arrived_in() -> None:
    gate = a_gate(100)
    gate.leased([Lease(DAY, 100), Lease(TOMORROW, 100)], FOREVER)
    hold = ask(gate, 100)
    ask(gate, 100, TOMORROW.start_ms)
    gate.settle(hold, 1, 30, TOMORROW.start_ms + 5)
    assert {lease.of: lease.used_nano_usd for lease in gate.leases()} == {DAY: 30, TOMORROW: 100}


def test_one_gateway_has_it_all_two_have_halves() -> None:
    treasury = Treasury(0)
    treasury.joined("a")
    assert treasury.lease([rule(100)], nothing(), NOON) == {"a": (1, (Lease(DAY, 100),))}
    assert treasury.lease([rule(100)], nothing(), NOON) == {}
    treasury.reported("a", 1, [Lease(DAY, 100, 10)])
    treasury.joined("b")
    down = treasury.lease([rule(100)], nothing(), NOON)
    assert down == {"a": (2, (Lease(DAY, 55),)), "b": (2, (Lease(DAY, 0),))}
    assert treasury.committed(DAY, nothing()) == 100
    treasury.reported("a", 2, [Lease(DAY, 55, 12)])
    up = treasury.lease([rule(100)], nothing(), NOON)
    assert up == {"b": (3, (Lease(DAY, 44),))}


def test_the_next_window_is_leased_before_it_begins() -> None:
    treasury = Treasury(0)
    treasury.joined("a")
    (_, leases) = treasury.lease([rule(100)], nothing(), NOVEMBER_MS + 24 * HOUR_MS - 1)["a"]
    assert [lease.of for lease in leases] == [DAY, TOMORROW]


def test_a_gateway_that_is_gone_keeps_its_part_until_its_journal_is_read() -> None:
    treasury = Treasury(0)
    treasury.joined("a")
    treasury.lease([rule(100)], nothing(), NOON)
    treasury.left("a")
    treasury.joined("b")
    (_, (lease,)) = treasury.lease([rule(100)], nothing("a"), NOON)["b"]
    assert lease.cap_nano_usd == 0
    read = Spent({DAY: {"a": 30}}, frozenset({"a"}), frozenset({"b"}))
    (_, (lease,)) = treasury.lease([rule(100)], read, NOON)["b"]
    assert lease.cap_nano_usd == 70


def test_what_the_ledger_has_not_looked_at_is_not_leased() -> None:
    treasury = Treasury(0)
    treasury.joined("a")
    assert treasury.lease([rule(100)], Spent({}, frozenset(), frozenset()), NOON) == {}


def test_a_lease_that_came_before_its_rule_is_told_again() -> None:
    treasury = Treasury(0)
    treasury.joined("a")
    ((number, leases),) = treasury.lease([rule(100)], nothing(), NOON).values()
    treasury.reported("a", number, [])
    assert treasury.lease([rule(100)], nothing(), NOON) == {"a": (number + 1, leases)}


def test_a_lease_lost_with_its_link_is_told_again_on_the_next_one() -> None:
    treasury = Treasury(0)
    treasury.joined("a")
    assert treasury.lease([rule(100)], nothing(), NOON)["a"][1] == (Lease(DAY, 100),)
    treasury.left("a")
    treasury.joined("a")
    treasury.reported("a", 0, [])
    assert treasury.lease([rule(100)], nothing(), NOON)["a"][1] == (Lease(DAY, 100),)
    treasury.reported("a", 2, [Lease(DAY, 100, 10)])
    assert treasury.lease([rule(100)], nothing(), NOON) == {}


def test_a_new_control_waits_for_gateways_it_does_not_know() -> None:
    treasury = Treasury(NOON + 10)
    treasury.joined("b")
    assert treasury.lease([rule(100)], nothing("a", "b"), NOON) == {}
    treasury.joined("a")
    treasury.reported("a", 0, [Lease(DAY, 80, 20)])
    granted = treasury.lease([rule(100)], nothing("a", "b"), NOON)
    assert treasury.committed(DAY, nothing("a", "b")) <= 100
    assert granted["b"][1][0].cap_nano_usd == 20
    later = Treasury(NOON + 10)
    later.joined("b")
    assert later.lease([rule(100)], nothing("a", "b"), NOON + 10)["b"][1][0].cap_nano_usd == 100


KINDS = ("ask", "ask", "ask", "end", "tick", "deliver", "deliver", "report", "ingest", "cut", "die", "born")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 3),
        st.integers(0, 60),
    ),
    max_size=120,
)


class World:
    """Gateways, control and ledger with messages and records under way between them, in any order hypothesis finds."""

    def __init__(self, full: int, contracts: tuple[Contract, ...] = ()) -> None:
        self.full = full
        self.contracts = contracts
        self.limits = list(prepaid.rules(contracts)) or [rule(full)]
        self.of = next(iter(spendings(self.limits, NOON)))
        self.treasury = Treasury(0)
        self.gates: dict[str, Gate] = {}
        self.born = 0
        self.to_gateway: dict[str, list[tuple[int, tuple[Lease, ...]]]] = {}
        self.to_control: list[tuple[str, int, tuple[Lease, ...]]] = []
        self.received: dict[str, int] = {}
        self.holds: dict[str, list[Hold]] = {}
        self.journal: list[tuple[str, int]] = []
        self.ledger: dict[str, int] = {}
        self.dead: set[str] = set()
        self.cost = 0
        for _ in range(2):
            self.birth()

    def birth(self) -> None:
        name = f"g{self.born}"
        self.born += 1
        gate = self.gates[name] = Gate()
        gate.set([] if self.contracts else self.limits, 1, NOON, self.contracts)
        self.to_gateway[name], self.holds[name], self.received[name] = [], [], 0
        self.treasury.joined(name)

    @property
    def spent(self) -> Spent:
        unread = {gateway for gateway, _ in self.journal}
        closed = frozenset(self.dead - unread)
        return Spent({self.of: dict(self.ledger)}, closed, frozenset(self.received) - closed)

    def step(self, what: str, who: int, amount: int) -> None:
        name = sorted(self.gates)[who % len(self.gates)] if self.gates else ""
        match what:
            case "born" if self.born < 6:
                self.birth()
            case "tick":
                for gateway, message in self.treasury.lease(self.limits, self.spent, NOON).items():
                    self.to_gateway[gateway].append(message)
            case "ingest" if self.journal:
                gateway, cost = self.journal.pop(0)
                self.ledger[gateway] = self.ledger.get(gateway, 0) + cost
            case "report" if self.to_control:
                gateway, number, leases = self.to_control.pop(0)
                if gateway not in self.dead:
                    self.treasury.reported(gateway, number, leases)
            case _ if name:
                self.at_gateway(what, name, amount)

    def at_gateway(self, what: str, name: str, amount: int) -> None:
        gate = self.gates[name]
        match what:
            case "ask":
                with contextlib.suppress(Refusal):
                    self.holds[name].append(ask(gate, amount))
            case "end" if self.holds[name]:
                hold = self.holds[name].pop(amount % len(self.holds[name]))
                cost = min(amount, hold.cost_nano_usd)
                gate.settle(hold, 0, cost, NOON, cost)
                self.journal.append((name, cost))
                self.cost += cost
            case "deliver" if self.to_gateway[name]:
                number, leases = self.to_gateway[name].pop(0)
                self.received[name] = number
                gate.leased(leases, FOREVER)
                self.to_control.append((name, number, gate.leases()))
            case "cut":  # its link ends, with what was under way on it, and is made anew
                self.to_gateway[name].clear()
                self.to_control = [message for message in self.to_control if message[0] != name]
                self.treasury.left(name)
                self.treasury.joined(name)
                self.received[name] = 0
                self.to_control.append((name, 0, gate.leases()))
            case "die":
                for hold in self.holds[name]:  # what its streams had delivered is found in its journal
                    self.journal.append((name, hold.cost_nano_usd))
                    self.cost += hold.cost_nano_usd
                del self.gates[name]
                self.dead.add(name)
                self.treasury.left(name)

    def law(self) -> None:
        reserved = sum(hold.cost_nano_usd for name in self.gates for hold in self.holds[name])
        assert self.cost + reserved <= self.full, "a budget was overdrawn"
        assert self.treasury.committed(self.of, self.spent) <= self.full


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200), STEPS, st.booleans())
def test_no_interleaving_overdraws(full: int, steps: list[tuple[str, int, int]], of_contract: bool) -> None:
    """Neither a budget nor a contract that refuses."""
    world = World(full, (contract(full),) if of_contract else ())
    for step in steps:
        world.step(*step)
        world.law()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), STEPS)
def test_once_everything_is_told_the_whole_budget_can_be_spent(full: int, steps: list[tuple[str, int, int]]) -> None:
    """Nothing is lost in leases: after the messages and records are through, one gateway left has all that is left."""
    world = World(full)
    for step in steps:
        world.step(*step)
    if not world.gates:
        world.birth()
    (alive, *others) = sorted(world.gates)
    for name in others:
        world.at_gateway("die", name, 0)
    for hold in world.holds[alive]:
        world.gates[alive].settle(hold, 0, 0, NOON)
    world.holds[alive].clear()
    world.at_gateway("deliver", alive, 0)
    for _ in range(4):
        while world.journal:
            world.step("ingest", 0, 0)
        world.step("tick", 0, 0)
        while world.to_gateway[alive]:
            world.at_gateway("deliver", alive, 0)
        world.to_control.append((alive, world.received[alive], world.gates[alive].leases()))
        while world.to_control:
            world.step("report", 0, 0)
    left = full - world.cost
    ask(world.gates[alive], left)
    assert refused(world.gates[alive], 1).code == "insufficient_quota"
