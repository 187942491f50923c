"""The command tree. Imports nothing heavy: a verb loads what it needs when it runs, so that ``--help`` is immediate."""

from typing import Annotated

import typer

from tidegate import __version__
from tidegate.cli import (
    advise,
    batches,
    bench,
    contracts,
    demo,
    doctor,
    endpoints,
    invoices,
    join,
    keys,
    limits,
    nodes,
    prices,
    simulate,
    tenants,
    tune,
    up,
    usage,
)

app = typer.Typer(
    name="tidegate",
    help="Private model endpoints on your own accelerators, billed per token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Private model endpoints on your own accelerators, billed per token."""


app.command("up")(up.up)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("tune")(tune.tune)
app.command("invoices")(invoices.invoices)
app.command("simulate")(simulate.simulate)
app.command("plan")(simulate.plan)
app.command("advise")(advise.advise)
app.add_typer(endpoints.app, name="endpoints")
app.add_typer(batches.app, name="batches")
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.add_typer(limits.app, name="limits")
app.add_typer(nodes.app, name="nodes")
app.add_typer(join.app, name="join")
app.add_typer(prices.app, name="prices")
app.add_typer(contracts.app, name="contracts")
app.add_typer(usage.app, name="usage")
app.add_typer(bench.app, name="bench")
