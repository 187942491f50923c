"""Files as a header and rows: CSV, CSV.gz, Parquet, JSON lines, and JSON pages of OpenAI's usage API.

What a text is shows in how it begins, not in its name: access logs are called `.log` as often as `.jsonl`.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from tidegate.advisor.columns import refuse
from tidegate.advisor.traffic import Traffic
from tidegate.sim.trace import COLUMNS

SEPARATORS = ",;\t|"
GZIP = b"\x1f\x8b"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
HEAD_ROWS = 50
"""JSON objects of one log need not all have the same keys: the columns are those of the first so many."""

Table = tuple[list[str], Iterator[Sequence[Any]]]


def open_table(path: Path) -> Table:
    """Header and rows of a file; each row is numbered by its place, the header (or the first object) is row 1.

    Raises Refusal when it is not what its name says, OSError when it cannot be read.
    """
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return _parquet(path)
    try:
        text = _text(path, suffixes[-1:] == [".gz"])
        kind = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
        begins = _begins(text)
        if kind in ([".jsonl"], [".ndjson"]) or (kind != [".json"] and begins == "{"):
            return _json_lines(path.name, text)
        if kind == [".json"] or begins == "[":
            return _objects(path.name, iter(_documents(path.name, text)))
        return _csv(path.name, text)
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise refuse(f"{path.name}: not readable ({error}); expected CSV, CSV.gz, Parquet, JSONL or JSON") from error


def write_trace(path: Path, traffic: Traffic) -> None:
    """The requests as a trace for the simulator: `t_s,endpoint,input_tokens,output_tokens`, CSV or CSV.gz.

    Raises Refusal for work without tokens, OSError where it cannot be written.
    """
    if not (traffic.inputs.all() and traffic.outputs.all()):
        raise refuse("--save-trace: a trace needs tokens; this work has none (--service-ms)")
    out = StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    names = (traffic.endpoints[k] for k in traffic.endpoint_of)
    instants = (f"{at_ms / 1e3:.3f}" for at_ms in traffic.t_ms.tolist())
    writer.writerows(zip(instants, names, traffic.inputs.tolist(), traffic.outputs.tolist(), strict=True))
    data = out.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def from_text(name: str, text: TextIO) -> Table:
    """A table that arrived as CSV over the network."""
    return _csv(name, text)


def _text(path: Path, compressed: bool) -> TextIO:
    """The whole file in memory, so that no file stays open behind an iterator; a trace is tens of megabytes."""
    data = path.read_bytes()
    data = gzip.decompress(data) if compressed or data[:2] == GZIP else data
    return StringIO(data.decode("utf-16" if data[:2] in UTF16 else "utf-8-sig"), newline="")


def _begins(text: TextIO) -> str:
    """Its first character that is not blank."""
    first = next((line.lstrip()[0] for line in text if line.strip()), "")
    text.seek(0)
    return first


def _csv(name: str, text: TextIO) -> Table:
    """Separated by whichever of `SEPARATORS` is most often in the header; lines with nothing in them are left out."""
    head = text.readline()
    text.seek(0)
    lines = (line for line in csv.reader(text, delimiter=max(SEPARATORS, key=head.count)) if line)
    try:
        header = next(lines, None)
    except csv.Error as error:
        raise refuse(f"{name}: row 1: not CSV ({error})") from error
    if not header:
        raise refuse(f"{name}: the file is empty; expected a header and one row a request")
    return header, _guarded(name, lines)


def _guarded(name: str, lines: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    try:
        yield from lines
    except csv.Error as error:
        raise refuse(f"{name}: not readable as CSV ({error})") from error


def _parquet(path: Path) -> Table:
    import polars

    try:
        frame = polars.read_parquet(path)
    except polars.exceptions.PolarsError as error:
        raise refuse(f"{path.name}: not readable as Parquet ({str(error)[:120]})") from error
    return list(frame.columns), frame.iter_rows()


def _json_lines(name: str, text: TextIO) -> Table:
    def objects() -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(text, 1):
            if line.strip():
                yield _object(name, number, line)

    return _objects(name, objects())


def _object(name: str, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise refuse(f"{name}: row {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise refuse(f"{name}: row {number}: a JSON {type(value).__name__}; expected an object")
    return value


def _documents(name: str, text: TextIO) -> list[Mapping[str, Any]]:
    """A JSON list of objects, or a page of usage buckets: each result becomes a row with its bucket's times."""
    try:
        document = json.load(text)
    except ValueError as error:
        raise refuse(f"{name}: not JSON ({error})") from None
    items = document.get("data") if isinstance(document, dict) else document
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise refuse(f"{name}: expected a list of objects, or an object whose `data` is one")
    rows: list[Mapping[str, Any]] = []
    for item in items:
        results = item.get("results")
        if isinstance(results, list):
            rows += [{**r, "start_time": item.get("start_time"), "end_time": item.get("end_time")} for r in results]
        else:
            rows.append(item)
    return rows


def _objects(name: str, objects: Iterator[Mapping[str, Any]]) -> Table:
    head = [dict(_flat(o)) for o in islice(objects, HEAD_ROWS)]
    if not head:
        raise refuse(f"{name}: the file is empty; expected one object a request")
    header = list(dict.fromkeys(key for row in head for key in row))
    rest = (dict(_flat(o)) for o in objects)
    return header, ([row.get(key) for key in header] for row in chain(head, rest))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item
