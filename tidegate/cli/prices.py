"""`tidegate prices`: the price book. Versions are added; what was rated keeps the version it was rated with."""

from typing import Annotated

import typer

from tidegate.cli.client import Api, Key, Url, escaped, given
from tidegate.cli.output import Format, Output, Problem, console, show

app = typer.Typer(help="The price book.", no_args_is_help=True)
COLUMNS = (
    "id",
    "plan",
    "tenant",
    "endpoint",
    "model",
    "mode",
    "effective",
    "ends",
    "input_usd_per_million",
    "cached_input_usd_per_million",
    "output_usd_per_million",
    "accelerator_hour_usd",
    "accelerator_hours_usd",
    "minimum_usd",
    "batch_percent",
)

Plan = Annotated[str | None, typer.Option(help="price plan; `default` when no terms are named")]
Tenant = Annotated[str | None, typer.Option(help="only for this tenant")]
Endpoint = Annotated[str | None, typer.Option(help="only for this endpoint")]
Model = Annotated[str | None, typer.Option(help="only for this model")]
Mode = Annotated[str | None, typer.Option(help="only in this mode")]
Effective = Annotated[str | None, typer.Option(help="from when on (ISO 8601); without it: now")]


@app.command("list")
def list_(
    plan: Annotated[str | None, typer.Option(help="only this plan")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Every version of every plan."""
    show(Api(url, key).get("prices", plan=plan)["data"], output, COLUMNS, "prices", ("ends", "minimum_usd"))


@app.command("set")
def set_(
    input_usd: Annotated[str, typer.Option("--input-tokens", "--input", help="USD per million prompt tokens")],
    output_usd: Annotated[str, typer.Option("--output-tokens", help="USD per million generated tokens")],
    accelerator_hour: Annotated[str, typer.Option(help="USD per accelerator-hour")],
    cached_input: Annotated[str | None, typer.Option(help="USD per million cached prompt tokens")] = None,
    accelerator_kind: Annotated[
        list[str] | None, typer.Option(metavar="KIND=USD", help="an hour of this kind of accelerator; may be repeated")
    ] = None,
    minimum: Annotated[str | None, typer.Option(help="least a billable request costs, in USD")] = None,
    plan: Plan = None,
    tenant: Tenant = None,
    endpoint: Endpoint = None,
    model: Model = None,
    mode: Mode = None,
    effective: Effective = None,
    retroactive: Annotated[bool, typer.Option("--retroactive", help="may begin in the past, for `rerate`")] = False,
    batch_percent: Annotated[int, typer.Option(help="price of batch work in percent")] = 50,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Add a price version. Terms that name an endpoint come first, then tenant, model, mode, then plans."""
    body = given(
        **_terms(plan, tenant, endpoint, model, mode, effective),
        retroactive=retroactive or None,
        input_usd_per_million=input_usd,
        output_usd_per_million=output_usd,
        cached_input_usd_per_million=cached_input,
        accelerator_hour_usd=accelerator_hour,
        accelerator_hours_usd=_kinds(accelerator_kind) or None,
        minimum_usd=minimum,
        batch_percent=batch_percent,
    )
    show(Api(url, key).post("prices", body), output, title="price")


@app.command()
def end(
    plan: Plan = None,
    tenant: Tenant = None,
    endpoint: Endpoint = None,
    model: Model = None,
    mode: Mode = None,
    effective: Effective = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """From an instant on, these terms price nothing: the next ones in precedence do. `--plan default` ends the last."""
    if not any((plan, tenant, endpoint, model, mode)):
        raise Problem("say which terms end: --plan, --tenant, --endpoint, --model or --mode", exit_code=2)
    body = given(**_terms(plan, tenant, endpoint, model, mode, effective), ends=True)
    show(Api(url, key).post("prices", body), output, title="price")


@app.command()
def rerate(
    start: Annotated[str | None, typer.Option("--from", help="begin of a finished period (ISO 8601)")] = None,
    end: Annotated[str | None, typer.Option("--to", help="its end")] = None,
    period: Annotated[str | None, typer.Option(help="a month, e.g. 2026-10, instead of both")] = None,
    id: Annotated[str | None, typer.Option(help="makes the call idempotent")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be posted")] = False,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Rate a period again by the present price book: reversing entries and new ones, dated now. `undo` undoes it."""
    if not any((start, end, period)):
        raise Problem("say which period: --period 2026-10, or --from and --to", exit_code=2)
    body = given(**{"from": start, "to": end, "period": period, "id": id, "dry_run": dry_run})
    report = Api(url, key).post("prices/rerates", body)
    if output is Format.JSON:
        show(report, output)
        return
    show(report["adjustments"], output, ("tenant", "endpoint", "mode", "kind", "quantity", "usd"), "adjustments")
    posted = "nothing was posted (dry run)" if dry_run else f"posted as {report['id']}"
    console().print(f"difference: {report['difference_usd']} USD; {posted}")


@app.command()
def rerates(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Periods that were rated again."""
    show(Api(url, key).get("prices/rerates")["data"], output, ("id", "start", "end", "at", "undone"), "re-ratings")


@app.command()
def undo(
    id: Annotated[str, typer.Argument(metavar="ID")], output: Output = Format.TABLE, url: Url = None, key: Key = None
) -> None:
    """Take a re-rating back: the opposite of everything it posted."""
    show(Api(url, key).post(f"prices/rerates/{escaped(id)}/undo"), output)


def _terms(*values: str | None) -> dict[str, object]:
    return dict(zip(("plan", "tenant", "endpoint", "model", "mode", "effective"), values, strict=True))


def _kinds(given: list[str] | None) -> dict[str, str]:
    kinds = {}
    for text in given or []:
        kind, equals, amount = text.partition("=")
        if not (kind and equals and amount):
            raise Problem(f"--accelerator-kind: {text!r}; accepted: KIND=USD, e.g. h200=3.50", exit_code=2)
        kinds[kind] = amount
    return kinds
