"""Billing periods: a calendar month or any [from, to) in UTC."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tidegate.domain.errors import Refusal

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MONTH = re.compile(r"(\d{4})-(\d{2})")
_EPOCH_MS_MAX = 253_402_300_799_000  # the end of the year 9999
_ACCEPTED = "a date or time like 2026-11-01 or 2026-11-01T08:00:00Z, or epoch milliseconds"


@dataclass(frozen=True, slots=True)
class Period:
    """Instants in epoch milliseconds; `end_ms` is not part of it."""

    start_ms: int
    end_ms: int


def parse_period(month: str | None, start: str | None, end: str | None, now_ms: int) -> Period:
    """`month` like ``2026-11``, or `start` and `end`; the month of `now_ms` when nothing is given, `end` defaults to
    now.

    Raises Refusal invalid_request naming the parameter.
    """
    if month is not None:
        if start is not None or end is not None:
            raise Refusal("invalid_request", "`period` excludes `from` and `to`: give one or the other", param="period")
        return _month(month)
    if start is None and end is None:
        now = _EPOCH + timedelta(milliseconds=now_ms)
        return _month(f"{now.year:04d}-{now.month:02d}")
    if start is None:
        raise Refusal("invalid_request", "`to` needs `from`", param="from")
    period = Period(_instant("from", start), now_ms if end is None else _instant("to", end))
    if period.start_ms >= period.end_ms:
        raise Refusal("invalid_request", "the period is empty: `from` must be before `to`", param="from")
    return period


def iso(at_ms: int) -> str:
    """``2026-11-01T00:00:00.000Z``"""
    at = _EPOCH + timedelta(milliseconds=at_ms)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_instant(name: str, text: str) -> int:
    """Epoch milliseconds of `text`. Raises Refusal naming the parameter or field `name`."""
    return _instant(name, text)


def _month(text: str) -> Period:
    found = _MONTH.fullmatch(text)
    if not found or not (1 <= int(found[2]) <= 12 and 1970 <= int(found[1]) < 9999):
        raise Refusal("invalid_request", f"`period`: {text[:40]!r} is not a month like 2026-11", param="period")
    year, month = int(found[1]), int(found[2])
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return Period(_epoch_ms(datetime(year, month, 1, tzinfo=UTC)), _epoch_ms(datetime(*following, 1, tzinfo=UTC)))


def _instant(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) > 4:
        at_ms = int(text)
    else:
        try:
            at = datetime.fromisoformat(text)
            at_ms = _epoch_ms(at.replace(tzinfo=UTC) if at.tzinfo is None else at)
        except (ValueError, OverflowError):
            raise Refusal("invalid_request", f"`{name}`: {text[:40]!r} is not {_ACCEPTED}", param=name) from None
    if not 0 <= at_ms <= _EPOCH_MS_MAX:
        raise Refusal("invalid_request", f"`{name}`: {text[:40]!r} is out of range; accepted: {_ACCEPTED}", param=name)
    return at_ms


def _epoch_ms(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)
