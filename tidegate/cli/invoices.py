"""`tidegate invoices`: what each tenant owes, line by line, beside what dedicated would have cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, escaped
from tidegate.cli.output import Format, Output, console, table, usd
from tidegate.cli.output import show as print_
from tidegate.cli.usage import Month, Since, Until, period, save
from tidegate.domain.units import MS_PER_HOUR

PER_MILLION = ("input_tokens", "cached_input_tokens", "output_tokens")


def invoices(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="only this tenant's")] = None,
    since: Since = None,
    until: Until = None,
    month: Month = None,
    output: Output = Format.TABLE,
    html: Annotated[Path | None, typer.Option("--html", help="write a page that prints well")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="write a spreadsheet")] = None,
    as_of: Annotated[str | None, typer.Option("--as-of", help="cut a running period here (now)")] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Invoices of the current month, or of --from to --to; with what the same traffic would cost in other modes."""
    api = Api(url, key)
    asked = period(since, until, month) | ({"as_of": as_of} if as_of else {})
    files = {form: path for form, path in (("html", html), ("csv", csv)) if path is not None}
    for form, path in files.items():
        save(path, api.text(f"invoices/{escaped(tenant)}" if tenant else "invoices", **asked, format=form))
        typer.echo(f"{form} written to {path}", err=True)
    if files and output is Format.TABLE:
        return
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
    rows = [_row(line) for line in invoice["lines"]]
    printer.print(table(rows, ("endpoint", "mode", "item", "quantity", "price_usd", "usd"), invoice["tenant"]))
    if invoice["overflow"]:
        columns = ("called", "endpoint", "reason", "requests", "usd")
        printer.print(table(invoice["overflow"], columns, "served by another endpoint (in the lines above)"))
    until = "" if invoice["finished"] else " so far"
    printer.print(f"total{until}: [bold]{usd(invoice['total_usd'])} USD[/]")
    printer.print(
        f"what dedicated would have cost{until}: {usd(invoice['dedicated_total_usd'])} USD, "
        f"a difference of {usd(invoice['saved_usd'])} USD"
    )
    same = ", ".join(f"{line['mode']} {usd(line['usd'])} USD" for line in invoice["same_traffic_totals"])
    printer.print(f"the same traffic in other modes{until}: {same}\n")


def _row(line: dict[str, Any]) -> dict[str, Any]:
    """With what its price is for; accelerator time in hours instead of the milliseconds it is counted in."""
    hours, tokens = line["item"] == "accelerator_hours", line["item"] in PER_MILLION
    quantity = round(line["quantity"] / MS_PER_HOUR, 5) if hours else line["quantity"]
    unit = "hour" if hours else "million"
    priced = tokens or (hours and line["unit_usd"] != "0")
    return line | {"quantity": quantity, "price_usd": f"{usd(line['unit_usd'])} / {unit}" if priced else None}
