"""`tidegate advise`: which mode is cheapest for this traffic at this latency, and what would change the answer."""

import datetime
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url
from tidegate.cli.files import refusals
from tidegate.cli.output import Format, Output, Problem, show
from tidegate.cli.usage import Since, Until, period

NEEDED = (
    "model", "slo_ttft_ms", "tpot_ms", "private", "promised", "async_share", "models_apart", "current", "side_by_side",
    "exhaustive",
)  # fmt: skip
DESCRIBED = ("shape", "requests_per_day", "input_tokens", "output_tokens", "models")


def advise(
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV, CSV.gz, Parquet, JSONL, JSON: a trace, or logs of LiteLLM, OpenAI usage, vLLM"),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="only this endpoint of it")] = None,
    shape: Annotated[str | None, typer.Option(help="no data yet: business-hours | spiky | steady | mixed")] = None,
    requests_per_day: Annotated[float, typer.Option(help="of the described shape")] = 10_000,
    input_tokens: Annotated[int, typer.Option(min=1, help="mean of the described shape")] = 500,
    output_tokens: Annotated[int, typer.Option(min=1, help="mean of the described shape")] = 150,
    models: Annotated[
        int, typer.Option(min=1, max=1000, help="how many models the described shape is spread over")
    ] = 1,
    service_ms: Annotated[
        float | None, typer.Option(min=0.001, help="work without tokens: what each request takes on the accelerator")
    ] = None,
    side_by_side: Annotated[int, typer.Option(min=1, help="such requests a replica takes at once")] = 1,
    model: Annotated[str, typer.Option(help="model whose size and speed counts")] = "llama-8b",
    profile: Annotated[
        Path | None, typer.Option(help="measured curve (`tidegate tune --save`) of the model on an accelerator")
    ] = None,
    slo_ttft_ms: Annotated[float, typer.Option("--slo-ttft-ms", min=1, help="target for the p99 of TTFT")] = 2_000,
    tpot_ms: Annotated[float, typer.Option("--tpot-ms", min=1, help="most that an output token may take")] = 100,
    private: Annotated[bool, typer.Option("--private", help="off-catalog model or isolation is needed")] = False,
    promised: Annotated[bool, typer.Option("--promised", help="a latency promise is needed")] = False,
    async_share: Annotated[float, typer.Option(min=0, max=1, help="share of requests nobody waits for")] = 0.0,
    models_apart: Annotated[bool, typer.Option("--models-apart", help="each endpoint is a model of its own")] = False,
    current: Annotated[str | None, typer.Option(help="the mode in use now")] = None,
    providers: Annotated[list[Path] | None, typer.Option(help="a provider file of yours (may be repeated)")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="only this provider's offers (may be repeated)")] = None,
    column: Annotated[list[str] | None, typer.Option("--columns", help="FIELD=COLUMN (may be repeated)")] = None,
    timezone: Annotated[str | None, typer.Option(help="of times that carry none, and of the hours shown")] = None,
    sort: Annotated[bool, typer.Option("--sort", help="put rows in order of time instead of refusing")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out rows that are not requests")] = False,
    save_trace: Annotated[
        Path | None, typer.Option(help="also write what was read as a trace for `simulate` and `plan` (.csv, .csv.gz)")
    ] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="replay every accelerator and number")] = False,
    claims: Annotated[bool, typer.Option("--claims", help="recompute what articles claim about cost")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="keep measuring a running platform")] = False,
    every_s: Annotated[float, typer.Option("--every-s", min=0.1, help="seconds between looks of --watch")] = 300,
    days: Annotated[float, typer.Option(min=0, help="how long --watch goes on")] = 14,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page here")] = None,
    since: Since = None,
    until: Until = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Replay traffic on every mode and provider: monthly cost, TTFT, break-even, hybrid optimum, and a decision.

    Without --trace and --shape it asks the running platform about its own ledger.
    """
    _act(locals())


def _act(given: dict[str, Any]) -> None:
    """The options by their names: claims, the experiment, a file or shape, or the platform's own ledger."""
    output, endpoint = given["output"], given["endpoint"]
    if given["claims"]:
        _claims(output)
        return
    if given["html"] is not None and not given["html"].parent.is_dir():
        raise Problem(f"--html: there is no directory {given['html'].parent}", exit_code=2)
    needed = {name: given[name] for name in NEEDED} | {"provider": given["provider"] or []}
    if given["profile"] is not None:
        needed["profile"] = _measured(given["profile"], given)
    if given["save_trace"] is not None and given["trace"] is None and given["shape"] is None:
        raise Problem(
            "--save-trace goes with --trace or --shape; `usage export` writes the platform's own", exit_code=2
        )
    if given["watch"]:
        from tidegate.cli.advise_watch import watch as keep_watching

        api, for_s = Api(given["url"], given["key"]), given["days"] * 86_400.0
        keep_watching(lambda: ask_platform(api, endpoint, needed, {}), output, every_s=given["every_s"], for_s=for_s)
        return
    if given["trace"] is None and given["shape"] is None:
        answer = ask_platform(Api(given["url"], given["key"]), endpoint, needed, period(given["since"], given["until"]))
    else:
        how = {name: given[name] for name in ("timezone", "sort", "skip_bad")}
        how["columns"] = _columns(given["column"] or [])
        described = {name: given[name] for name in DESCRIBED}
        answer = _answer(
            given["trace"],
            endpoint,
            described,
            given["service_ms"],
            how,
            needed,
            given["providers"] or [],
            given["save_trace"],
            output,
        )
    if given["html"] is not None:
        _write_page(given["html"], answer)
    if output is Format.JSON:
        show(answer, output)
        return
    from tidegate.cli.advise_view import print_advice

    print_advice(answer)


