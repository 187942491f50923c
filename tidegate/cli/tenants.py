"""`tidegate tenants`: who endpoints and bills belong to."""

from typing import Annotated

import typer

from tidegate.cli.client import Api, Key, Url, escaped
from tidegate.cli.output import Format, Output, show

app = typer.Typer(help="Tenants.", no_args_is_help=True)


@app.command("list")
def list_(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """All tenants."""
    listing = Api(url, key).get("tenants")
    show(listing["data"], output, ("id", "created_ms"), "tenants")


@app.command()
def create(
    id: Annotated[str, typer.Argument(metavar="ID")], output: Output = Format.TABLE, url: Url = None, key: Key = None
) -> None:
    """A new tenant; `tidegate keys create ID` gives it a key."""
    show(Api(url, key).post("tenants", {"id": id}), output)


@app.command()
def delete(
    id: Annotated[str, typer.Argument(metavar="ID")], output: Output = Format.TABLE, url: Url = None, key: Key = None
) -> None:
    """Remove a tenant that has no endpoints any more, and its keys and limits; its usage and bills stay."""
    Api(url, key).delete(f"tenants/{escaped(id)}")
    show({"id": id, "deleted": True}, output)
