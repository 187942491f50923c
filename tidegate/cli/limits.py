"""`tidegate limits`: rates, concurrency and budgets of keys, tenants and endpoints."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, given
from tidegate.cli.output import Format, Output, show, usd

app = typer.Typer(help="Rates, concurrency and budgets of keys, tenants and endpoints.", no_args_is_help=True)
COLUMNS = ("scope", "subject", "requests_per_minute", "tokens_per_minute", "concurrency", "budgets")

_SPAN = {"day": "today", "month": "this month", "total": "in all"}


class Scope(StrEnum):
    KEY = "key"
    TENANT = "tenant"
    ENDPOINT = "endpoint"


What = Annotated[Scope, typer.Argument(metavar="SCOPE", help="key, tenant or endpoint")]
Subject = Annotated[str, typer.Argument(metavar="SUBJECT", help="a key's id, a tenant, or tenant/name")]


@app.command("list")
def list_(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """All limits, and what is left of budgets."""
    rows = Api(url, key).get("limits")["data"]
    show(rows if output is Format.JSON else [_row(row) for row in rows], output, COLUMNS, "limits")


@app.command("set")
def set_(
    scope: What,
    subject: Subject,
    rpm: Annotated[int | None, typer.Option(help="requests a minute")] = None,
    tpm: Annotated[int | None, typer.Option(help="tokens a minute, prompt and answer together")] = None,
    concurrency: Annotated[int | None, typer.Option(help="requests at once")] = None,
    daily: Annotated[str | None, typer.Option(metavar="USD", help="budget of a UTC day")] = None,
    monthly: Annotated[str | None, typer.Option(metavar="USD", help="budget of a UTC calendar month")] = None,
    total: Annotated[str | None, typer.Option(metavar="USD", help="budget in all")] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Set all limits of one key, tenant or endpoint; what is left out is no limit."""
    body = given(
        scope=scope.value,
        subject=subject,
        requests_per_minute=rpm,
        tokens_per_minute=tpm,
        concurrency=concurrency,
        budget_day_usd=daily,
        budget_month_usd=monthly,
        budget_total_usd=total,
    )
    answer = Api(url, key).put("limits", body)
    show(answer if output is Format.JSON else _row(answer), output)


@app.command()
def remove(scope: What, subject: Subject, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Remove every limit of one key, tenant or endpoint."""
    show(Api(url, key).delete("limits", scope=scope.value, subject=subject), output)


def _row(limits: dict[str, Any]) -> dict[str, Any]:
    return limits | {"budgets": [_budget(one) for one in limits["budgets"]]}


def _budget(one: dict[str, Any]) -> str:
    if one["left_usd"] is None:  # just set: what was spent is not known yet
        return f"{usd(one['usd'])} USD {_SPAN[one['window']]}"
    return f"{usd(one['left_usd'])} of {usd(one['usd'])} USD left {_SPAN[one['window']]}"
