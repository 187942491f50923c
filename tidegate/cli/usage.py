"""`tidegate usage`: what was consumed, and the same as a trace for `simulate`, `plan` and `advise`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url
from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="Tokens and money by endpoint, model, tenant, mode, hour or key.", invoke_without_command=True)

COLUMNS = ("requests", "billed_requests", "input_tokens", "cached_tokens", "output_tokens", "usd")
STATES = ("busy", "idle", "activating", "draining", "asleep", "free", "unreported")
TIME_COLUMNS = (*STATES[:5], "lent", "borrowed", "tokens_usd", "time_usd", "dedicated_usd", "margin_usd")
By = Annotated[str, typer.Option("--by", help="endpoint | model | tenant | mode | hour | key")]
Since = Annotated[str | None, typer.Option("--from", help="start of the period")]
Until = Annotated[str | None, typer.Option("--to", help="end of the period")]


@app.callback()
def usage(
    context: typer.Context,
    by: By = "endpoint",
    since: Since = None,
    until: Until = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Usage of the current month, or of --from to --to."""
    if context.invoked_subcommand is not None:
        return
    answer = Api(url, key).get("usage", by=by, **period(since, until))
    rows = [{by: row.pop("group")} | row for row in answer["rows"]]
    if output is Format.TABLE and len(rows) > 1:
        rows.append({by: "total"} | answer["total"])
    show(rows, output, (by, *COLUMNS), f"usage by {by}")


@app.command("time")
def time_(
    since: Since = None,
    until: Until = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Accelerator time by endpoint and state, in seconds: what was lent to whom, what it brought in, what is left."""
    view = Api(url, key).get("usage/time", **period(since, until))
    if output is Format.JSON:
        show(view, output)
        return
    rows = [_time_row(row) | row for row in view["endpoints"]]
    show(rows, output, ("endpoint", *TIME_COLUMNS), "accelerator seconds by endpoint")
    if view["lent"]:
        lent = [{**row, "seconds": _s(row["duration_ms"])} for row in view["lent"]]
        show(lent, output, ("lender", "borrower", "seconds"), "lent")
    if view["platform"]:
        accelerators = [_time_row(row) | row | {"wall": _s(row["wall_ms"])} for row in view["accelerators"]]
        show(accelerators, output, ("node", "accelerator", "kind", "wall", *STATES), "accelerator seconds, each")
        amounts = {name: value for name, value in view["platform"].items() if name.endswith("usd")}
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
    file: Annotated[Path | None, typer.Option("--file", "-f", help="write here instead of to the terminal")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """One line a request, t_s,endpoint,input_tokens,output_tokens: a trace for `tidegate simulate`."""
    text = Api(url, key).text("usage/export", **period(since, until))
    if output is Format.JSON:
        header, *lines = text.splitlines()
        rows = [dict(zip(header.split(","), _typed(line), strict=True)) for line in lines]
        show(rows, output)
    elif file is None:
        sys.stdout.write(text)
    else:
        save(file, text)
        typer.echo(f"{len(text.splitlines()) - 1} requests to {file}", err=True)


def save(file: Path, text: str) -> None:
    """As it is: line ends are the format's own."""
    try:
        file.write_text(text, newline="")
    except OSError as error:
        raise Problem(f"{file}: {error.strerror}") from None


def _typed(line: str) -> list[Any]:
    at, endpoint, taken, given = line.split(",")
    return [float(at), endpoint, int(taken), int(given)]


def period(since: str | None, until: str | None) -> dict[str, str]:
    return {name: value for name, value in (("from", since), ("to", until)) if value is not None}
