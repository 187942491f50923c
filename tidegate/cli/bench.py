"""`tidegate bench`: runs a benchmark of the source checkout (`bench/NAME.py`), prints its figures beside a baseline."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from tidegate.cli.output import Format, Output, Problem, show

app = typer.Typer(help="Benchmarks, as ratios against a baseline in the same run.", no_args_is_help=True)

BENCHES = {
    "gateway": "CPU and added latency of the gateway against calling the engine directly.",
    "swap": "Wake and cold start of a 1 GB model against memory bandwidth and a fresh process.",
    "ledger": "Journal to rated entry against plain INSERT.",
    "limits": "What rates and budgets cost a request at the gateway, beside reading its head.",
    "core": "Time of one event in the capacity core as the fleet grows.",
    "engine": "Tokens per second of the built-in engine against `generate`.",
    "foreign": "Tokens per second of llama-server and vLLM beside the built-in engine.",
    "adapters": "Fifty LoRA adapters on one replica against the bare base.",
    "weights": "Loading weights, cold and warm, against the disk, one memory copy and other loaders.",
    "fill": "Filling the disk cache from a Hub against the link, the disk and the hash.",
    "advise": "What advice costs, and its recommendation against an exhaustive replay, on real traffic.",
    "alternate": "Two endpoints take turns on one accelerator for five minutes.",
    "wake_gpu": "Wake of a 16 GB and a 60 GB model against pinned bandwidth; needs an NVIDIA GPU.",
    "activation": "Where the time of a request goes that has to swap one model for another, step by step.",
    "dedicated_like": "Eight endpoints on two accelerators against the same eight on eight.",
    "fairness": "Nine quiet tenants beside one that floods, with and without the flood.",
    "hybrid": "Overflow and fallback: who served what, and what each cost.",
    "sessions": "Time to first token in a WebSocket session against plain requests: quiet, busy, evicted.",
    "livechange": "Every kind of live change under load: what failed, what was doubled.",
    "batch": "What a killed process costs a batch, how soon real-time traffic is back, how much idle time is used.",
    "calibrate": "The live platform and the simulator on the same five minutes of traffic.",
    "exactness": "Answers and bills while engines and gateways are killed.",
    "mixed": "Mixed traffic on the whole platform on PostgreSQL while everything dies: what was billed, and what was.",
    "soak": "The whole platform under operations and faults from one seed: what was not as it must be.",
    "faults": "Faults × counts × differences between what was delivered and what was billed.",
}
NAMES = tuple(BENCHES)


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


def _verb(name: str) -> Callable[[Output], None]:
    def verb(output: Output = Format.TABLE) -> None:
        _print(name, output)

    return verb


for _name, _says in BENCHES.items():
    app.command(_name, help=_says)(_verb(_name))


@app.command("all")
def all_(output: Output = Format.TABLE) -> None:
    """Every benchmark, one after the other; hours, on a quiet machine."""
    if output is Format.JSON:
        show({name: run(name) for name in NAMES}, output)
        return
    for name in NAMES:
        _print(name, output)
