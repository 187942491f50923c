"""`tidegate nodes`: machines, their accelerators and what is resident on them."""

import typer

from tidegate.cli.client import Api, Key, Url
from tidegate.cli.output import Format, Output, cell, show, size

app = typer.Typer(help="Machines and accelerators.", invoke_without_command=True)
COLUMNS = ("node", "region", "accelerator", "kind", "memory", "reserved", "residents", "on disk")


@app.callback()
def nodes(context: typer.Context, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """All nodes (also `tidegate nodes list`)."""
    if context.invoked_subcommand is None:
        _list(output, url, key)


@app.command("list")
def list_(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """All nodes with their accelerators."""
    _list(output, url, key)


def _list(output: Format, url: str | None, key: str | None) -> None:
    found = Api(url, key).get("nodes")["data"]
    if output is Format.JSON:
        show(found, output)
        return
    rows = [
        {
            "node": node["id"],
            "region": node["region"],
            "accelerator": accelerator["id"],
            "kind": accelerator["kind"],
            "memory": size(accelerator["memory_bytes"]),
            "reserved": size(accelerator["reserved_bytes"]),
            "residents": cell(
                [f"{resident['endpoint']} ({resident['state']})" for resident in accelerator["residents"]]
            ),
            "on disk": cell([digest[:8] for digest in node["on_disk"]]),
        }
        for node in found
        for accelerator in node["accelerators"]
    ]
    show(rows, output, COLUMNS, "nodes")