def _measured(path: Path, given: dict[str, Any]) -> object:
    from tidegate.advisor.measured import read

    if given["watch"] or (given["trace"] is None and given["shape"] is None):
        raise Problem("--profile goes with --trace or --shape; the platform's own ledger was measured", exit_code=2)
    with refusals():
        return read(path)


def _answer(
    trace: Path | None,
    endpoint: str | None,
    described: dict[str, Any],
    service_ms: float | None,
    how: dict[str, Any],
    needed: dict[str, Any],
    files: list[Path],
    saved: Path | None,
    output: Format,
) -> dict[str, Any]:
    with refusals():
        from tidegate.advisor import catalogue, question, read, tables
        from tidegate.advisor import described as shapes
        from tidegate.advisor.advise import advise as ask

        if trace is not None:
            traffic = read.read(trace, read.Reading(**how, service_ms=service_ms))
        else:
            traffic = shapes.describe(**described, service_ms=service_ms or 0.0)
        traffic = question.only(traffic, endpoint)
        if saved is not None:
            tables.write_trace(saved, traffic)
        offers = catalogue.load(files)
        with _counting(output) as progress:
            return ask(traffic, offers, question.build(needed), datetime.datetime.now(datetime.UTC).date(), progress)


def ask_platform(api: Api, endpoint: str | None, needed: dict[str, Any], when: dict[str, str]) -> dict[str, Any]:
    """Advice of the running platform about its own ledger."""
    query = {k: v for k, v in needed.items() if v not in (None, [], False) and k not in ("provider", "exhaustive")}
    return dict(api.get("advice", endpoint=endpoint, provider=",".join(needed["provider"]) or None, **query, **when))


def _columns(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (field, sign, column) in zip(given, pairs, strict=True) if not (field and sign and column)]
    if wrong:
        raise Problem(f"--columns: {wrong[0]!r}; expected FIELD=COLUMN, e.g. input=prompt_tokens", exit_code=2)
    return {field: column for field, _, column in pairs}


def _claims(output: Format) -> None:
    with refusals():
        from tidegate.advisor.claims import check

        found = check()
    if output is Format.JSON:
        show(found, output)
        return
    from tidegate.cli.advise_view import print_claims

    print_claims(found)


def _write_page(path: Path, answer: dict[str, Any]) -> None:
    from tidegate.advisor.page import page

    try:
        path.write_text(page(answer), encoding="utf-8")
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}", exit_code=2) from None
    typer.echo(f"page written to {path}", err=True)


@contextmanager
def _counting(output: Format) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for people who wait; nothing where a program reads."""
    if output is Format.JSON or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("replaying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, whole: bar.update(task, description=what, completed=done, total=whole)
