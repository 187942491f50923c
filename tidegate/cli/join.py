"""`tidegate join`: one more node or gateway for a platform that runs on this machine, of the same or another region."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.output import Problem

if TYPE_CHECKING:
    from tidegate.assemble.joined import Platform
    from tidegate.config import Config

app = typer.Typer(help="Add a node or a gateway to a running platform.", no_args_is_help=True)

Join = Annotated[Path, typer.Option("--join", help="data directory of the running platform")]
Region = Annotated[str, typer.Option(help="its region")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="configuration file (default: tidegate.toml)")]


@app.command()
def node(
    name: Annotated[str, typer.Argument(help="its name, one of its own in the fleet")],
    region: Region,
    join: Join = Path(".tidegate"),
    config: File = None,
    data_dir: Annotated[Path | None, typer.Option(help="its own directory (default: JOIN/nodes/NAME)")] = None,
    accelerators: Annotated[int | None, typer.Option(help="how many CPU accelerators")] = None,
    accelerator_memory: Annotated[str | None, typer.Option(help="memory of each, e.g. 4GiB")] = None,
) -> None:
    """Give this machine's accelerators to a running platform until Ctrl-C."""
    shape = {"count": accelerators, "memory": accelerator_memory}
    given = {key: value for key, value in shape.items() if value is not None}
    overrides: dict[str, Any] = {"region": region, "data_dir": data_dir or join / "nodes" / name}
    if given:
        overrides["accelerators"] = given

    def part(settings: "Config", platform: "Platform") -> Coroutine[Any, Any, None]:
        from tidegate.assemble.joined import run_node

        return run_node(settings, platform, name, typer.echo)

    _run(config, overrides, join, part)


@app.command()
def gateway(
    region: Region,
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")],
    join: Join = Path(".tidegate"),
    config: File = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
) -> None:
    """Serve the same endpoints on another port until Ctrl-C; replicas of its own region come first."""

    def part(settings: "Config", platform: "Platform") -> Coroutine[Any, Any, None]:
        from tidegate.assemble.joined import run_gateway

        return run_gateway(settings, platform, typer.echo)

    _run(config, {"region": region, "port": port, "host": host}, join, part)


def _run(
    file: Path | None,
    overrides: dict[str, Any],
    join: Path,
    part: Callable[["Config", "Platform"], Coroutine[Any, Any, None]],
) -> None:
    from tidegate.config import ConfigError, load

    try:
        settings, running = load(file, overrides), load(file, {"data_dir": join})
    except ConfigError as error:
        lines = "\n  ".join(f"{key}: {reason}" for key, reason in error.problems)
        raise Problem(f"configuration is refused\n  {lines}", exit_code=2) from None
    import uvloop

    from tidegate.assemble.joined import find
    from tidegate.assemble.sockets import StartError
    from tidegate.domain.errors import Fault

    try:
        uvloop.run(part(settings, find(running)))
    except StartError as error:
        raise Problem(str(error)) from None
    except Fault as fault:
        raise Problem(fault.reason) from None
