"""Accelerator time: what each state got, worked out by hand; and the law that nothing of it is lost or made up."""

from dataclasses import replace
from random import Random

import pytest

from tests.money import HOUR_MS, NOVEMBER_MS
from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.ledger import TimeCell, TimeState
from tidegate.domain.replica import ReplicaState as S
from tidegate.money.accelerator_time import BRIDGE_MS_MAX, AcceleratorTime

T0 = NOVEMBER_MS
MODEL = ModelProfile("m", "digest", ModelKind.GENERATIVE, 50, 1, 100)
A, B, C = (
    Deployment(f"acme/{name}", "acme", MODEL, mode, accelerator_bytes=nbytes)
    for name, mode, nbytes in (
        ("a", Mode.DEDICATED_SERVERLESS, 60), ("b", Mode.DEDICATED, 70), ("c", Mode.SERVERLESS, 20),
    )
)  # fmt: skip
NODE = Node("n1", "local", (Accelerator("gpu-0", "h200", 100),), 1_000, 1_000)


def told(replica: str, wanted: Deployment, state: S, since_ms: int = 0) -> plan.ReplicaStatus:
    return plan.ReplicaStatus(replica, wanted.endpoint, "n1", 1, state, ("gpu-0",), since_ms=since_ms)


class Story:
    """A sheet, and a ledger that adds up the pages it is given."""

    def __init__(self, started_ms: int = T0, marks: dict[str, int] | None = None) -> None:
        self.sheet = AcceleratorTime(started_ms, marks)
        self.cells: list[TimeCell] = []
        for wanted in (A, B, C):
            self.at(started_ms, plan.EndpointApplied(wanted))

    def at(self, at_ms: int, *events: plan.Event) -> None:
        for event in events:
            self.sheet.event(event, at_ms)

    def replica(self, at_ms: int, name: str, wanted: Deployment, *states: S) -> None:
        for state in states:
            self.at(at_ms, plan.ReplicaChanged(told(name, wanted, state)))

    def demand(self, at_ms: int, wanted: Deployment, *busy: str, gateway: str = "g1") -> None:
        self.at(at_ms, plan.DemandReported(gateway, wanted.endpoint, 0, len(busy), 1, busy=busy))

    def post(self, at_ms: int) -> int:
        """Returns the instant before which nothing is to come."""
        report = self.sheet.report(at_ms, checkpoint_ms=0)
        for page in report.pages:
            self.cells += page.cells
            self.sheet.confirm(page)
        return report.settled_ms

    def seconds(self, *, held: bool = False) -> dict[tuple[str, ...], float]:
        """(endpoint, state[, lender]) → seconds."""
        sums: dict[tuple[str, ...], float] = {}
        for cell in self.cells:
            key = (cell.endpoint, cell.state.value, *([cell.lender] if cell.lender else []))
            sums[key] = sums.get(key, 0) + (cell.held_us if held else cell.share_us) / 1e6
        return {key: seconds for key, seconds in sums.items() if seconds}


def test_each_state_gets_its_share_of_the_accelerator() -> None:
    story = Story()
    story.at(T0, plan.NodeJoined(NODE))
    story.replica(T0 + 1_000, "a1", A, S.STARTING)
    story.replica(T0 + 3_000, "a1", A, S.READY)
    story.demand(T0 + 5_000, A, "a1")
    story.demand(T0 + 6_000, A, "a1", gateway="g2")
    story.demand(T0 + 8_000, A)
    story.at(T0 + 9_000, plan.GatewayLost("g2"))
    story.replica(T0 + 12_000, "a1", A, S.DRAINING, S.SLEEPING)
    story.replica(T0 + 13_000, "a1", A, S.ASLEEP)
    story.post(T0 + 23_000)
    assert story.seconds() == {
        ("", "free"): 1 + 12 * 0.4 + 10,
        ("acme/a", "activating"): 2 * 0.6,
        ("acme/a", "idle"): pytest.approx((2 + 3) * 0.6),
        ("acme/a", "busy"): pytest.approx(4 * 0.6),
        ("acme/a", "draining"): 0.6,
    }
    assert story.seconds(held=True) == {
        ("acme/a", "activating"): 2, ("acme/a", "idle"): 5, ("acme/a", "busy"): 4, ("acme/a", "draining"): 1,
        ("acme/a", "asleep"): 10,
    }  # fmt: skip


