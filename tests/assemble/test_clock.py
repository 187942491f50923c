"""A clock that is set while the platform runs: its time goes on, never back, and finds the way to the right one."""

from tidegate.assemble.clock import SteadyClock

MS, HOUR_MS = 1_000_000, 3_600_000
NOON_MS = 1_700_000_000_000


class Machine:
    """`wall_ns` is what its clock shows, `up_ns` for how long it has run."""

    def __init__(self) -> None:
        self.wall_ns, self.up_ns = NOON_MS * MS, 5
        self.clock = SteadyClock(wall_ms=lambda: self.wall_ns // MS, up_ns=lambda: self.up_ns)

    def passes(self, ns: int) -> int:
        self.wall_ns += ns
        self.up_ns += ns
        return self.clock.now_ms()

    def is_set(self, by_ms: int) -> int:
        self.wall_ns += by_ms * MS
        return self.clock.now_ms()


def test_on_a_machine_nobody_sets_it_is_the_wall_clock() -> None:
    machine = Machine()
    for _ in range(1_000):
        assert machine.passes(370_001) == machine.wall_ns // MS


def test_set_back_an_hour_it_goes_on_a_tenth_slower_until_the_wall_clock_is_right_again() -> None:
    """Timers, rates and holds wait for instants of this clock: standing still it would stop them all for an hour."""
    machine = Machine()
    now_ms = machine.is_set(-HOUR_MS)
    assert now_ms == NOON_MS
    for _ in range(10_000):  # asked so often that no call sees a whole millisecond pass
        before_ms, now_ms = now_ms, machine.passes(MS // 10)
        assert 0 <= now_ms - before_ms <= 1
    assert now_ms == NOON_MS + 900
    assert machine.passes(9 * HOUR_MS * MS) > machine.wall_ns // MS
    assert machine.passes(HOUR_MS * MS) == machine.wall_ns // MS


def test_set_forward_it_is_followed_at_once() -> None:
    machine = Machine()
    assert machine.is_set(HOUR_MS) == NOON_MS + HOUR_MS
