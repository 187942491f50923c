"""Fair turns between tenants: the stated bounds, whatever tenants ask for in whatever order."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tests.dispatch.test_room import answers, route, target
from tidegate.dispatch import Arrived, Dispatch, Ended, Grant, Refuse, served_tokens
from tidegate.dispatch.queue import COUNTERS_MAX, FairQueue
from tidegate.domain.plan import Route

E = "house/common"


@dataclass
class Waits:
    id: str
    tenant: str
    arrived_ms: int = 0
    tokens: int = 1
    charged: int = 0
    late_ms: int = 0


def room(slots: int) -> Dispatch:
    dispatch = Dispatch("here")
    ready = route(1, target("r", slots))
    dispatch.handle(Route(E, 1, ready.state, ready.targets), 0)
    return dispatch


@dataclass
class Served:
    """Grants in order, and tokens by tenant of what is over."""

    dispatch: Dispatch
    running: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def arrive(self, request: str, tenant: str, now_ms: int, queued_max: int = 10_000) -> list[Refuse]:
        said = answers(self.dispatch.handle(Arrived(request, E, 10**9, queued_max, tenant, 10), now_ms))
        return self._note(said)

    def finish(self, now_ms: int, tokens: int) -> str:
        request = self.running.pop(0)
        self._note(answers(self.dispatch.handle(Ended(request, now_ms, tokens), now_ms)))
        return request

    def _note(self, said: list[Grant | Refuse]) -> list[Refuse]:
        for answer in said:
            if isinstance(answer, Grant):
                self.running.append(answer.request)
                self.order.append(answer.request)
        return [answer for answer in said if isinstance(answer, Refuse)]


@given(st.integers(1, 4), st.integers(5, 200), st.integers(1, 9))
def test_a_flood_moves_the_others_by_one_freed_slot(slots: int, flood: int, others: int) -> None:
    served = Served(room(slots))
    for number in range(flood + slots):
        served.arrive(f"flood-{number}", "flood", 0)
    for _ in range(3):  # its counter is ahead of everybody's now
        served.finish(1, 500)
    for number in range(others):
        served.arrive(f"calm-{number}", f"calm{number}", 2)
    before = len(served.order)
    for _ in range(others):
        served.finish(3, 500)
    assert served.order[before:] == [f"calm-{n}" for n in range(others)], "in the order they came, before all of it"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400)), min_size=30, max_size=120), st.integers(1, 4))
def test_tenants_that_wait_all_the_while_are_served_alike(sizes: list[tuple[int, int]], slots: int) -> None:
    """Each tenant's requests are of another size; `S × L` bounds how far apart they get."""
    served, largest = Served(room(slots)), max(size for _, size in sizes)
    cost = {f"q{number}": (f"t{tenant}", max(size, 10)) for number, (tenant, size) in enumerate(sizes)}
    left = {tenant: sum(t == tenant for t, _ in cost.values()) for tenant in ("t0", "t1", "t2")}
    for request, (tenant, _) in cost.items():
        served.arrive(request, tenant, 0)
    direct = set(served.running)  # granted before anybody waited
    got = dict.fromkeys(left, 0)
    while served.running:
        request = served.finish(1, cost[served.running[0]][1])
        tenant, size = cost[request]
        left[tenant] -= 1
        got[tenant] += size
        waiting = [t for t, count in left.items() if count > sum(cost[r][0] == t for r in served.running)]
        if len(waiting) == len(left):
            # `direct` ones of a tenant count too: S more of the largest size.
            spread = max(got.values()) - min(got.values())
            assert spread <= (2 * slots + 1) * max(largest, 10), (got, slots, largest, direct)


def test_idling_earns_no_credit() -> None:
    queue: FairQueue[Waits] = FairQueue()
    for number in range(6):
        queue.push(Waits(f"a{number}", "a", tokens=100), first=False)
    for _ in range(3):
        queue.pop(0)
    for number in range(3):
        queue.push(Waits(f"b{number}", "b", 1, tokens=100), first=False)
    assert [queue.pop(0).id for _ in range(6)] == ["b0", "a3", "b1", "a4", "b2", "a5"]
    assert not queue


def test_a_full_queue_makes_room_for_who_has_the_fewest_in_it() -> None:
    served = Served(room(1))
    for number in range(5):
        assert not served.arrive(f"flood-{number}", "flood", 0, queued_max=4)
    pushed = served.arrive("calm-0", "calm", 0, queued_max=4)
    assert [(refusal.request, refusal.code) for refusal in pushed] == [("flood-4", "queue_full")]
    assert [r.request for r in served.arrive("flood-5", "flood", 0, queued_max=4)] == ["flood-5"]
    assert served.dispatch.held_at(E) == 4


def test_counters_do_not_pile_up() -> None:
    queue: FairQueue[Waits] = FairQueue()
    queue.push(Waits("keeps it busy", "zz", tokens=10**9), first=False)
    for number in range(5 * COUNTERS_MAX):
        queue.push(Waits(f"q{number}", f"t{number}", number, tokens=1 + number), first=False)
        queue.pop(0)
    assert len(queue._served) <= COUNTERS_MAX


def test_what_a_request_counts_for() -> None:
    assert served_tokens(100, 10) == 120


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=1, max_size=30), st.integers(0, 90))
def test_who_can_be_served_in_time_comes_before_who_no_longer_can(waits: list[tuple[int, int]], now_ms: int) -> None:
    queue: FairQueue[Waits] = FairQueue()
    for number, (arrived_ms, patience_ms) in enumerate(sorted(waits)):
        late_ms = arrived_ms + patience_ms
        queue.push(Waits(f"q{number}", "a", arrived_ms, late_ms=late_ms), first=False)
    assert queue.oldest_ms() == min(arrived_ms for arrived_ms, _ in waits)
    popped = [queue.pop(now_ms) for _ in waits]
    in_time = [request for request in popped if request.late_ms > now_ms]
    late = [request for request in popped if request.late_ms <= now_ms]
    assert [r.id for r in late] == sorted((r.id for r in late), key=lambda name: int(name[1:])), "oldest first"
    if len({patience_ms for _, patience_ms in waits}) == 1:  # as an endpoint's are: it has one SLO
        assert popped == in_time + late
    assert len(queue) == 0


def test_an_overload_that_does_not_end_leaves_few_very_late_and_not_everybody_late() -> None:
    """One slot, a request a second, two seconds each, in time within five: half can be served in time, and are."""
    dispatch, kept, running = room(1), 0, ""
    arrived: dict[str, int] = {}
    for second in range(200):
        now_ms = second * 1_000
        name = f"q{second}"
        arrived[name] = now_ms
        request = Arrived(name, E, now_ms + 60_000, 10_000, "a", 10, late_ms=now_ms + 5_000)
        said = list(answers(dispatch.handle(request, now_ms)))
        if running and second % 2 == 0:
            said += answers(dispatch.handle(Ended(running, now_ms, 10), now_ms))
        for answer in said:
            if isinstance(answer, Grant):
                running = answer.request
                kept += now_ms < arrived[running] + 5_000
    assert kept >= 95