def test_lent_time_is_what_is_not_free_of_the_room_an_absent_owner_had() -> None:
    story = Story()
    story.at(T0, plan.NodeJoined(NODE))
    story.replica(T0, "a1", A, S.READY)
    story.replica(T0 + 1_000, "a1", A, S.ASLEEP)  # nobody else is there: its room is free, nothing is lent
    story.replica(T0 + 3_000, "b1", B, S.READY)  # 30 free of the 60 it needs: 30 of 100 lent
    assert story.sheet.lent_seconds(T0 + 13_000) == {"acme/a": pytest.approx(3.0)}
    story.replica(T0 + 13_000, "b1", B, S.ASLEEP)  # both away and all free: nobody borrows
    assert story.sheet.lent_seconds(T0 + 23_000) == {"acme/a": pytest.approx(3.0)}
    story.replica(T0 + 23_000, "c1", C, S.READY)  # 130 owned, 80 free, but only 20 are used: shared by size
    lent = {"acme/a": pytest.approx(3 + 2 * 60 / 130), "acme/b": pytest.approx(2 * 70 / 130)}
    assert story.sheet.lent_seconds(T0 + 33_000) == lent
    story.at(T0 + 33_000, plan.EndpointRemoved(B.endpoint))  # 60 owned, 80 free
    assert story.sheet.lent_seconds(T0 + 99_000) == lent
    story.post(T0 + 99_000)
    found = story.seconds()
    assert found["acme/b", "idle", "acme/a"] == pytest.approx(3.0), "who borrowed, and from whom"
    assert found["acme/c", "idle", "acme/b"] == pytest.approx(2 * 70 / 130)
    assert story.seconds(held=True)["acme/b", "idle"] == 10


def test_the_mode_and_the_hour_of_each_stretch_are_kept() -> None:
    story = Story(T0 + HOUR_MS - 2_000)
    story.at(T0 + HOUR_MS - 2_000, plan.NodeJoined(NODE))
    story.replica(T0 + HOUR_MS - 2_000, "a1", A, S.READY)
    story.at(T0 + HOUR_MS + 1_000, plan.EndpointApplied(replace(A, mode=Mode.DEDICATED)))
    story.post(T0 + HOUR_MS + 5_000)
    held = [(cell.hour_ms - T0, cell.mode, cell.kind, cell.held_us) for cell in story.cells if cell.held_us]
    assert sorted(held) == [
        (0, "dedicated_serverless", "h200", 2_000_000),
        (HOUR_MS, "dedicated", "h200", 4_000_000),
        (HOUR_MS, "dedicated_serverless", "h200", 1_000_000),
    ]


def test_a_short_silence_is_bridged_by_what_the_node_says_since_when() -> None:
    story = Story()
    story.at(T0, plan.NodeJoined(NODE))
    story.replica(T0, "b1", B, S.READY)
    story.at(T0 + 10_000, plan.NodeLost("n1"))
    assert story.post(T0 + 20_000) == T0 + 10_000, "the time since then may still be told"
    statuses = (told("b1", B, S.READY, T0), told("c1", C, S.READY, T0 + 25_000))
    story.at(T0 + 30_000, plan.NodeJoined(NODE, statuses))
    assert story.post(T0 + 40_000) == T0 + 40_000
    held = story.seconds(held=True)
    assert (held["acme/b", "idle"], held["acme/c", "idle"]) == (40, 15)
    assert story.seconds()["", "unreported"] == pytest.approx(15 * 0.3 + 5 * 0.1)
    assert sum(story.seconds().values()) == pytest.approx(40)


def test_a_long_silence_is_nobodys_time() -> None:
    story = Story()
    story.at(T0, plan.NodeJoined(NODE))
    story.replica(T0, "b1", B, S.READY)
    story.at(T0 + 10_000, plan.NodeLost("n1"))
    back_ms = T0 + 10_000 + BRIDGE_MS_MAX + 1
    assert story.post(back_ms) == back_ms, "nobody waits for it any more"
    story.at(back_ms, plan.NodeJoined(NODE, (told("b1", B, S.READY, T0),)))
    story.post(back_ms + 5_000)
    assert story.seconds(held=True)["acme/b", "idle"] == 15
    assert story.seconds()["", "unreported"] == pytest.approx((BRIDGE_MS_MAX + 1) / 1_000)


def test_an_outage_of_ours_however_long_is_bridged_too() -> None:
    before = Story()
    before.at(T0, plan.NodeJoined(NODE))
    before.replica(T0, "b1", B, S.READY)
    before.post(T0 + 10_000)
    restart_ms = T0 + 5 * HOUR_MS
    after = Story(restart_ms, {"n1": T0 + 10_000})
    assert after.post(restart_ms + 1_000) == T0 + 10_000
    after.at(restart_ms + 2_000, plan.NodeJoined(NODE, (told("b1", B, S.READY, T0),)))
    assert after.post(restart_ms + 3_000) == restart_ms + 3_000
    before.cells += after.cells
    assert before.seconds(held=True) == {("acme/b", "idle"): 5 * 3_600 + 3}


def test_a_node_that_restarted_with_us_pays_nothing_for_the_gap() -> None:
    after = Story(T0 + 50_000, {"n1": T0})
    after.at(T0 + 51_000, plan.NodeJoined(NODE))
    after.post(T0 + 52_000)
    assert after.seconds() == {("", "unreported"): 51, ("", "free"): 1}


