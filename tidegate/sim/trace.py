"""Traces: `t_s,endpoint,input_tokens,output_tokens`, sorted by time; CSV, CSV.gz or Parquet, streamed, each row
checked.

Every error is a Refusal that names the file and the row (the header is row 1) or the column.
"""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from operator import itemgetter
from pathlib import Path

from tidegate.domain.errors import Refusal

COLUMNS = ("t_s", "endpoint", "input_tokens", "output_tokens")
TOKENS_MAX = 10_000_000
ENDPOINTS_MAX = 100_000
BURST_MS = 10_000.0
INFINITE = float("inf")

Row = tuple[float, str, int, int]
"""(instant in ms from the trace's start, endpoint, input tokens, output tokens)"""


@dataclass(slots=True)
class EndpointTotals:
    requests: int = 0
    context_tokens_max: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    window: int = -1
    window_requests: int = 0
    busiest: int = 0
    """Requests in the busiest `BURST_MS` of the trace."""

    def count(self, at_ms: float, input_tokens: int, output_tokens: int) -> None:
        self.requests += 1
        if input_tokens + output_tokens > self.context_tokens_max:
            self.context_tokens_max = input_tokens + output_tokens
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        window = int(at_ms // BURST_MS)
        self.window_requests = self.window_requests + 1 if window == self.window else 1
        self.window = window
        if self.window_requests > self.busiest:
            self.busiest = self.window_requests


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a first pass over a trace tells: which endpoints there are, the longest request of each, and the span."""

    endpoints: dict[str, EndpointTotals]
    requests: int
    span_ms: float


def rows(path: Path) -> Iterator[Row]:
    """Rows in order, one at a time. Raises Refusal for anything that is not a sorted trace; OSError if unreadable."""
    if path.suffix == ".parquet":
        yield from _checked(path, _parquet(path))
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from _checked(path, csv.reader(file))
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise Refusal("invalid_request", f"{path.name} is not a readable trace: {error}", param="trace") from error


def summarize(path: Path) -> TraceSummary:
    """One pass. Raises Refusal when there is no request in it."""
    endpoints: dict[str, EndpointTotals] = {}
    requests, last_ms = 0, 0.0
    for at_ms, endpoint, input_tokens, output_tokens in rows(path):
        totals = endpoints.get(endpoint)
        if totals is None:
            if len(endpoints) >= ENDPOINTS_MAX:
                raise _bad(path, f"more than {ENDPOINTS_MAX} endpoints")
            totals = endpoints[endpoint] = EndpointTotals()
        totals.count(at_ms, input_tokens, output_tokens)
        requests += 1
        last_ms = at_ms
    if not requests:
        raise _bad(path, "no request in it")
    return TraceSummary(endpoints, requests, last_ms)


def _parquet(path: Path) -> Iterator[list[str]]:
    try:
        import polars
    except ModuleNotFoundError:
        raise _bad(path, "reading Parquet needs the 'advisor' extra (polars)") from None
    try:
        frame = polars.read_parquet(path)
    except polars.exceptions.PolarsError as error:
        raise _bad(path, f"not readable as Parquet ({str(error)[:120]})") from error
    yield list(frame.columns)
    for row in frame.iter_rows():
        yield [str(value) for value in row]


def _checked(path: Path, lines: Iterator[list[str]]) -> Iterator[Row]:
    header = next(lines, None)
    if header is None:
        raise _bad(path, "the file is empty")
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        made = "`tidegate advise --trace LOG --save-trace FILE` makes a trace of other logs"
        raise _bad(path, f"column {missing[0]!r} is missing; there must be {', '.join(COLUMNS)} ({made})")
    pick = itemgetter(*(header.index(name) for name in COLUMNS))
    number, last_ms = 1, 0.0
    try:
        for number, (t_s, endpoint, inputs, outputs) in enumerate(map(pick, lines), start=2):
            at_ms, input_tokens, output_tokens = float(t_s) * 1000.0, int(inputs), int(outputs)
            if not last_ms <= at_ms < INFINITE:
                raise _bad(path, _time_problem(number, at_ms, last_ms))
            if not (0 < input_tokens <= TOKENS_MAX and 0 < output_tokens <= TOKENS_MAX and endpoint):
                what = f"tokens must be 1 to {TOKENS_MAX}" if endpoint else "endpoint is empty"
                raise _bad(path, f"row {number}: {what} (input {input_tokens}, output {output_tokens})")
            last_ms = at_ms
            yield at_ms, endpoint, input_tokens, output_tokens
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise _bad(path, f"row {number}: {error}") from None
    except IndexError:
        raise _bad(path, f"row {number + 1}: it has too few columns") from None


def _time_problem(number: int, at_ms: float, last_ms: float) -> str:
    if not isfinite(at_ms):
        return f"row {number}: t_s is not a finite number"
    if at_ms < 0:
        return f"row {number}: t_s is negative"
    return f"row {number}: t_s goes back, {at_ms / 1000:g} after {last_ms / 1000:g}; a trace is sorted by time"


def _bad(path: Path, what: str) -> Refusal:
    return Refusal("invalid_request", f"{path.name}: {what}", param="trace")
