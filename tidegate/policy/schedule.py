"""Cron schedules: which override of an endpoint's replicas is in force, and until when.

Five fields as in POSIX crontab (minute, hour, day of month, month, day of week with 0 and 7 for Sunday; ``*``, lists,
ranges and steps; with both days given either one fires it). Times are UTC plus the entry's offset. An entry holds from
the minute its cron fires until another entry's does.
"""

from collections.abc import Sequence
from datetime import date
from functools import lru_cache

from tidegate.domain.endpoint import ScheduleEntry

FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
MINUTE_MS = 60_000
DAY_MINUTES = 1_440
DAYS_LOOKED_AT_MAX = 366
EPOCH_DAY = date(1970, 1, 1).toordinal()
CRONS_KEPT_MAX = 4_096

Cron = tuple[tuple[int, ...], ...]


@lru_cache(CRONS_KEPT_MAX)
def parse(cron: str) -> Cron:
    """The values of each field. Raises ValueError naming the field, its text and what would be accepted."""
    parts = cron.split()
    if len(parts) != len(FIELDS):
        raise ValueError(f"{len(FIELDS)} fields are needed: {', '.join(name for name, _, _ in FIELDS)}")
    return tuple(_field(text, name, low, high) for text, (name, low, high) in zip(parts, FIELDS, strict=True))


def in_force(entries: Sequence[ScheduleEntry], now_ms: int) -> tuple[ScheduleEntry | None, int]:
    """The entry that fired last (the later in the list of two at once; None if none did within a year), and the instant
    at which the next one fires, or at which to ask again.
    """
    minute = now_ms // MINUTE_MS
    fired = [(_near(entry, minute, -1), index) for index, entry in enumerate(entries)]
    last, index = max(fired)
    coming = [at for entry in entries if (at := _near(entry, minute + 1, 1)) >= 0]
    return (entries[index] if last >= 0 else None), min(coming, default=minute + DAY_MINUTES) * MINUTE_MS


def _field(text: str, name: str, low: int, high: int) -> tuple[int, ...]:
    values: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        first, dash, last = (str(low), "-", str(high)) if span == "*" else span.partition("-")
        if not (first.isdecimal() and (not dash or last.isdecimal()) and (step.isdecimal() or "/" not in part)):
            raise ValueError(f"{name} {text!r}: numbers, ranges, lists, steps and * are accepted")
        begin, end = int(first), int(last) if dash else high if step else int(first)
        if not (low <= begin <= end <= high and int(step or 1) > 0):
            raise ValueError(f"{name} {text!r}: {low} to {high} is accepted")
        values.update(range(begin, end + 1, int(step or 1)))
    return tuple(sorted(values))


def _near(entry: ScheduleEntry, minute: int, way: int) -> int:
    """The minute nearest to `minute` at which the entry fires, itself included, back (-1) or ahead (1); -1 if none."""
    minutes, hours, days, months, weekdays = parse(entry.cron)
    any_day, any_weekday = len(days) == 31, len({d % 7 for d in weekdays}) == 7
    local = minute + entry.utc_offset_minutes
    in_day = sorted((h * 60 + m for h in hours for m in minutes), reverse=way < 0)
    for step in range(DAYS_LOOKED_AT_MAX + 1):
        day = local // DAY_MINUTES + way * step
        when = date.fromordinal(EPOCH_DAY + day)
        by_day, by_weekday = when.day in days, when.isoweekday() % 7 in {d % 7 for d in weekdays}
        fires = (by_day or by_weekday) if not (any_day or any_weekday) else (by_day and by_weekday)
        if when.month in months and fires:
            for at in in_day:
                if (day * DAY_MINUTES + at - local) * way >= 0:
                    return day * DAY_MINUTES + at - entry.utc_offset_minutes
    return -1
