"""How verbs speak: a Rich table for people, JSON for programs, one clear line for what went wrong."""

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

PIPED_COLUMNS = 200


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("--output", "-o", help="table for people, json for programs")]


class Problem(Exception):
    """Said as one line on stderr, without a traceback. `exit_code` 2 is the caller's mistake, 1 anybody else's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def show(value: Any, output: Format, columns: Sequence[str] | None = None, title: str = "") -> None:
    """Prints `value`: as JSON whole; as a table, a list of rows by `columns` or one thing as key and value."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        return
    printer = console()
    if isinstance(value, Mapping):
        printer.print(_one(value, title))
    elif not value:
        printer.print(f"no {title or 'rows'}", style="dim", highlight=False)
    else:
        printer.print(table(value, columns or list(value[0]), title))


def console() -> Any:
    """A Rich console; wide where nobody looks (a pipe, a file), so that rows do not wrap."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPED_COLUMNS)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str = "") -> Any:
    """A Rich table; numbers to the right."""
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        drawn.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell(row.get(column)) for column in columns))
    return drawn


def cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, Mapping):
        return " ".join(f"{key}={cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value) or "-"
    return str(value)


def _one(value: Mapping[str, Any], title: str) -> Any:
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    drawn.add_column(style="bold")
    drawn.add_column(overflow="fold")
    for key, item in value.items():
        drawn.add_row(key.replace("_", " "), cell(item))
    return drawn


def size(count: int) -> str:
    """Bytes for people: ``67108864`` → ``64.0 MiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
