"""`tidegate invoices`: what each tenant owes, line by line, beside what dedicated would have cost."""

from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, escaped
from tidegate.cli.output import Format, Output, console, table
from tidegate.cli.output import show as print_
from tidegate.cli.usage import Since, Until, period


def invoices(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="only this tenant's")] = None,
    since: Since = None,
    until: Until = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Invoices of the current month, or of --from to --to."""
    api = Api(url, key)
    asked = period(since, until)
    found = [api.get(f"invoices/{escaped(tenant)}", **asked)] if tenant else api.get("invoices", **asked)["data"]
    if output is Format.JSON:
        print_(found, output)
        return
    if not found:
        print_([], output, title="invoices")
    for invoice in found:
        _print(invoice)


def _print(invoice: dict[str, Any]) -> None:
    printer = console()
    printer.print(
        table(invoice["lines"], ("endpoint", "mode", "item", "quantity", "unit_usd", "usd"), invoice["tenant"])
    )
    until = "" if invoice["finished"] else " so far"
    printer.print(f"total{until}: [bold]{invoice['total_usd']} USD[/]")
    printer.print(
        f"what dedicated would have cost{until}: {invoice['dedicated_total_usd']} USD, "
        f"a difference of {invoice['saved_usd']} USD\n"
    )
