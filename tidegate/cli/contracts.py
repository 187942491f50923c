"""`tidegate contracts`: prepaid token commitments, what is left of them, and credits."""

from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, escaped, given
from tidegate.cli.output import Format, Output, show

app = typer.Typer(help="Prepaid token commitments.", no_args_is_help=True)
COLUMNS = ("id", "tenant", "state", "tokens", "used_tokens", "left_tokens", "percent_used", "expires", "worth_left_usd")


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    tokens: Annotated[int, typer.Option(help="how many tokens")],
    price: Annotated[str, typer.Option(metavar="USD", help="what they cost together")],
    expires: Annotated[str, typer.Option(help="until when they are spendable (ISO 8601)")],
    starts: Annotated[str | None, typer.Option(help="from when on; without it: now")] = None,
    id: Annotated[str | None, typer.Option(help="makes the call idempotent")] = None,
    priority: Annotated[int, typer.Option(help="of several, the lowest is drawn down first")] = 100,
    model: Annotated[list[str] | None, typer.Option(help="only on this model; may be repeated")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="only in this mode; may be repeated")] = None,
    rollover_percent: Annotated[int, typer.Option(help="share of what is unspent that stays spendable")] = 0,
    rollover_days: Annotated[int, typer.Option(help="for how long it does")] = 0,
    overage_plan: Annotated[str | None, typer.Option(help="price plan for what is not covered")] = None,
    on_exhausted: Annotated[
        str | None, typer.Option(metavar="overage|refuse", help="what comes when the tokens are used up; overage")
    ] = None,
    minimum_month: Annotated[
        str | None, typer.Option(metavar="USD", help="least that tokens come to in each whole month")
    ] = None,
    alert_url: Annotated[str | None, typer.Option(help="told at 50, 80 and 100 %, by signed webhook")] = None,
    alert_secret: Annotated[
        str | None, typer.Option(envvar="TIDEGATE_ALERT_SECRET", help="whsec_…; without it one is made")
    ] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Sell a tenant tokens in advance. A secret made for its alerts is shown this once."""
    body = given(
        tenant=tenant,
        tokens=tokens,
        price_usd=price,
        expires=expires,
        starts=starts,
        id=id,
        priority=priority,
        models=model or None,
        modes=mode or None,
        rollover_percent=rollover_percent,
        rollover_days=rollover_days,
        overage_plan=overage_plan,
        on_exhausted=on_exhausted,
        minimum_month_usd=minimum_month,
        alert_url=alert_url,
        alert_secret=alert_secret,
    )
    made = Api(url, key).post("contracts", body)
    if output is Format.JSON:
        show(made, output)
        return
    show(made["contract"] | {"alert_secret": made["alert_secret"]}, output, title="contract")


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="only this tenant's")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """All contracts."""
    show(
        Api(url, key).get("contracts", tenant=tenant)["data"],
        output,
        COLUMNS,
        "contracts",
        ("percent_used", "used_tokens", "state"),
    )


@app.command()
def status(
    id: Annotated[str, typer.Argument(metavar="ID")], output: Output = Format.TABLE, url: Url = None, key: Key = None
) -> None:
    """What is left of one contract, when it ends, who was alerted."""
    found = Api(url, key).get(f"contracts/{escaped(id)}")
    show(found if output is Format.JSON else found | {"alerts": [_alert(a) for a in found["alerts"]]}, output)


@app.command()
def credit(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    usd: Annotated[str, typer.Argument(metavar="USD")],
    note: Annotated[str, typer.Option(help="why; on the invoice's line")] = "",
    id: Annotated[str | None, typer.Option(help="makes the call idempotent")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Give a tenant so much less to pay."""
    body = given(tenant=tenant, usd=usd, note=note, id=id)
    show(Api(url, key).post("credits", body), output, title="credit")


def _alert(alert: dict[str, Any]) -> str:
    return f"{alert['percent']} %: {alert['outcome'] or 'to be sent'}"
