"""What a budget is spent in: UTC days and calendar months, and all time. Pure."""

from datetime import UTC, datetime, timedelta

from tidegate.domain.limits import Window
from tidegate.domain.units import MS_PER_DAY

NEVER_MS = 253_402_300_800_000  # the end of the year 9999
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def bounds(window: Window, at_ms: int) -> tuple[int, int]:
    """[start, end) of the window around an instant, in epoch milliseconds."""
    match window:
        case Window.TOTAL:
            return 0, NEVER_MS
        case Window.DAY:
            start_ms = at_ms - at_ms % MS_PER_DAY
            return start_ms, start_ms + MS_PER_DAY
        case Window.MONTH:
            first = (_EPOCH + timedelta(milliseconds=at_ms)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
            following = (first + timedelta(days=32)).replace(day=1)
            return _ms(first), _ms(following)


def _ms(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)
