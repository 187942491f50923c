"""`tidegate usage`: what was consumed, and the same as a trace for `simulate`, `plan` and `advise`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url
from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="Tokens and money by endpoint, model, tenant, mode, hour or key.", invoke_without_command=True)

COLUMNS = ("requests", "billed_requests", "input_tokens", "cached_tokens", "output_tokens", "usd")
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
