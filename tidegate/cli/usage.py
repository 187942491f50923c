"""`tidegate usage`: what was consumed, and the same as a trace for `simulate`, `plan` and `advise`."""

import csv
import io
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, given
from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="Tokens and money by endpoint, model, tenant, mode, hour or key.", invoke_without_command=True)

COLUMNS = ("requests", "billed_requests", "input_tokens", "cached_tokens", "output_tokens", "usd")
STATES = ("busy", "idle", "activating", "draining", "asleep", "free", "unreported")
TIME_COLUMNS = (*STATES[:5], "lent", "borrowed", "tokens_usd", "time_usd", "dedicated_usd", "margin_usd")
SPARE = ("draining", "activating", "time_usd", "dedicated_usd", "asleep")
By = Annotated[str, typer.Option("--by", help="endpoint | model | tenant | mode | hour | key")]
Since = Annotated[str | None, typer.Option("--from", help="start of the period, e.g. 2026-11-01 or 2026-11-01T08:00Z")]
Until = Annotated[str | None, typer.Option("--to", help="its end, not included; without it: now")]
Month = Annotated[str | None, typer.Option("--period", help="a month, e.g. 2026-10, instead of --from and --to")]


class Export(StrEnum):
    CSV = "csv"
    PARQUET = "parquet"
    FOCUS = "focus"
    CLOUDEVENTS = "cloudevents"
    LAGO = "lago"


@app.callback()
def usage(
    context: typer.Context,
    by: By = "endpoint",
    since: Since = None,
    until: Until = None,
    month: Month = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Usage of the current month, or of --from to --to."""
    if context.invoked_subcommand is not None:
        return
    answer = Api(url, key).get("usage", by=by, **period(since, until, month))
    rows = [{by: row.pop("group")} | row for row in answer["rows"]]
    if output is Format.TABLE and len(rows) > 1:
        rows.append({by: "total"} | answer["total"])
    show(rows, output, (by, *COLUMNS), f"usage by {by}")


@app.command("time")
def time_(
    since: Since = None,
    until: Until = None,
    month: Month = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Accelerator time by endpoint and state, in seconds: what was lent to whom, what it brought in, what is left."""
    view = Api(url, key).get("usage/time", **period(since, until, month))
    if output is Format.JSON:
        show(view, output)
        return
    rows = [_time_row(row) | row for row in view["endpoints"]]
    show(rows, output, ("endpoint", *TIME_COLUMNS), "accelerator seconds by endpoint", SPARE)
    if view["lent"]:
        lent = [{**row, "seconds": _s(row["duration_ms"])} for row in view["lent"]]
        show(lent, output, ("lender", "borrower", "seconds"), "lent")
    if view["platform"]:
        accelerators = [_time_row(row) | row | {"wall": _s(row["wall_ms"])} for row in view["accelerators"]]
        show(accelerators, output, ("node", "accelerator", "kind", "wall", *STATES), "accelerator seconds, each", SPARE)
        platform = view["platform"].items()
        amounts = {n: value for n, value in platform if value is not None and n.endswith("usd") and "nano" not in n}
        show(amounts, output, None, "platform")


def _time_row(row: dict[str, Any]) -> dict[str, float]:
    return {name: _s(row["states_ms"].get(name, 0)) for name in STATES} | {
        name.removesuffix("_ms"): _s(row[name]) for name in ("lent_ms", "borrowed_ms") if name in row
    }


def _s(ms: int) -> float:
    return ms / 1000


@app.command()
def export(
    since: Since = None,
    until: Until = None,
    month: Month = None,
    form: Annotated[Export, typer.Option("--format", help="csv and parquet are traces")] = Export.CSV,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="write here instead of to the terminal")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """One line a request: csv and parquet are traces for `tidegate simulate` (t_s,endpoint,input_tokens,output_tokens),
    cloudevents and lago events for metering systems, focus costs by the hour (FOCUS 1.0).
    """
    if form is Export.PARQUET and file is None:
        raise Problem("--format parquet needs --file", exit_code=2)
    asked = Export.CSV if form is Export.PARQUET else form
    text = Api(url, key).text("usage/export", **period(since, until, month), format=asked.value)
    if form is Export.PARQUET and file is not None:
        _parquet(text, file)
    elif output is Format.JSON:
        show(_rows(text, form), output)
        return
    elif file is None:
        sys.stdout.write(text)
        return
    else:
        save(file, text)
    header = 0 if form in (Export.CLOUDEVENTS, Export.LAGO) else 1
    typer.echo(f"{max(len(text.splitlines()) - header, 0)} rows to {file}", err=True)


def _parquet(text: str, file: Path) -> None:
    try:
        import polars
    except ImportError:
        raise Problem("--format parquet needs polars: pip install 'tidegate[advisor]'", exit_code=2) from None
    kinds = {
        "t_s": polars.Float64, "endpoint": polars.String, "input_tokens": polars.Int64, "output_tokens": polars.Int64
    }  # fmt: skip
    try:
        polars.read_csv(io.BytesIO(text.encode()), schema=kinds).write_parquet(file)
    except OSError as error:
        raise Problem(f"{file}: {error.strerror}", exit_code=2) from None


def _rows(text: str, form: Export) -> list[dict[str, Any]]:
    if form in (Export.CLOUDEVENTS, Export.LAGO):
        return [json.loads(line) for line in text.splitlines()]
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if form is Export.FOCUS:
        return rows
    return [{name: _typed(name, value) for name, value in row.items()} for row in rows]


def save(file: Path, text: str) -> None:
    """As it is: line ends are the format's own."""
    try:
        file.write_text(text, newline="")
    except OSError as error:
        raise Problem(f"{file}: {error.strerror}", exit_code=2) from None


def _typed(name: str, text: str) -> Any:
    return {"t_s": float, "input_tokens": int, "output_tokens": int}.get(name, str)(text)


def period(since: str | None, until: str | None, month: str | None = None) -> dict[str, str]:
    return given(**{"from": since, "to": until, "period": month})
