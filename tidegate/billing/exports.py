"""Usage exports: pages of text from pages of the ledger, so that a month of them fits in no memory at once."""

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import TypeVar

import msgspec

from tidegate.billing import focus
from tidegate.billing.periods import Period
from tidegate.billing.usage_events import cloud_event, lago_event
from tidegate.domain.ledger import Adjustment, Charged, ExportRow
from tidegate.domain.money_ports import Ledger
from tidegate.domain.units import MS_PER_HOUR

PAGE_ROWS_MAX = 5_000
FOCUS_HOURS_MAX = 24  # of sums held at once

T = TypeVar("T")
Read = Callable[[int, int, str | None, tuple[int, int], int], Sequence[T]]


class ExportFormat(StrEnum):
    CSV = "csv"
    FOCUS = "focus"
    CLOUDEVENTS = "cloudevents"
    LAGO = "lago"


MEDIA_TYPES = {
    ExportFormat.CSV: "text/csv; charset=utf-8",
    ExportFormat.FOCUS: "text/csv; charset=utf-8",
    ExportFormat.CLOUDEVENTS: "application/x-ndjson",
    ExportFormat.LAGO: "application/x-ndjson",
}


def export(
    ledger: Ledger, form: ExportFormat, period: Period, tenant: str | None, adjustments: Sequence[Adjustment] = ()
) -> Iterator[str]:
    """Texts that follow one another. Synchronous; may raise StoreFault between any two of them. `adjustments` of the
    period are costs like any other in FOCUS; they are no request's, so they are in no other format.
    """
    match form:
        case ExportFormat.CSV:
            return _trace(ledger, period, tenant)
        case ExportFormat.FOCUS:
            return _focus(ledger, period, tenant, adjustments)
        case ExportFormat.CLOUDEVENTS:
            return _events(ledger, period, tenant, cloud_event)
        case ExportFormat.LAGO:
            return _events(ledger, period, tenant, lago_event)


def _trace(ledger: Ledger, period: Period, tenant: str | None) -> Iterator[str]:
    """What `tidegate simulate` reads: seconds into the period, endpoint, input and output tokens."""
    yield "t_s,endpoint,input_tokens,output_tokens\n"
    for rows in _pages(ledger.export, period, tenant, lambda row: (row.arrived_ms, row.number)):
        yield "".join(_trace_line(row, period.start_ms) for row in rows)


def _trace_line(row: ExportRow, start_ms: int) -> str:
    at_ms = row.arrived_ms - start_ms
    return f"{at_ms // 1000}.{at_ms % 1000:03d},{_csv_text(row.endpoint)},{row.input_tokens},{row.output_tokens}\n"


def _events(
    ledger: Ledger, period: Period, tenant: str | None, event: Callable[[Charged], dict[str, object]]
) -> Iterator[str]:
    """One JSON object a line, by arrival."""
    encode = msgspec.json.Encoder().encode
    for rows in _pages(ledger.records, period, tenant, lambda row: (row.record.arrived_ms, row.number)):
        yield b"\n".join([*(encode(event(row)) for row in rows), b""]).decode()


def _focus(ledger: Ledger, period: Period, tenant: str | None, adjustments: Sequence[Adjustment]) -> Iterator[str]:
    yield focus.as_csv([], header=True)
    step_ms = FOCUS_HOURS_MAX * MS_PER_HOUR
    start_ms = period.start_ms
    while start_ms < period.end_ms:
        until_ms = min(start_ms - start_ms % MS_PER_HOUR + step_ms, period.end_ms)
        cells = ledger.sums(start_ms, until_ms, tenant, hourly=True)
        yield focus.as_csv(focus.usage_rows(cells, period), header=False)
        start_ms = until_ms
    yield focus.as_csv(focus.time_rows(ledger.time_sums(period.start_ms, period.end_ms, tenant), period), header=False)
    yield focus.as_csv(focus.adjustment_rows(adjustments, period), header=False)


def _pages(
    read: Read[T], period: Period, tenant: str | None, place: Callable[[T], tuple[int, int]]
) -> Iterator[Sequence[T]]:
    after = (-1, 0)
    while rows := read(period.start_ms, period.end_ms, tenant, after, PAGE_ROWS_MAX):
        yield rows
        after = place(rows[-1])


def _csv_text(text: str) -> str:
    """Quoted where CSV needs it (RFC 4180)."""
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text
