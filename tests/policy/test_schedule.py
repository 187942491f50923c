"""Cron schedules: which override holds when, and the core that follows it."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.policy.test_reconcile import FAST, seen, world
from tests.policy.world import deployment
from tidegate.domain.endpoint import ScheduleEntry
from tidegate.domain.replica import ReplicaState as S
from tidegate.policy.schedule import in_force, parse

DAY = ScheduleEntry("0 8 * * 1-5", 2, 4)
NIGHT = ScheduleEntry("30 18 * * *", 0, 1)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


@pytest.mark.parametrize(
    ("now", "entry", "until"),
    [
        ("2026-11-23T08:00", DAY, "2026-11-23T18:30"),  # a Monday
        ("2026-11-23T07:59", NIGHT, "2026-11-23T08:00"),
        ("2026-11-23T18:30", NIGHT, "2026-11-24T08:00"),
        ("2026-11-28T12:00", NIGHT, "2026-11-28T18:30"),  # a Saturday: Friday evening still holds
    ],
)
def test_the_entry_that_fired_last_holds_until_another_fires(now: str, entry: ScheduleEntry, until: str) -> None:
    assert in_force((DAY, NIGHT), at(now)) == (entry, at(until))


def test_offsets_steps_lists_and_month_days() -> None:
    berlin = replace(DAY, utc_offset_minutes=60)
    assert in_force((berlin, NIGHT), at("2026-11-23T07:00")) == (berlin, at("2026-11-23T18:30"))
    quarter = ScheduleEntry("*/15 * 1,15 * *", 1, 1)
    assert in_force((quarter,), at("2026-11-15T10:07"))[1] == at("2026-11-15T10:15")
    assert in_force((quarter,), at("2026-11-15T23:45"))[1] == at("2026-12-01T00:00")
    either = ScheduleEntry("0 0 13 * 5", 1, 1)  # the 13th or a Friday, as cron has it
    assert in_force((either,), at("2026-11-21T00:00"))[1] == at("2026-11-27T00:00")
    never = ScheduleEntry("0 0 30 2 *", 1, 1)
    assert in_force((never,), at("2026-11-21T00:00"))[0] is None


@pytest.mark.parametrize(
    ("cron", "what"),
    [
        ("* * * *", "5 fields are needed"),
        ("60 * * * *", "minute '60': 0 to 59"),
        ("* 5-3 * * *", "hour '5-3'"),
        ("* * * jan *", "month 'jan': numbers"),
        ("*/0 * * * *", "minute"),
        ("1- * * * *", "minute"),
    ],
)
def test_what_is_no_cron_is_refused_by_field(cron: str, what: str) -> None:
    with pytest.raises(ValueError, match=what.replace("*", r"\*")):
        parse(cron)


def test_the_core_follows_the_schedule() -> None:
    """`World` begins at 1970-01-01T00:16:40: the floor comes at 00:20 and goes at 00:25."""
    scene = world(accelerators=3, gb=4, settings=FAST)
    up, down = ScheduleEntry("20 0 * * *", 2, 3), ScheduleEntry("25 0 * * *", 0, 1)
    scene.apply(deployment("a", schedule=(up, down)))
    ready = lambda: sum(r.state is S.READY for r in seen(scene, "a").replicas)  # noqa: E731
    scene.run(60_000)
    assert ready() == 0, "quiet for longer than its keep-alive"
    scene.run(1_210_000 - scene.now)
    assert ready() == 2
    scene.run(1_490_000 - scene.now)
    assert ready() == 2, "kept without any traffic"
    scene.run(1_540_000 - scene.now)
    assert ready() == 0
