"""Overflow, fallback and the circuit breaker: who is served where, and why."""

from tests.dispatch.test_room import answers, target
from tidegate.dispatch import Arrived, Deadline, Dispatch, Effect, Elsewhere, Ended, Grant, Refuse, Returned
from tidegate.dispatch.elsewhere import FAILURES_MAX, OPEN_MS, TTFT_STALE_MS, Breaker
from tidegate.domain.endpoint import EndpointState, Overflow
from tidegate.domain.plan import EndpointRemoved, Route, Target

BASE, POOL = "acme/base", "acme/pool"


class Room:
    """A base and the endpoint its requests may go to; `said` is the answer to the last event, if there was one."""

    def __init__(self, elsewhere: Elsewhere | None, base: int = 1, pool: int = 1) -> None:
        self.dispatch, self.elsewhere, self.version = Dispatch("here"), elsewhere, 0
        if base:
            self.route(BASE, target("b", base))
        if pool:
            self.route(POOL, target("p", pool))

    def route(self, endpoint: str, *targets: Target, now_ms: int = 0, state: str = "ready") -> list[Grant | Refuse]:
        self.version += 1
        route = Route(endpoint, self.version, EndpointState(state), targets)
        return answers(self.dispatch.handle(route, now_ms))

    def arrive(self, request: str, now_ms: int = 0, *, wait_ms: int = 1_000, queued_max: int = 100) -> str:
        arrived = Arrived(request, BASE, now_ms + wait_ms, queued_max, elsewhere=self.elsewhere)
        return told(self.dispatch.handle(arrived, now_ms))


def told(effects: list[Effect]) -> str:
    """``replica`` or ``replica:reason`` or ``!code`` of each answer."""
    said = []
    for answer in answers(effects):
        match answer:
            case Grant():
                said.append(f"{answer.target.replica}:{answer.reason}" if answer.reason else answer.target.replica)
            case Refuse():
                said.append(f"!{answer.code}")
    return " ".join(said)


def over(**threshold: int) -> Elsewhere:
    return Elsewhere(Overflow(POOL, **threshold), POOL)


def test_above_the_concurrency_threshold_and_only_then() -> None:
    room = Room(over(above_concurrency=2), base=4, pool=4)
    assert [room.arrive(x) for x in "abcd"] == ["b", "b", "p:concurrency", "p:concurrency"]
    room.dispatch.handle(Ended("a"), 1)
    assert room.arrive("e", 1) == "b"
    assert (room.dispatch.in_flight_at(BASE), room.dispatch.in_flight_at(POOL)) == (2, 2)


def test_what_is_held_too_long_goes_and_what_is_not_stays() -> None:
    room = Room(over(above_queue_ms=300))
    assert [room.arrive(x) for x in "ab"] == ["b", ""]
    assert room.dispatch.next_deadline_ms() == 300
    assert told(room.dispatch.handle(Deadline(), 299)) == ""
    assert told(room.dispatch.handle(Deadline(), 300)) == "p:queue_ms"
    room = Room(over(above_queue_ms=300))
    assert [room.arrive(x) for x in "ab"] == ["b", ""]
    assert told(room.dispatch.handle(Ended("a"), 200)) == "b"


def test_an_estimate_above_the_queue_threshold_goes_at_once() -> None:
    room = Room(over(above_queue_ms=300))
    room.arrive("a")
    room.dispatch.handle(Ended("a", 10), 1_000)
    assert [room.arrive(x, 1_000) for x in "bc"] == ["b", "p:queue_ms"], "requests take a second here"


def test_a_slow_first_token_goes_elsewhere_until_the_news_is_stale() -> None:
    room = Room(over(above_ttft_ms=100), base=4, pool=4)
    assert room.arrive("a") == "b"
    room.dispatch.handle(Ended("a", first_byte_ms=500), 600)
    assert room.arrive("b", 601) == "p:ttft_ms"
    assert room.arrive("c", 601 + TTFT_STALE_MS) == "b", "nobody knows any more: asked again"


def test_nobody_goes_where_there_is_no_place() -> None:
    room = Room(over(above_concurrency=1), pool=0)
    room.route(POOL, state="failed")
    assert [room.arrive(x) for x in "ab"] == ["b", ""]
    room = Room(over(above_concurrency=1))
    assert [room.arrive(x, queued_max=1) for x in "abcd"] == ["b", "p:concurrency", "", ""]
    assert (room.dispatch.held_at(POOL), room.dispatch.held_at(BASE)) == (1, 1), "its queue is full: held at home"


