"""From a file to Traffic. Every problem is a Refusal that names the file, the row, and what was expected there."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from tidegate.advisor import columns, tables
from tidegate.advisor.columns import refuse
from tidegate.advisor.traffic import DAY_MS, HOUR_MS, WEEK_MS, Traffic
from tidegate.sim.trace import TOKENS_MAX

ROWS_MIN = 2
ROWS_WANTED = 1_000
GAP_DAYS_MAX = 31
COUNT_MAX = 5_000_000
TOKEN_FIELDS = ("input", "output", "cached")
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_COMMON_LOG = re.compile(r"\[?(\d\d)/(\w{3})/(\d{4}:\d\d:\d\d:\d\d) ([+-]\d{4})]?")
_EPOCH_S_MIN = 1e8  # a stamp below is seconds from the start, not since 1970
_UNITS = ((1e17, 1e-6), (1e14, 1e-3), (1e11, 1.0), (_EPOCH_S_MIN, 1e3))  # ns, µs, ms, s -> ms


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read. `columns` maps fields to column names; `timezone` is for stamps that carry none; `sort` puts rows in
    order instead of refusing; `skip_bad` leaves out rows that are not requests (and says how many); `service_ms` is
    what every request takes, for work without tokens.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    timezone: str | None = None
    sort: bool = False
    skip_bad: bool = False
    service_ms: float | None = None


def read(path: Path, how: Reading | None = None) -> Traffic:
    """Raises Refusal for content, OSError for a file that cannot be opened."""
    return _Reader(path.name, how or Reading()).traffic(*tables.open_table(path))


def read_csv(name: str, text: str, how: Reading | None = None) -> Traffic:
    return _Reader(name, how or Reading()).traffic(*tables.from_text(name, StringIO(text)))


class _Bad(Exception):
    """This row is not a request; the text says what was expected."""


Row = tuple[float, str, int, int, int, float]  # instant in ms, endpoint, input, cached, output, service ms


class _Reader:
    def __init__(self, file: str, how: Reading) -> None:
        self._file = file
        self._how = how
        self._zone = _zone(how.timezone) if how.timezone else None
        self._found: dict[str, int] = {}
        self._expanded = 0
        self._skipped: list[str] = []
        self._absolute = False
        self._offset_ms = 0.0

    def traffic(self, header: list[str], lines: Iterator[Sequence[Any]]) -> Traffic:
        self._found = columns.find(self._file, header, self._how.columns, self._how.service_ms is not None)
        rows = list(self._rows(lines))
        numbers = [number for number, _ in rows]
        notes: list[str] = []
        if self._expanded:
            notes.append(
                f"{self._expanded:,} requests were given as counts a bucket and are spread evenly within it: bursts "
                "shorter than a bucket are not in this data"
            )
        if self._skipped:
            notes.append(f"{len(self._skipped)} rows left out (first: {self._skipped[0]})")
        if len(rows) < ROWS_MIN:
            what = "no request" if not rows else "one request"
            raise refuse(
                f"{self._file}: {what} in it; at least {ROWS_MIN} are needed to know a rate, {ROWS_WANTED:,} over "
                "7 days for a weekly profile"
            )
        ordered = self._ordered([row for _, row in rows], numbers, notes)
        return self._columns(ordered, notes)

    def _rows(self, lines: Iterator[Sequence[Any]]) -> Iterator[tuple[int, Row]]:
        seen: dict[Any, int] = {}
        at_id = self._found.get("id")
        for number, line in enumerate(lines, start=2):
            try:
                if at_id is not None and (key := line[at_id]) not in (None, ""):
                    if key in seen:
                        raise _Bad(f"the same request id as row {seen[key]}; expected each request once")
                    seen[key] = number
                row, count, until = self._row(line)
            except (_Bad, IndexError) as problem:
                what = str(problem) if isinstance(problem, _Bad) else "has fewer columns than the header"
                if not self._how.skip_bad:
                    raise refuse(f"{self._file}: row {number}: {what} (--skip-bad leaves such rows out)") from None
                self._skipped.append(f"row {number}: {what}")
                continue
            yield from ((number, one) for one in self._spread(row, count, until, number))

    def _row(self, line: Sequence[Any]) -> tuple[Row, int, float]:
        found = self._found
        at_ms = self._instant(line)
        given = found.get("service_ms")
        service = self._how.service_ms or (_number(line[given], "service_ms") if given is not None else 0.0)
        if given is not None and not service > 0:
            raise _Bad(f"service_ms is {service:g}; expected milliseconds above 0")
        count = _tokens(line[found["count"]], "count") if "count" in found else 1
        tokens_max = TOKENS_MAX * max(count, 1)
        tokens = {f: _tokens(line[found[f]], f, tokens_max) if f in found else 0 for f in TOKEN_FIELDS}
        if not service and (tokens["input"] < 1 or tokens["output"] < 1):
            zero = "input" if tokens["input"] < 1 else "output"
            raise _Bad(f"zero {zero} tokens; expected 1 or more (a failed request is not billed)")
        if tokens["cached"] > tokens["input"]:
            raise _Bad(f"{tokens['cached']} cached of {tokens['input']} input tokens; expected at most all of them")
        name = str(line[found["endpoint"]] or "") if "endpoint" in found else "all"
        until = self._stamp(line[found["end"]]) if count > 1 and "end" in found else at_ms + HOUR_MS
        if not name:
            raise _Bad("endpoint is empty; expected a name")
        return (at_ms, name, tokens["input"], tokens["cached"], tokens["output"], service), count, until

    def _spread(self, row: Row, count: int, until_ms: float, number: int) -> Iterator[Row]:
        if count <= 1:
            yield row
            return
        self._expanded += count
        if self._expanded > COUNT_MAX:
            raise refuse(f"{self._file}: row {number}: more than {COUNT_MAX:,} requests; cut the period")
        at_ms, name, taken, cached, given, service = row
        for k in range(count):
            instant = at_ms + (k + 0.5) / count * (until_ms - at_ms)
            yield instant, name, max(1, taken // count), cached // count, max(1, given // count), service

    def _instant(self, line: Sequence[Any]) -> float:
        at = self._found.get("t_s")
        if at is None:
            return self._stamp(line[self._found["time"]])
        seconds = _number(line[at], "t_s")
        if not isfinite(seconds) or seconds < 0:
            raise _Bad(f"t_s is {line[at]!r}; expected seconds from the start, 0 or more")
        return seconds * 1e3

    def _stamp(self, value: Any) -> float:
        """Epoch ms. The first stamp's offset (or the asked zone's at that time) says what hour of day t = 0 is."""
        if isinstance(value, datetime):
            return self._local(value)
        text = str(value if value is not None else "").strip()
        try:
            number = float(text)
        except ValueError:
            try:
                return self._local(_written(text))
            except ValueError:
                raise _Bad(f"{text[:40]!r} is not a time; expected ISO 8601 with an offset, or epoch seconds") from None
        factor = next((factor for least, factor in _UNITS if number >= least), None)
        if factor is None or not isfinite(number):
            raise _Bad(f"{text[:40]!r} is no epoch time; expected ISO 8601 or seconds since 1970 (or a column t_s)")
        return self._local(datetime.fromtimestamp(number * factor / 1e3, UTC))

    def _local(self, at: datetime) -> float:
        if at.tzinfo is None:
            if self._zone is None:
                raise _Bad(
                    f"time {at.isoformat()} has no time zone; expected an offset such as {at.isoformat()}+01:00, "
                    "or say --timezone Europe/Berlin"
                )
            at = at.replace(tzinfo=self._zone)
        if not self._absolute:
            shown = at.astimezone(self._zone) if self._zone else at
            self._offset_ms = (shown.utcoffset() or timedelta()).total_seconds() * 1e3
        self._absolute = True
        return at.timestamp() * 1e3

    def _ordered(self, rows: list[Row], numbers: list[int], notes: list[str]) -> list[Row]:
        instants = [row[0] for row in rows]
        if self._expanded:
            rows = sorted(rows)
        elif instants == sorted(instants, reverse=True) and instants[0] > instants[-1]:
            notes.append("rows were newest first: read backwards")
            rows, numbers = rows[::-1], numbers[::-1]
        elif self._how.sort:
            order = sorted(range(len(rows)), key=instants.__getitem__)
            rows, numbers = [rows[k] for k in order], [numbers[k] for k in order]
        self._check_order(rows, numbers)
        twice = [numbers[k] for k in range(1, len(rows)) if rows[k] == rows[k - 1]] if not self._expanded else []
        if twice:
            notes.append(
                f"{len(twice)} rows are the same as the one before them in every column (first: row {twice[0]}): kept, "
                "since nothing says they are not requests of their own; export a request id to tell"
            )
        return rows

    def _check_order(self, rows: list[Row], numbers: list[int]) -> None:
        for k in range(1, len(rows)):
            gap_ms = rows[k][0] - rows[k - 1][0]
            if gap_ms < 0:
                raise refuse(
                    f"{self._file}: row {numbers[k]}: time goes back by {-gap_ms / 1e3:g} s; expected rows in the "
                    "order of arrival (--sort puts them in order)"
                )
            if gap_ms > GAP_DAYS_MAX * DAY_MS:
                raise refuse(
                    f"{self._file}: row {numbers[k]}: {gap_ms / DAY_MS:.0f} days after the row before it; expected one "
                    f"period without gaps over {GAP_DAYS_MAX} days: cut the file into the period that counts"
                )

    def _columns(self, rows: list[Row], notes: list[str]) -> Traffic:
        at, names, inputs, cached, outputs, service = zip(*rows, strict=True)
        instants = np.array(at)
        start = float(instants[0]) if self._absolute else None
        lead_ms = start if start is not None else _unwatched_ms(float(instants[0]), float(instants[-1]))
        if start is None and lead_ms:
            notes.append(f"nothing in the first {_span(lead_ms)}: taken as not watched yet, and left out")
        instants = instants - lead_ms
        span_ms = max(_rounded_span(float(instants[-1])), 1.0)
        if float(instants[-1]) <= float(instants[0]) and len(rows) >= ROWS_MIN:
            notes.append("every request has the same time: one offline job without arrivals, taken as a daily one")
            span_ms = DAY_MS
        known = list(dict.fromkeys(names))
        number = {name: k for k, name in enumerate(known)}
        return Traffic(
            name=self._file,
            t_ms=instants,
            inputs=np.array(inputs, np.int64),
            cached=np.array(cached, np.int64),
            outputs=np.array(outputs, np.int64),
            service_ms=np.array(service, np.float64),
            endpoint_of=np.array([number[name] for name in names], np.int32),
            endpoints=tuple(known),
            span_ms=span_ms,
            start_ms=None if start is None else start + self._offset_ms,
            notes=(*notes, *shortness(len(rows), span_ms)),
        )


def _unwatched_ms(first: float, last: float) -> float:
    """How much of the time before the first `t_s` is left out: whole days (hours of the day stay what they are), and
    whole hours too where the silence before is longer than the traffic after it. An export of a month that began weeks
    before its platform did would else be taken for a month of hardly any traffic.
    """
    days = first // DAY_MS * DAY_MS
    return first // HOUR_MS * HOUR_MS if first - days > max(HOUR_MS, last - first) else days


def shortness(requests: int, span_ms: float) -> list[str]:
    """What is too little about the data, and by how much."""
    found = []
    if requests < ROWS_WANTED:
        found.append(
            f"{requests:,} requests of the {ROWS_WANTED:,} wanted ({100 * requests / ROWS_WANTED:.0f} %): a p99 of so "
            "few is the slowest one or two of them"
        )
    if span_ms < WEEK_MS * 0.98:
        found.append(
            f"{_span(span_ms)} of the 7 days that a weekly profile needs ({100 * span_ms / WEEK_MS:.1f} %): nights and "
            "weekends beyond it are taken to be like what was seen"
        )
    return found


def _span(span_ms: float) -> str:
    return f"{span_ms / DAY_MS:.1f} days" if span_ms >= 2 * DAY_MS else f"{span_ms / HOUR_MS:.2f} hours"


def _rounded_span(last_ms: float) -> float:
    """Whole days (or hours) when the last request is just short of them: a trace of a day ends before midnight."""
    for unit in (DAY_MS, HOUR_MS):
        whole = np.ceil(last_ms / unit) * unit
        if last_ms and (whole - last_ms) <= 0.02 * unit + 0.01 * last_ms:
            return float(whole)
    return last_ms


def _written(text: str) -> datetime:
    """ISO 8601, or the Common Log Format of web servers (`21/Nov/2026:21:28:12 +0000`). Raises ValueError."""
    if found := _COMMON_LOG.fullmatch(text):
        day, month, rest, zone = found.groups()
        year, _, clock = rest.partition(":")
        return datetime.fromisoformat(f"{year}-{_MONTHS.index(month) + 1:02}-{day}T{clock}{zone}")
    return datetime.fromisoformat(text.replace(" UTC", "Z"))


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        raise refuse(f"--timezone: {name[:40]!r} is not known; expected a name like UTC or Europe/Berlin") from None


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise _Bad(f"{what} is {str(value)[:40]!r}; expected a number") from None


def _tokens(value: Any, what: str, tokens_max: int = TOKENS_MAX) -> int:
    if value in (None, ""):
        return 0
    number = _number(value, what)
    most = COUNT_MAX if what == "count" else tokens_max
    if not isfinite(number) or number != int(number) or not 0 <= number <= most:
        raise _Bad(f"{what} is {str(value)[:40]!r}; expected a whole number from 0 to {most}")
    return int(number)
