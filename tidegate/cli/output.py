"""How verbs speak: a Rich table for people, JSON for programs, one clear line for what went wrong."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

PIPED_COLUMNS = 200
PROSE_COLUMNS = 24  # cells longer than this, with spaces in them, may be wrapped
PROSE_COLUMNS_MIN = 16
INSTANTS = ("created_ms", "expires_ms", "revoked_ms", "since_ms", "at_ms")  # also where there is none
INSTANT_MS_MIN = 10**12  # a `_ms` above it is an instant (2001 and later), below it a duration
ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d)?(\.\d+)?(Z|\+00:00)")
MONEY = re.compile(r"-?\d+(\.\d+)?")


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("--output", "-o", help="table for people, json for programs")]


class Problem(Exception):
    """Said as one line on stderr, without a traceback. `exit_code` 2 is the caller's mistake, 1 anybody else's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def show(
    value: Any, output: Format, columns: Sequence[str] | None = None, title: str = "", spare: Sequence[str] = ()
) -> None:
    """Prints `value`: as JSON whole; as a table, a list of rows by `columns` or one thing as key and value. `spare`
    columns are left out, in their order, where the terminal is too narrow for all.
    """
    if output is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        return
    printer = console()
    if isinstance(value, Mapping):
        printer.print(_one(value, title))
    elif not value:
        printer.print(f"no {title or 'rows'}", style="dim", highlight=False)
    else:
        printer.print(table(value, columns or list(value[0]), title, spare))


def console() -> Any:
    """A Rich console; wide where nobody looks (a pipe, a file), so that rows do not wrap."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPED_COLUMNS)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str = "", spare: Sequence[str] = ()) -> Any:
    """A Rich renderable that is read on any terminal: a table where it fits; where it does not, without its empty
    columns, then without `spare` ones; where even that is too wide, a block of lines a row.
    """
    return _Fitted(rows, list(columns), title, list(spare))


class _Fitted:
    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: list[str], title: str, spare: list[str]) -> None:
        self._rows, self._columns, self._title, self._spare = rows, columns, title, spare
        self._cells = {name: [cell(row.get(name), name) for row in rows] for name in columns}

    def __rich_console__(self, _console: Any, options: Any) -> Iterator[Any]:
        kept = list(self._columns)
        empty = [name for name in kept if all(text == "-" for text in self._cells[name])]
        left_out: list[str] = []
        for name in [*empty, *self._spare]:
            if self._width(kept) <= options.max_width:
                break
            if name in kept:
                kept.remove(name)
                left_out += [name] if name not in empty else []
        if self._width(kept) > options.max_width:
            yield from self._blocks([name for name in self._columns if name not in empty])
            return
        yield self._table(kept, self._widths(kept, options.max_width))
        if left_out:
            yield f"[dim]not shown here: {', '.join(self._heading(name) for name in left_out)} (-o json)[/]"

    def _heading(self, name: str) -> str:
        return heading(name, [row.get(name) for row in self._rows])

    def _width(self, names: Sequence[str]) -> int:
        return sum(self._column(name) for name in names) + 2 * max(0, len(names) - 1)

    def _column(self, name: str) -> int:
        words = max((len(word) for word in self._heading(name).split()), default=0)
        longest = max((len(text) for text in self._cells[name]), default=0)
        if self._prose(name):
            longest = PROSE_COLUMNS_MIN
        return max(words, longest)

    def _widths(self, names: Sequence[str], width: int) -> dict[str, int]:
        """Whole cells first, then room for prose, then headings on one line."""
        widths = {name: self._column(name) for name in names}
        room = width - self._width(names)
        longest = {name: max(len(text) for text in self._cells[name]) for name in names if self._prose(name)}
        for wanted in (longest, {name: len(self._heading(name)) for name in names}):
            for name, length in sorted(wanted.items(), key=lambda one: one[1]):
                more = min(room, max(0, length - widths[name]))
                widths[name] += more
                room -= more
        return widths

    def _prose(self, name: str) -> bool:
        return any(len(text) > PROSE_COLUMNS and " " in text for text in self._cells[name])

    def _table(self, names: Sequence[str], widths: Mapping[str, int]) -> Any:
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=self._title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for name in names:
            numeric = any(isinstance(row.get(name), int | float) and not _instant(row.get(name)) for row in self._rows)
            drawn.add_column(
                self._heading(name), justify="right" if numeric else "left", overflow="fold", width=widths[name]
            )
        for k in range(len(self._rows)):
            drawn.add_row(*(Text(self._cells[name][k]) for name in names))
        return drawn

    def _blocks(self, names: Sequence[str]) -> Iterator[Any]:
        if self._title:
            yield f"[italic]{self._title}[/]"
        for k, row in enumerate(self._rows):
            yield _one({name: row.get(name) for name in names if self._cells[name][k] != "-"}, "")
            if k + 1 < len(self._rows):
                yield ""


def heading(name: str, values: Sequence[Any] = ()) -> str:
    """A key as people read it; the unit goes where the value is shown in another way."""
    said = name.replace("_", " ")
    if name in INSTANTS or (name.endswith("_ms") and any(_instant(value) for value in values)):
        return said.removesuffix(" ms")
    return said.removesuffix(" bytes") if name.endswith("_bytes") else said


def _short(name: str, value: Any) -> str:
    return heading(name, [value]).replace(" ", "_")


def _instant(value: Any) -> bool:
    return isinstance(value, int) and value >= INSTANT_MS_MIN


def cell(value: Any, name: str = "") -> str:
    """A value as people read it; `name` is its key, whose unit says how."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("_ms") and _instant(value):
        return datetime.fromtimestamp(value / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, int) and name.endswith("_bytes"):
        return size(value)
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, Mapping):
        return " ".join(f"{_short(k, v)}={cell(v, k)}" for k, v in value.items() if v not in (None, "")) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value) or "-"
    return _text(str(value), name)


def _text(text: str, name: str) -> str:
    if found := ISO.fullmatch(text):
        day, minute, second = found[1], found[2], found[3] or ""
        return f"{day} {minute}{'' if second == ':00' else second}"
    return usd(text) if "usd" in name else text


def usd(text: str) -> str:
    """An exact amount to the cent, or as fine as it is: ``2.500000000`` → ``2.50``, ``0.2`` → ``0.20``."""
    if not MONEY.fullmatch(text):
        return text
    whole, _, parts = text.partition(".")
    return f"{whole}.{parts[:2]:0<2}{parts[2:].rstrip('0')}"


def _one(value: Mapping[str, Any], title: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    drawn.add_column(style="bold")
    drawn.add_column(overflow="fold")
    for key, item in value.items():
        if key.replace("nano_usd", "usd") != key and key.replace("nano_usd", "usd") in value:
            continue  # said in USD beside it
        if key.endswith("_ms") and key.removesuffix("_ms") in value:
            continue  # said as a time beside it
        drawn.add_row(heading(key, [item]), Text(_lines(item, key)))
    return drawn


def _lines(item: Any, key: str) -> str:
    """Things within a thing: a line each."""
    if isinstance(item, Mapping) and (len(item) > 1 or any(isinstance(one, Mapping) for one in item.values())):
        return "\n".join(f"{heading(k, [v])}: {cell(v, k)}" for k, v in item.items() if v not in (None, "")) or "-"
    if isinstance(item, list) and any(isinstance(one, Mapping) for one in item):
        return "\n".join(cell(one) for one in item)
    return cell(item, key)


def size(count: int) -> str:
    """Bytes for people: ``67108864`` → ``64.0 MiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
