"""`tidegate batches`: offline work at half the price, from a file of requests or from a table."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.batch_client import Batches, Key
from tidegate.cli.batch_progress import Progress
from tidegate.cli.client import Url
from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="Offline work on idle accelerators, at the batch price.", no_args_is_help=True)

BatchId = Annotated[str, typer.Argument(metavar="BATCH")]
COLUMNS = ("id", "status", "model", "total", "completed", "failed", "output_tokens", "created_ms")
APIS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@app.command()
def create(
    file: Annotated[Path, typer.Argument(help="JSONL, one request a line (OpenAI's batch format)")],
    endpoint: Annotated[str | None, typer.Option(help="API the lines call; else what the first line says")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="show how far it is until it has ended")] = True,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Upload FILE, create a batch of it and follow it to its end; Ctrl-C stops following, not the batch. Exit code 1
    when it ends otherwise than completed.
    """
    api = _api_of(file) if endpoint is None else endpoint
    batches = Batches(url, key)
    with Progress(quiet=output is Format.JSON) as progress:
        batch = batches.create(file, api, progress.uploading)
        if wait:
            batch = _follow(batches, batch["id"], progress)
    _show(batch, output)
    if wait and batch["status"] != "completed":
        raise typer.Exit(1)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """This tenant's batches, newest first."""
    rows = Batches(url, key).call("GET", "batches", params={"limit": limit})["data"]
    show(rows if output is Format.JSON else [_row(row) for row in rows], output, COLUMNS, "batches")


@app.command()
def get(
    batch: BatchId,
    wait: Annotated[bool, typer.Option("--wait", help="follow it to its end")] = False,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """One batch: its status, its counts, what is wrong with its file."""
    batches = Batches(url, key)
    with Progress(quiet=output is Format.JSON or not wait) as progress:
        found = _follow(batches, batch, progress) if wait else batches.get(batch)
    _show(found, output)


@app.command()
def cancel(batch: BatchId, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Cancel a batch; what is finished is kept."""
    _show(Batches(url, key).call("POST", f"batches/{batch}/cancel"), output)


@app.command()
def results(
    batch: BatchId,
    errors: Annotated[bool, typer.Option("--errors", help="the lines that failed instead")] = False,
    to: Annotated[Path | None, typer.Option("--to", help="write to a file instead of the terminal")] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """The lines of the output file (or of the error file), as JSONL."""
    batches = Batches(url, key)
    found = batches.get(batch)
    file_id = found["error_file_id" if errors else "output_file_id"]
    if file_id is None:
        raise Problem(f"{batch} is {found['status']} and has no {'error' if errors else 'output'} file")
    if to is None:
        for piece in batches.content(file_id):
            sys.stdout.buffer.write(piece)
        return
    with to.open("wb") as target:
        for piece in batches.content(file_id):
            target.write(piece)


@app.command()
def run(
    input_: Annotated[Path, typer.Option("--input", help="a table: .csv or .parquet")],
    prompt: Annotated[str, typer.Option(help="a prompt a row, with {column} for its values")],
    model: Annotated[str, typer.Option(help="the endpoint to ask")],
    to: Annotated[Path | None, typer.Option("--to", help="where results go; else INPUT.results.EXT")] = None,
    column: Annotated[str, typer.Option(help="name of the column of answers")] = "answer",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="most tokens an answer")] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt for all rows")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Ask a model once a row and write the answers beside the rows. Run again to go on where it stopped."""
    from tidegate.cli.batch_table import Table

    table = Table(input_, to, prompt, column, model, max_tokens=max_tokens, system=system)
    batches = Batches(url, key)
    for part in table.parts():
        batch_id = table.submitted(part)
        if batch_id is None:
            batch_id = batches.create_from(table.lines(part), f"{input_.stem}-{part}.jsonl", APIS[0])["id"]
            table.note(part, batch_id)
        with Progress(quiet=output is Format.JSON) as progress:
            batch = _follow(batches, batch_id, progress)
        if batch["status"] == "failed":
            table.forget(part)
            _show(batch, output)
            raise Problem("the batch failed; see its errors above")
        for file_id in (batch["output_file_id"], batch["error_file_id"]):
            if file_id is not None:
                table.take(b"".join(batches.content(file_id)))
    show(table.write(), output, title="results")


def _follow(batches: Batches, batch_id: str, progress: Progress) -> dict[str, Any]:
    try:
        return batches.follow(batch_id, progress.show)
    except KeyboardInterrupt:
        raise Problem(f"{batch_id} goes on; `tidegate batches get {batch_id} --wait` follows it again") from None


def _api_of(file: Path) -> str:
    import json

    try:
        with file.open("rb") as lines:
            first = json.loads(lines.readline(16 << 20))
        api = str(first["url"])
    except OSError as error:
        raise Problem(f"{file}: {error.strerror}", exit_code=2) from None
    except (ValueError, KeyError, TypeError):
        raise Problem(f"{file}: line 1 is not a batch request with a `url`; say --endpoint", exit_code=2) from None
    if api not in APIS:
        raise Problem(f"{file}: line 1 has url {api!r}; accepted: {', '.join(APIS)}", exit_code=2)
    return api


def _show(batch: dict[str, Any], output: Format) -> None:
    if output is Format.JSON:
        show(batch, output)
        return
    row = _row(batch)
    if batch.get("cost_nano_usd") is not None:
        row["cost_usd"] = f"{batch['cost_nano_usd'] / 1e9:.6f}"
    row |= {name: batch[name] for name in ("input_file_id", "output_file_id", "error_file_id")}
    show(row, output, title=batch["id"])
    if batch["errors"]:
        show(batch["errors"]["data"], output, ("line", "code", "param", "message"), "errors")


def _row(batch: dict[str, Any]) -> dict[str, Any]:
    counts = {name: batch["request_counts"][name] for name in ("total", "completed", "failed")}
    tokens = {"output_tokens": batch["usage"]["output_tokens"]}
    created = {"created_ms": batch["created_at"] * 1000}
    return {name: batch[name] for name in ("id", "status", "model")} | created | counts | tokens
