"""`tidegate prices`: the price book. Versions are added; what was rated keeps the version it was rated with."""

from typing import Annotated

import typer

from tidegate.cli.client import Api, Key, Url
from tidegate.cli.output import Format, Output, show

app = typer.Typer(help="The price book.", no_args_is_help=True)
COLUMNS = (
    "id",
    "plan",
    "effective",
    "input_usd_per_million",
    "cached_input_usd_per_million",
    "output_usd_per_million",
    "accelerator_hour_usd",
    "batch_percent",
)


@app.command("list")
def list_(
    plan: Annotated[str | None, typer.Option(help="only this plan")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Every version of every plan."""
    show(Api(url, key).get("prices", plan=plan)["data"], output, COLUMNS, "prices")


@app.command("set")
def set_(
    input_usd: Annotated[str, typer.Option("--input", help="USD per million prompt tokens")],
    output_usd: Annotated[str, typer.Option("--output-tokens", help="USD per million generated tokens")],
    accelerator_hour: Annotated[str, typer.Option(help="USD per accelerator-hour")],
    cached_input: Annotated[str | None, typer.Option(help="USD per million cached prompt tokens")] = None,
    plan: Annotated[str, typer.Option(help="price plan")] = "default",
    effective: Annotated[str | None, typer.Option(help="from when on (ISO 8601); without it: now")] = None,
    batch_percent: Annotated[int, typer.Option(help="price of batch work in percent")] = 50,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Add a price version."""
    body = {
        "plan": plan,
        "effective": effective,
        "input_usd_per_million": input_usd,
        "output_usd_per_million": output_usd,
        "cached_input_usd_per_million": cached_input,
        "accelerator_hour_usd": accelerator_hour,
        "batch_percent": batch_percent,
    }
    answer = Api(url, key).post("prices", {name: value for name, value in body.items() if value is not None})
    show(answer, output, title=f"plan {plan}")
