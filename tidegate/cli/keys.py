"""`tidegate keys`: API keys. A secret is shown once, when it is made; only its hash is kept."""

from typing import Annotated

import typer

from tidegate.cli.client import Api, Key, Url, escaped, given
from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="API keys of tenants and operators.", no_args_is_help=True)
COLUMNS = ("id", "tenant", "admin", "state", "hint", "created_ms", "expires_ms")


@app.command("list")
def list_(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """All keys, without their secrets."""
    show(Api(url, key).get("keys")["data"], output, COLUMNS, "keys")


@app.command()
def create(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="an operator's key instead of a tenant's")] = False,
    expires_in_s: Annotated[
        int | None, typer.Option(help="lifetime in seconds; without it the key does not expire")
    ] = None,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """A new key. Its secret is shown this once."""
    if (tenant is None) is not admin:
        raise Problem("name a tenant, or say --admin", exit_code=2)
    show(Api(url, key).post("keys", given(tenant=tenant, admin=admin, expires_in_s=expires_in_s)), output)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID")], output: Output = Format.TABLE, url: Url = None, key: Key = None
) -> None:
    """Stop a key from working, at once."""
    answer = Api(url, key).delete(f"keys/{escaped(id)}")
    show(answer or {"id": id, "state": "revoked"}, output)
