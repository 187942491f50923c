"""`tidegate bench`: runs a benchmark of the source checkout (`bench/NAME.py`) prints its figures beside a baseline."""

import importlib
import sys
from pathlib import Path
from typing import Any

import typer

from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="Benchmarks, as ratios against a baseline in the same run.", no_args_is_help=True)
NAMES = ("gateway", "swap", "ledger", "core", "engine", "batch")


def run(name: str) -> dict[str, Any]:
    """The dict `bench/NAME.py` returns from its ``run()``."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / f"{name}.py").is_file():
        raise Problem(f"bench/{name}.py is not here: benchmarks come with the source checkout, not with the package")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return dict(importlib.import_module(f"bench.{name}").run())


def _flat(value: Any, path: str = "") -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in _flat(item, f"{path}.{key}" if path else str(key))]
    return [{"figure": path, "value": value}]


def _print(name: str, output: Format) -> None:
    if output is Format.TABLE:
        typer.echo(f"running bench {name}; this takes a while", err=True)
    figures = run(name)
    show(figures if output is Format.JSON else _flat(figures), output, ("figure", "value"), f"bench {name}")


@app.command()
def gateway(output: Output = Format.TABLE) -> None:
    """CPU and added latency of the gateway against calling the engine directly."""
    _print("gateway", output)


@app.command()
def swap(output: Output = Format.TABLE) -> None:
    """Wake and cold start of a 1 GB model against memory bandwidth and a fresh process."""
    _print("swap", output)


@app.command()
def ledger(output: Output = Format.TABLE) -> None:
    """Journal to rated entry against plain INSERT."""
    _print("ledger", output)


@app.command()
def core(output: Output = Format.TABLE) -> None:
    """Time of one event in the capacity core as the fleet grows."""
    _print("core", output)


@app.command()
def engine(output: Output = Format.TABLE) -> None:
    """Tokens per second of the built-in engine against `generate`."""
    _print("engine", output)


@app.command()
def batch(output: Output = Format.TABLE) -> None:
    """What a killed process costs a batch, how soon real-time traffic is back, and how much idle time is used."""
    _print("batch", output)


@app.command("all")
def all_(output: Output = Format.TABLE) -> None:
    """Every benchmark, one after the other."""
    if output is Format.JSON:
        show({name: run(name) for name in NAMES}, output)
        return
    for name in NAMES:
        _print(name, output)
