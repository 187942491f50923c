"""`tidegate join`: one more node or gateway for a running platform, of any region, on its machine or on another."""

from collections.abc import Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tidegate.cli.client import given
from tidegate.cli.files import configured
from tidegate.cli.output import Format, Output, Problem, show

if TYPE_CHECKING:
    from tidegate.assemble.joined import Platform
    from tidegate.config import Config

app = typer.Typer(help="Add a node or a gateway to a running platform.", no_args_is_help=True)

Join = Annotated[Path | None, typer.Option("--join", help="data directory of the platform, where it runs here")]
Region = Annotated[str, typer.Option(help="its region")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="configuration file (default: tidegate.toml)")]
DataDir = Annotated[Path | None, typer.Option(help="its own directory")]
JoinToken = Annotated[
    str, typer.Option("--token", envvar="TIDEGATE_JOIN_TOKEN", help="from `tidegate join token`, for another machine")
]
HERE = Path(".tidegate")


class Kind(StrEnum):
    """What may run on another machine."""

    NODE = "node"
    GATEWAY = "gateway"


Role = Annotated[Kind, typer.Argument(help="what it is")]
T = TypeVar("T")


@app.command()
def node(
    name: Annotated[str, typer.Argument(help="its name, one of its own in the fleet")],
    region: Region,
    join: Join = None,
    token: JoinToken = "",
    config: File = None,
    data_dir: DataDir = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT of its relay, for gateways elsewhere")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT at which gateways elsewhere reach it")] = None,
    accelerators: Annotated[int | None, typer.Option(help="how many CPU accelerators")] = None,
    accelerator_memory: Annotated[str | None, typer.Option(help="memory of each, e.g. 4GiB")] = None,
) -> None:
    """Give this machine's accelerators to a running platform until Ctrl-C."""
    overrides: dict[str, Any] = {"region": region}
    for section, values in (
        ("accelerators", given(count=accelerators, memory=accelerator_memory)),
        ("links", given(listen=listen, address=address)),
    ):
        if values:
            overrides[section] = values

    def part(settings: "Config", platform: "Platform | None") -> Coroutine[Any, Any, None]:
        from tidegate.assemble.joined import run_node

        return run_node(settings, platform, name, token, typer.echo)

    _run(config, {**overrides, "data_dir": data_dir}, join, token, Path("nodes") / name, part)


@app.command()
def gateway(
    region: Region,
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")],
    name: Annotated[str, typer.Option(help="its name, needed on another machine")] = "",
    join: Join = None,
    token: JoinToken = "",
    config: File = None,
    data_dir: DataDir = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
) -> None:
    """Serve the same endpoints on another port until Ctrl-C; replicas of its own region come first."""

    def part(settings: "Config", platform: "Platform | None") -> Coroutine[Any, Any, None]:
        from tidegate.assemble.joined import run_gateway

        if platform is None and not name:
            raise Problem("--name is missing: it is the name that the join token was made for", exit_code=2)
        return run_gateway(settings, platform, name, token, typer.echo)

    overrides = {"region": region, "port": port, "host": host, "data_dir": data_dir}
    _run(config, overrides, join, token, Path("gateways") / (name or region), part)


@app.command("token")
def make_token(
    role: Role,
    name: Annotated[str, typer.Argument(help="the name it will have")],
    region: Region,
    join: Join = None,
    minutes: Annotated[int, typer.Option(min=1, max=10_080, help="how long the token can be used")] = 60,
    output: Output = Format.TABLE,
) -> None:
    """Let one part on another machine join, once. Run it where the platform runs; keep what it prints secret."""
    from tidegate.assemble.links import give_token

    made = _said(lambda: give_token(_settings(None, {}, join or HERE), role, name, region, minutes * 60_000), 2)
    if output is Format.JSON:
        show({"token": made, "role": role, "name": name, "region": region, "minutes": minutes}, output)
    else:
        typer.echo(made)  # alone on its line, for scripts and for whoever copies it


@app.command()
def remove(
    role: Role,
    name: Annotated[str, typer.Argument(help="its name")],
    join: Join = None,
    output: Output = Format.TABLE,
) -> None:
    """Send a part on another machine away: its link ends, its certificate is refused. A new token lets it in again."""
    from tidegate.assemble.links import send_away

    _said(lambda: send_away(_settings(None, {}, join or HERE), role, name))
    show({"removed": f"{role}/{name}"}, output)


@app.command("list")
def members(join: Join = None, output: Output = Format.TABLE) -> None:
    """Parts on other machines that may come in."""
    from tidegate.assemble.links import members as found

    rows = [
        {"role": one.role, "name": one.name, "region": one.region}
        for one in _said(lambda: found(_settings(None, {}, join or HERE)))
    ]
    show(rows, output, title="parts on other machines")


def _run(
    file: Path | None,
    overrides: dict[str, Any],
    join: Path | None,
    token: str,
    own_folder: Path,
    part: Callable[["Config", "Platform | None"], Coroutine[Any, Any, None]],
) -> None:
    """`own_folder` is the part's below the directory of a platform that runs here. Where it is on another machine is
    said by a token, or by what an earlier one has left in the data directory.
    """
    settings = _settings(file, overrides, overrides["data_dir"])
    import uvloop

    from tidegate.assemble.joined import find
    from tidegate.assemble.membership import has_joined

    if join is None and (token or has_joined(settings)):
        _said(lambda: uvloop.run(part(settings, None)))
        return
    here = join or HERE
    if overrides["data_dir"] is None:
        settings = _settings(file, overrides, here / own_folder)
    _said(lambda: uvloop.run(part(settings, find(_settings(file, {}, here)))))


def _settings(file: Path | None, overrides: dict[str, Any], data_dir: Path | None) -> "Config":
    return configured(file, {**overrides, "data_dir": data_dir})


def _said(act: Callable[[], T], exit_code: int = 1) -> T:
    from tidegate.assemble.sockets import StartError
    from tidegate.domain.errors import Fault

    try:
        return act()
    except StartError as error:
        raise Problem(str(error), exit_code) from None
    except Fault as fault:
        raise Problem(fault.reason, exit_code) from None