def test_a_clock_set_back_counts_no_second_twice() -> None:
    story = Story()
    story.at(T0 + 10_000, plan.NodeJoined(NODE))
    story.replica(T0 + 10_000, "b1", B, S.READY)
    story.replica(T0 + 4_000, "b1", B, S.DRAINING, S.READY)
    story.post(T0 + 20_000)
    assert sum(story.seconds().values()) == pytest.approx(10)
    after = Story(T0, {"n1": T0 + 20_000})
    after.at(T0, plan.NodeJoined(NODE, (told("b1", B, S.READY, T0),)))
    after.post(T0 + 15_000)
    after.post(T0 + 21_000)
    assert sum(after.seconds().values()) == pytest.approx(1)


def test_a_page_is_offered_until_it_is_confirmed() -> None:
    story = Story()
    story.at(T0, plan.NodeJoined(NODE))
    (page,) = story.sheet.report(T0 + 10_000).pages
    assert story.sheet.report(T0 + 30_000).pages == (page,)
    story.sheet.confirm(page)
    (following,) = story.sheet.report(T0 + 40_000).pages
    assert (page.until_ms, following.start_ms, following.until_ms) == (T0 + 10_000, T0 + 10_000, T0 + 40_000)
    assert page.cells[0].state is TimeState.FREE


def test_a_replica_is_busy_while_a_request_is_on_it_not_while_one_is_on_another() -> None:
    story = Story()
    story.at(T0, plan.NodeJoined(NODE))
    story.replica(T0, "c1", C, S.READY)
    story.replica(T0, "c2", C, S.READY)
    story.demand(T0 + 1_000, C, "c1")
    story.demand(T0 + 2_000, C, "c1", "c2")
    story.demand(T0 + 4_000, C, "c2")
    story.demand(T0 + 4_000, C, "c1", gateway="g2")
    story.at(T0 + 5_000, plan.GatewayLost("g2"))
    story.post(T0 + 6_000)
    assert story.seconds(held=True) == {("acme/c", "idle"): 1 + 2 + 1, ("acme/c", "busy"): 4 + 4}


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_the_shares_of_an_accelerator_sum_to_wall_time(seed: int) -> None:
    """Random lives of replicas on three accelerators of two nodes, restarts of control, lost nodes, clocks set back."""
    dice = Random(seed)
    nodes = [Node("n1", "local", (Accelerator("g0", "x", 100), Accelerator("g1", "x", 101)), 1, 1),
             Node("n2", "local", (Accelerator("g0", "y", 7),), 1, 1)]  # fmt: skip
    now_ms, story = T0, Story()
    cells, first_ms, present = [], {}, {}
    for _ in range(150):
        now_ms += dice.choice([0, 1, 7, 900, 12_345, -500, HOUR_MS // 3])
        node = dice.choice(nodes)
        alive = present.setdefault(node.id, {})
        match dice.randrange(8):
            case 0:
                first_ms.setdefault(node.id, story.sheet._now_ms if now_ms < story.sheet._now_ms else now_ms)
                story.at(now_ms, plan.NodeJoined(node, tuple(alive.values())))
            case 1:
                story.at(now_ms, plan.NodeLost(node.id))
            case 2:
                story.post(now_ms)
            case 3 if dice.random() < 0.2:
                story.post(now_ms)
                cells += story.cells
                marks = {name: machine.paged_ms for name, machine in story.sheet._machines.items()}
                story = Story(max(now_ms, story.sheet._now_ms), marks)
            case 4:
                busy = [f"r{n}@{node.id}" for n in dice.sample(range(6), dice.randrange(3))]
                story.demand(now_ms, dice.choice([A, B, C]), *busy, gateway=dice.choice(["g1", "g2"]))
            case _:
                wanted = dice.choice([A, B, C])
                names = tuple(a.id for a in dice.sample(node.accelerators, dice.randint(1, len(node.accelerators))))
                name, state = f"r{dice.randrange(6)}@{node.id}", dice.choice(list(S))
                nbytes = dice.randrange(60)
                status = plan.ReplicaStatus(name, wanted.endpoint, node.id, 1, state, names, nbytes, since_ms=now_ms)
                alive[status.replica] = status
                story.at(now_ms, plan.ReplicaChanged(status))
    story.post(now_ms)
    cells += story.cells
    walls: dict[tuple[str, str], int] = {}
    for cell in cells:
        assert min(cell.share_us, cell.held_us, -(cell.hour_ms % HOUR_MS)) >= 0
        if cell.share_us:
            place = (cell.node, cell.accelerator)
            walls[place] = walls.get(place, 0) + cell.share_us
    for node in nodes:
        accounted = story.sheet._machines[node.id].paged_ms if node.id in story.sheet._machines else 0
        for accelerator in node.accelerators:
            wall = walls.get((node.id, accelerator.id), 0)
            assert wall == 1_000 * max(accounted - first_ms.get(node.id, accounted), 0), (node.id, accelerator.id)
