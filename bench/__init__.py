"""Benchmarks and fault runs: each module has `run() -> dict`; figures are kept in bench/results/."""

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_KINDS = {int: int, float: float, str: str, Path: Path, Path | None: Path}


def main(run: Callable[..., dict[str, Any]]) -> None:
    """``python -m bench.NAME``: the parameters of `run` are the options; prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    for name, parameter in inspect.signature(run).parameters.items():
        kind = _KINDS.get(parameter.annotation)
        if kind is not None:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=parameter.default)
    print(json.dumps(run(**vars(parser.parse_args())), indent=2))
