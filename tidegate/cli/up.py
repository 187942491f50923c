"""`tidegate up`: the whole platform on this machine, until Ctrl-C."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import given
from tidegate.cli.files import configured
from tidegate.cli.output import Format, Output, Problem

ENDPOINTS_SHOWN = 6


def up(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="configuration file (default: tidegate.toml)")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on; 0 takes a free one")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="where everything is kept")] = None,
    accelerators: Annotated[int | None, typer.Option(help="how many CPU accelerators")] = None,
    accelerator_memory: Annotated[str | None, typer.Option(help="memory of each, e.g. 4GiB")] = None,
    demo: Annotated[bool | None, typer.Option("--demo/--no-demo", help="the demo tenant on a first start")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="write URL, keys and endpoints here (JSON) once ready")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Start everything on this machine and serve until Ctrl-C."""
    overrides: dict[str, Any] = {"host": host, "port": port, "data_dir": data_dir, "demo": demo}
    if shape := given(count=accelerators, memory=accelerator_memory):
        overrides["accelerators"] = shape
    serve(config, overrides, ready_file, lambda ready: announce(ready, output))


def serve(config: Path | None, overrides: dict[str, Any], ready_file: Path | None, on_ready: Any) -> None:
    """Runs the platform in this process; returns when it was asked to end. Raises Problem when it cannot start."""
    settings = configured(config, overrides)
    # Only now: these pull in SQL and the web framework, which a refused configuration need not wait for.
    import uvloop

    from tidegate.assemble.sockets import StartError
    from tidegate.assemble.start import run_platform
    from tidegate.domain.errors import Fault

    try:
        uvloop.run(run_platform(settings, ready_file, on_ready))
    except StartError as error:
        raise Problem(str(error)) from None
    except Fault as fault:
        raise Problem(fault.reason) from None


def announce(ready: dict[str, Any], output: Format) -> None:
    """What a person needs to begin: URL, key, and a line to paste. The admin key is left in the ready file."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]tidegate[/] serves on [bold]{ready['base_url']}/v1[/]", markup=True)
    console.print(f"  API key    {ready['api_key'] or '(none: tidegate keys create TENANT)'}", markup=False)
    console.print(f"  endpoints  {_some(ready['endpoints']) or '(none: tidegate endpoints create)'}", markup=False)
    console.print(f"  console    {ready['base_url']}/console   (admin key: {ready['admin_key']})", markup=False)
    if ready["endpoints"] and ready["api_key"]:
        console.print("\n" + curl(ready), markup=False)
    console.print("\nCtrl-C ends it.", style="dim")


def _some(endpoints: list[str]) -> str:
    more = len(endpoints) - ENDPOINTS_SHOWN
    return ", ".join(endpoints[:ENDPOINTS_SHOWN]) + (f" and {more} more (tidegate endpoints list)" if more > 0 else "")


def curl(ready: dict[str, Any]) -> str:
    """A line to paste into a shell."""
    body = {"model": ready["endpoints"][0], "messages": [{"role": "user", "content": "Who are you?"}]}
    return (
        f"curl {ready['base_url']}/v1/chat/completions -H 'Authorization: Bearer {ready['api_key']}' "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )
