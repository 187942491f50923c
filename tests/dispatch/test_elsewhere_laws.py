"""Whatever happens to two endpoints that help each other's requests: each ends once, none is in two places or lost."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.dispatch.test_room import WHY, target
from tidegate.dispatch import Arrived, Deadline, Dispatch, Elsewhere, Ended, Event, Grant, Refuse, Returned
from tidegate.domain.endpoint import EndpointState, Overflow
from tidegate.domain.plan import Drain, EndpointRemoved, Route

BASE, POOL = "acme/base", "acme/pool"
ALLOWED = [
    Elsewhere(Overflow(POOL, above_concurrency=1), POOL),
    Elsewhere(Overflow(POOL, above_queue_ms=50), POOL, resident=True),
    Elsewhere(Overflow(POOL, above_ttft_ms=40)),
    Elsewhere(None, POOL, resident=True),
    None,
]


class Rooms(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.dispatch = Dispatch("here")
        self.now_ms = 0
        self.version = 0
        self.count = 0
        self.waiting: dict[str, int] = {}  # request -> deadline
        self.running: dict[str, Grant] = {}
        self.moves: dict[str, int] = {}
        self.draining: set[str] = set()
        for endpoint in (BASE, POOL):
            self.reroute(endpoint, 1, EndpointState.READY)

    def tell(self, event: Event) -> None:
        for effect in self.dispatch.handle(event, self.now_ms):
            match effect:
                case Grant():
                    assert effect.request in self.waiting, "granted once"
                    assert effect.target.replica not in self.draining
                    assert effect.endpoint == (POOL if effect.reason else BASE)
                    del self.waiting[effect.request]
                    self.running[effect.request] = effect
                    self.moves[effect.request] += bool(effect.reason)
                    assert self.moves[effect.request] <= 1, "it goes elsewhere once"
                case Refuse():
                    assert self.waiting.pop(effect.request, None) is not None, "a request ends once"

    @rule(wait_ms=st.integers(0, 400), allowed=st.sampled_from(ALLOWED), tenant=st.sampled_from("xyz"))
    def arrive(self, wait_ms: int, allowed: Elsewhere | None, tenant: str) -> None:
        self.count += 1
        request = f"q{self.count}"
        self.waiting[request], self.moves[request] = self.now_ms + wait_ms, 0
        self.tell(Arrived(request, BASE, self.now_ms + wait_ms, 4, tenant, 10, allowed))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), served=st.booleans())
    def finish(self, data: st.DataObject, served: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[request]
        self.tell(Ended(request, self.now_ms if served else 0, 50))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[request]
        self.tell(Ended(request))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), lost=st.booleans())
    def come_back(self, data: st.DataObject, lost: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[request]
        self.waiting[request] = 0
        self.tell(Returned(request, lost))

    @rule(
        endpoint=st.sampled_from([BASE, POOL]), count=st.integers(0, 2),
        state=st.sampled_from([EndpointState.ASLEEP, EndpointState.FAILED, EndpointState.PAUSED]),
    )  # fmt: skip
    def reroute(self, endpoint: str, count: int, state: EndpointState) -> None:
        self.version += 1
        targets = tuple(target(f"{endpoint}-{number}", 1) for number in range(count))
        names = {t.replica for t in targets} & self.draining
        targets = tuple(t for t in targets if t.replica not in names)
        self.tell(Route(endpoint, self.version, EndpointState.READY if targets else state, targets))

    @rule(endpoint=st.sampled_from([BASE, POOL]))
    def drain(self, endpoint: str) -> None:
        self.draining.add(f"{endpoint}-0")
        self.tell(Drain(f"{endpoint}-0", "n", endpoint, WHY))

    @rule()
    def remove_the_pool(self) -> None:
        self.tell(EndpointRemoved(POOL))

    @rule(ms=st.integers(1, 3_000))
    def pass_time(self, ms: int) -> None:
        self.now_ms += ms
        self.tell(Deadline())
        late = [request for request, deadline_ms in self.waiting.items() if 0 < deadline_ms <= self.now_ms]
        assert not late, "held beyond its deadline"

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert self.dispatch.held == len(self.waiting) == sum(self.dispatch.held_at(e) for e in (BASE, POOL))
        assert self.dispatch.in_flight == len(self.running)


TestRooms = Rooms.TestCase
TestRooms.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