def test_an_endpoint_that_must_have_a_replica_and_has_none_falls_back() -> None:
    room = Room(Elsewhere(None, POOL, resident=True), base=0)
    assert room.arrive("early") == "", "control has not said anything yet"
    assert told(room.dispatch.handle(Route(BASE, 9, EndpointState.LOADING, ()), 1)) == "p:no_replica"
    room.dispatch.handle(Ended("early"), 2)
    assert room.arrive("a", 3) == "p:no_replica"
    asleep = Room(Elsewhere(None, POOL), base=0)
    asleep.route(BASE, state="asleep")
    assert asleep.arrive("a") == "", "one that sleeps is woken"


def test_a_failed_endpoint_and_a_dead_engine_fall_back_and_a_paused_one_does_not() -> None:
    room = Room(Elsewhere(None, POOL), base=0, pool=2)
    room.route(BASE, state="failed")
    assert room.arrive("a") == "p:endpoint_failed"
    room.route(BASE, state="paused")
    assert room.arrive("b") == "!endpoint_paused"
    room = Room(Elsewhere(None, POOL), base=0)
    room.route(BASE, target("b1"), target("b2"))
    assert room.arrive("a") == "b1"
    assert told(room.dispatch.handle(Returned("a", lost=True), 1)) == "b2"
    assert told(room.dispatch.handle(Returned("a", lost=True), 2)) == "p:engine_error"


def test_not_served_elsewhere_it_comes_home_and_ends_once() -> None:
    room = Room(over(above_concurrency=1))
    assert [room.arrive(x) for x in "ab"] == ["b", "p:concurrency"]
    assert told(room.dispatch.handle(Returned("b", lost=False), 5)) == "", "back in the queue of the base"
    assert room.dispatch.held_at(BASE) == 1
    assert told(room.dispatch.handle(Ended("a"), 9)) == "b"
    assert told(room.dispatch.handle(Returned("b", lost=True), 9)) == "", "and there it has its second attempt"
    assert told(room.dispatch.handle(Deadline(), 1_010)) == "!hold_expired", "it was held its whole time"


def test_a_removed_target_sends_what_waits_there_home() -> None:
    room = Room(over(above_concurrency=1))
    assert [room.arrive(x) for x in "abc"] == ["b", "p:concurrency", ""]
    assert told(room.dispatch.handle(EndpointRemoved(POOL), 1)) == ""
    assert (room.dispatch.held_at(POOL), room.dispatch.held_at(BASE)) == (0, 1)
    assert told(room.dispatch.handle(EndpointRemoved(BASE), 1)) == "!model_not_found"


def test_at_its_deadline_a_request_takes_a_free_slot_of_its_fallback_or_is_refused() -> None:
    room = Room(Elsewhere(None, POOL))
    assert [room.arrive(x) for x in "abc"] == ["b", "", ""]
    assert told(room.dispatch.handle(Deadline(), 1_000)) == "p:hold_expired !hold_expired"


def test_the_breaker_opens_half_opens_and_closes() -> None:
    breaker = Breaker()
    for now_ms in range(FAILURES_MAX):
        assert breaker.allows(now_ms)
        breaker.failed(now_ms)
    opened = FAILURES_MAX - 1
    assert not breaker.allows(opened + OPEN_MS - 1)
    assert breaker.allows(opened + OPEN_MS), "one tries"
    assert not breaker.allows(opened + OPEN_MS), "and the others wait for it"
    breaker.failed(opened + OPEN_MS + 1)
    assert not breaker.allows(opened + OPEN_MS + 2)
    assert breaker.allows(opened + 2 * OPEN_MS + 1)
    breaker.worked()
    assert breaker.allows(opened + 2 * OPEN_MS + 2)


def test_a_target_that_keeps_failing_is_left_alone() -> None:
    room = Room(over(above_concurrency=1), base=1, pool=100)
    room.arrive("first", wait_ms=10**6)
    now_ms, went = 0, 0
    for number in range(3 * FAILURES_MAX):
        now_ms += 2_000  # beyond the time a replica is suspect, so only the breaker stops it
        request = f"q{number}"
        if room.arrive(request, now_ms, wait_ms=10**6):
            went += 1
            room.dispatch.handle(Returned(request, lost=False), now_ms)
    assert went < 2 * FAILURES_MAX
    assert room.dispatch.held_at(BASE) == 3 * FAILURES_MAX, "none was lost"


def test_an_endpoint_whose_engine_keeps_dying_is_left_alone_while_its_fallback_serves() -> None:
    room = Room(Elsewhere(None, POOL), base=100, pool=100)
    now_ms, said = 0, []
    for number in range(2 * FAILURES_MAX):
        now_ms += 2_000
        request = f"q{number}"
        said.append(room.arrive(request, now_ms, wait_ms=0))
        if said[-1] == "b":
            said[-1] += " then " + told(room.dispatch.handle(Returned(request, lost=True), now_ms))
    assert said[:FAILURES_MAX] == ["b then p:engine_error"] * FAILURES_MAX
    assert said[FAILURES_MAX] == "p:breaker_open"
