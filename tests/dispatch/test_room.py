"""Dispatch against a model of it: whatever happens in whatever order, the laws of the waiting room hold."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tidegate.dispatch import (
    Arrived,
    ConfirmFence,
    Deadline,
    Dispatch,
    Effect,
    Ended,
    Event,
    Grant,
    Refuse,
    ReportDemand,
    Returned,
    SessionStarted,
)
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.plan import Drain, EndpointRemoved, Reason, Resume, Route, Target

E = "acme/chat"
WHY = Reason("test")


def target(replica: str, slots: int = 1, region: str = "here", address: str = "unix:/x") -> Target:
    return Target(replica, address, slots, region)


def route(version: int, *targets: Target, state: EndpointState = EndpointState.READY, **more: object) -> Route:
    return Route(E, version, state, targets, **more)  # type: ignore[arg-type]


def arrived(request: str, deadline_ms: int = 1_000, queued_max: int = 100) -> Arrived:
    return Arrived(request, E, deadline_ms, queued_max)


def answers(effects: list[Effect]) -> list[Grant | Refuse]:
    return [e for e in effects if isinstance(e, Grant | Refuse)]


def play(*steps: tuple[int, Event]) -> tuple[Dispatch, list[list[Effect]]]:
    dispatch = Dispatch("here")
    return dispatch, [dispatch.handle(event, now_ms) for now_ms, event in steps]


# --- table ------------------------------------------------------------------------------------------------------------


def test_granted_at_once_when_a_slot_is_free() -> None:
    _, said = play((0, route(1, target("r"))), (5, arrived("a")))
    assert answers(said[1]) == [Grant("a", target("r"), 0, 0, E)]


def test_first_come_first_served_and_the_wait_is_told() -> None:
    _, said = play(
        (0, route(1, target("r"))), (1, arrived("a")), (2, arrived("b")), (3, arrived("c")), (10, Ended("a")),
        (20, Ended("b")),
    )  # fmt: skip
    assert answers(said[4]) == [Grant("b", target("r"), 8, 0, E)]
    assert answers(said[5]) == [Grant("c", target("r"), 17, 0, E)]


def test_activation_is_the_part_of_the_hold_without_a_replica() -> None:
    _, said = play((100, arrived("a")), (110, arrived("b")), (400, route(1, target("r"))), (450, Ended("a")))
    assert answers(said[2]) == [Grant("a", target("r"), 300, 300, E)]
    assert answers(said[3]) == [Grant("b", target("r"), 340, 290, E)]


def test_least_loaded_in_the_own_region_first() -> None:
    far, near, other = target("far", 9, "there"), target("near", 2), target("other", 2)
    _, said = play((0, route(1, far, near, other)), *[(1, arrived(x)) for x in "abcde"])
    assert [answers(s)[0].target.replica for s in said[1:]] == ["near", "other", "near", "other", "far"]  # type: ignore[union-attr]


def test_refused_when_the_queue_is_full_when_not_waiting_and_when_the_deadline_comes() -> None:
    dispatch, said = play(
        (0, route(1, target("r"))), (0, arrived("a")), (10, arrived("b", queued_max=1)),
        (10, arrived("c", queued_max=1)), (10, arrived("d", deadline_ms=10)), (999, Deadline()), (1_000, Deadline()),
    )  # fmt: skip
    full, none, early, late = answers(said[3])[0], answers(said[4])[0], said[5], answers(said[6])[0]
    assert isinstance(full, Refuse)
    assert isinstance(none, Refuse)
    assert isinstance(late, Refuse)
    assert (full.code, full.limit.kind, full.limit.current, full.limit.full) == ("queue_full", "queue", 1, 1)  # type: ignore[union-attr]
    assert (none.code, none.limit.current, none.limit.full) == ("capacity", 1, 1)  # type: ignore[union-attr]
    assert early == []
    assert (late.request, late.code, late.held_ms) == ("b", "hold_expired", 990)
    assert dispatch.held == 0


def test_retry_after_is_controls_estimate_or_from_how_long_requests_take() -> None:
    _, said = play((0, route(1, state=EndpointState.LOADING, eta_ms=7_000)), (1, arrived("a", 1)))
    assert answers(said[1])[0].retry_after_ms == 6_999, "what is left of it"  # type: ignore[union-attr]
    _, said = play(
        (0, route(1, target("r", 2))), (0, arrived("a")), (400, Ended("a")), (400, arrived("b")), (400, arrived("c")),
        (400, arrived("d")), (400, arrived("e", 400)),
    )  # fmt: skip
    assert answers(said[6])[0].retry_after_ms == 400, "one waits already, two slots, 400 ms each"  # type: ignore[union-attr]


def test_a_failed_or_paused_endpoint_refuses_what_waits_and_what_comes() -> None:
    for state, code in ((EndpointState.FAILED, "endpoint_failed"), (EndpointState.PAUSED, "endpoint_paused")):
        _, said = play((0, arrived("a")), (1, route(1, state=state, reason="bad weights")), (2, arrived("b")))
        for refusal in (answers(said[1])[0], answers(said[2])[0]):
            assert isinstance(refusal, Refuse)
            assert (refusal.code, refusal.reason) == (code, "bad weights")


def test_a_removed_endpoint_refuses_what_waits_and_forgets_itself() -> None:
    dispatch, said = play(
        (0, route(1, target("r"))), (0, arrived("a")), (0, arrived("b")), (1, EndpointRemoved(E)), (2, Ended("a"))
    )
    assert [(x.request, x.code) for x in answers(said[3]) if isinstance(x, Refuse)] == [("b", "model_not_found")]
    assert dispatch.endpoints() == ()


def test_older_routes_are_ignored_until_a_new_session() -> None:
    dispatch, said = play((0, route(5, target("r"))), (0, route(4)), (0, arrived("a")))
    assert answers(said[2])
    dispatch.handle(SessionStarted(), 1)
    dispatch.handle(route(1), 1)
    assert not answers(dispatch.handle(arrived("b"), 2))


def test_a_drained_replica_is_fenced_when_its_last_request_is_over() -> None:
    dispatch, said = play(
        (0, route(1, target("r", 2))),
        (0, arrived("a")),
        (1, Drain("r", "n", E, WHY)),
        (2, arrived("b")),
        (3, Ended("a")),
    )
    assert said[2] == []
    assert not answers(said[3])
    assert ConfirmFence("r") in said[4]
    back = dispatch.handle(route(2, target("r", 2)), 9)
    assert answers(back) == [Grant("b", target("r", 2), 7, 0, E)], "listed after the fence: it slept and is back"


def test_a_route_that_still_lists_it_does_not_undo_a_drain() -> None:
    _, said = play(
        (0, route(1, target("r", 2))), (0, arrived("a")), (1, Drain("r", "n", E, WHY)), (2, route(2, target("r", 2))),
        (3, arrived("b")),
    )  # fmt: skip
    assert not answers(said[4])


def test_an_unknown_replica_is_fenced_at_once_and_resume_calls_a_drain_off() -> None:
    _, said = play((0, Drain("ghost", "n", E, WHY)))
    assert said[0] == [ConfirmFence("ghost")]
    _, said = play(
        (0, route(1, target("r"))), (0, Drain("r", "n", E, WHY)), (1, arrived("a")), (2, Resume("r", "n", E, WHY))
    )
    assert said[1] == [ConfirmFence("r")]
    assert answers(said[3]) == [Grant("a", target("r"), 1, 0, E)]


def test_a_lost_engine_is_replaced_once_and_left_alone_for_a_while() -> None:
    dispatch, said = play((0, route(1, target("r1"), target("r2"))), (0, arrived("a")), (1, Returned("a", lost=True)))
    assert answers(said[2]) == [Grant("a", target("r2"), 1, 0, E)]
    assert [x.code for x in answers(dispatch.handle(Returned("a", lost=True), 2)) if isinstance(x, Refuse)] == [
        "engine_error"
    ]
    assert not answers(dispatch.handle(arrived("b", 5_000), 3)), "both are suspect"
    assert (dispatch.next_deadline_ms() or 9_999) <= 1_001
    assert answers(dispatch.handle(Deadline(), 1_001)) == [Grant("b", target("r1"), 998, 0, E)]


def test_a_request_preempted_by_a_drain_goes_back_however_often_and_blames_nobody() -> None:
    dispatch, _ = play((0, route(1, target("r0"))), (0, arrived("a", 9_000)))
    for turn in range(1, 6):
        now_ms = turn * 10
        dispatch.handle(Drain(f"r{turn - 1}", "n", E, WHY), now_ms)
        said = dispatch.handle(Returned("a", lost=True), now_ms + 1)
        assert not answers(said), "held, not refused"
        granted = dispatch.handle(route(turn + 1, target(f"r{turn}")), now_ms + 2)
        assert [g.target.replica for g in answers(granted) if isinstance(g, Grant)] == [f"r{turn}"]


def test_what_came_back_goes_before_what_waits() -> None:
    dispatch, _ = play((0, route(1, target("r"))), (0, arrived("a")), (0, arrived("b")), (1, Returned("a", lost=False)))
    said = dispatch.handle(route(2, target("new")), 2)
    assert [x.request for x in answers(said)] == ["a"]


def test_demand_is_told_once_until_it_is_read_and_urgently_when_nothing_is_there() -> None:
    dispatch, said = play((0, arrived("a")), (1, arrived("b")))
    assert said[0] == [ReportDemand(E, urgent=True)]
    assert said[1] == []
    demand = dispatch.demand(E, 50)
    assert (demand.queued, demand.in_flight, demand.arrivals_total, demand.oldest_wait_ms) == (2, 0, 2, 50)
    assert dispatch.handle(Ended("a"), 60) == [ReportDemand(E, urgent=False)]


def test_an_endpoint_that_becomes_idle_says_so_at_once_while_something_waits_elsewhere() -> None:
    """Its place may be what the other waits for: nobody waits the length of a gathering pause for that news."""
    dispatch, _ = play((0, route(1, target("r"))), (0, arrived("a")), (0, arrived("b")))
    assert dispatch.handle(Ended("b"), 5) == [], "it was said that something changed, and nothing waits"
    elsewhere = Arrived("c", "acme/other", 1_000, 100)
    assert dispatch.handle(elsewhere, 6) == [ReportDemand("acme/other", urgent=True)]
    assert dispatch.handle(Ended("a"), 9) == [ReportDemand(E, urgent=True)]


def test_while_batch_is_about_each_replica_that_begins_or_ends_to_work_is_told_at_once() -> None:
    """Batch may have to stand still beside it, and nobody should wait a gathering pause for that."""
    dispatch, _ = play((0, route(1, target("r", 2))))
    dispatch.demand(E, 0)
    dispatch.prompt = True
    assert dispatch.handle(arrived("a"), 1)[1:] == [ReportDemand(E, urgent=True)]
    assert dispatch.demand(E, 2).busy == ("r",)
    assert dispatch.handle(arrived("b"), 3)[1:] == [ReportDemand(E, urgent=False)], "it works already"
    assert dispatch.handle(Ended("a"), 4) == []
    assert dispatch.handle(Ended("b"), 5) == [ReportDemand(E, urgent=True)]
    assert dispatch.demand(E, 6).busy == ()


@given(st.integers(200, 400))
@settings(max_examples=3)
def test_deadlines_of_granted_requests_do_not_pile_up(count: int) -> None:
    dispatch, _ = play((0, route(1, target("r"))), (0, arrived("first", 10**9)))
    for number in range(count):
        dispatch.handle(arrived(f"x{number}", 10**9), number)
        dispatch.handle(Ended("first" if number == 0 else f"x{number - 1}"), number)
    assert len(dispatch._deadlines) <= 2 * (dispatch.held + 1) + 64


# --- laws -------------------------------------------------------------------------------------------------------------

REPLICAS = ["r1", "r2", "r3"]


@dataclass
class Seen:
    """What a watcher from outside knows of one request."""

    deadline_ms: int
    order: int
    came_back: bool = False
    replica: str | None = None


@dataclass
class World:
    waiting: dict[str, Seen] = field(default_factory=dict)
    running: dict[str, Seen] = field(default_factory=dict)


class Room(RuleBasedStateMachine):
    """Drives one endpoint at random and checks every effect against the laws."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatch = Dispatch("here")
        self.now_ms = 0
        self.version = 0
        self.count = 0
        self.listed: dict[str, int] = {}
        self.draining: set[str] = set()
        self.fenced: set[str] = set()
        self.world = World()

    def tell(self, event: Event) -> None:
        for effect in self.dispatch.handle(event, self.now_ms):
            match effect:
                case Grant():
                    self.granted(effect)
                case Refuse():
                    ended = self.world.waiting.pop(effect.request, None) or self.world.running.pop(effect.request, None)
                    assert ended is not None, "a request ends once"
                case ConfirmFence():
                    assert effect.replica in self.draining
                    assert self.load(effect.replica) == 0, "a fence with something in flight"
                    self.fenced.add(effect.replica)

    def granted(self, grant: Grant) -> None:
        seen = self.world.waiting.pop(grant.request)
        replica = grant.target.replica
        assert replica not in self.draining, "a grant to a draining replica"
        assert replica in self.listed, "a grant to a replica that is not in the route"
        assert self.load(replica) < self.listed[replica], "more than its slots"
        earlier = [other for other in self.world.waiting.values() if other.order < seen.order]
        assert seen.came_back or not earlier, "not first come, first served"
        seen.replica = replica
        self.world.running[grant.request] = seen

    def load(self, replica: str) -> int:
        return sum(1 for seen in self.world.running.values() if seen.replica == replica)

    @rule(wait_ms=st.integers(0, 500))
    def arrive(self, wait_ms: int) -> None:
        self.count += 1
        request = f"q{self.count}"
        self.world.waiting[request] = Seen(self.now_ms + wait_ms, self.count)
        self.tell(Arrived(request, E, self.now_ms + wait_ms, 5))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.world.running)))
        del self.world.running[request]
        self.tell(Ended(request))

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.world.waiting)))
        del self.world.waiting[request]
        self.tell(Ended(request))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), lost=st.booleans())
    def come_back(self, data: st.DataObject, lost: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.world.running)))
        seen = self.world.running.pop(request)
        seen.came_back, seen.replica = True, None
        self.world.waiting[request] = seen
        self.tell(Returned(request, lost))

    @rule(slots=st.dictionaries(st.sampled_from(REPLICAS), st.integers(1, 3)))
    def reroute(self, slots: dict[str, int]) -> None:
        self.version += 1
        # As control does: what is draining is not listed until its fence has come.
        self.listed = {r: n for r, n in slots.items() if r not in self.draining or r in self.fenced}
        for replica in self.listed:
            self.draining.discard(replica)
            self.fenced.discard(replica)
        targets = [target(r, n) for r, n in self.listed.items()]
        self.tell(route(self.version, *targets, state=EndpointState.READY if targets else EndpointState.ASLEEP))

    @rule(replica=st.sampled_from(REPLICAS))
    def drain(self, replica: str) -> None:
        self.draining.add(replica)
        self.fenced.discard(replica)
        self.tell(Drain(replica, "n", E, WHY))

    @precondition(lambda self: self.draining)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(sorted(self.draining)))
        self.draining.discard(replica)
        self.fenced.discard(replica)
        self.tell(Resume(replica, "n", E, WHY))

    @rule(ms=st.integers(1, 1_500))
    def pass_time(self, ms: int) -> None:
        self.now_ms += ms
        self.tell(Deadline())
        assert all(seen.deadline_ms > self.now_ms for seen in self.world.waiting.values()), "held beyond its deadline"

    @invariant()
    def counts_agree(self) -> None:
        assert self.dispatch.held == len(self.world.waiting) == self.dispatch.held_at(E)
        assert self.dispatch.in_flight == len(self.world.running) == self.dispatch.in_flight_at(E)

    @invariant()
    def a_fence_comes_as_soon_as_it_can(self) -> None:
        for replica in self.draining:
            assert replica in self.fenced or self.load(replica) > 0

    @invariant()
    def something_is_due_while_something_waits(self) -> None:
        due = self.dispatch.next_deadline_ms()
        if self.world.waiting:
            assert due is not None
            assert due <= min(seen.deadline_ms for seen in self.world.waiting.values())


TestRoom = Room.TestCase
TestRoom.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
