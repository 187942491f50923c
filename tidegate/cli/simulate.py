"""`tidegate simulate` and `tidegate plan`: the policy that runs live, on a recorded trace and a virtual clock."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.output import Format, Output, Problem, show

POLICIES = ("tidegate", "dedicated", "fixed-keepalive", "lru", "knative")

Trace = Annotated[Path, typer.Option(help="CSV, CSV.gz or Parquet: t_s,endpoint,input_tokens,output_tokens")]
Fleet = Annotated[Path | None, typer.Option(help="fleet and model profiles (TOML)")]
Slo = Annotated[int, typer.Option("--slo-ttft-ms", min=1, help="TTFT target beyond the prefill itself")]


def simulate(
    trace: Trace,
    policy: Annotated[str, typer.Option(help=" | ".join(POLICIES))] = "tidegate",
    fleet: Fleet = None,
    accelerators: Annotated[int | None, typer.Option(min=1, help="how many, instead of the fleet's own number")] = None,
    slo_ttft_ms: Slo = 2_000,
    output: Output = Format.TABLE,
) -> None:
    """Replay a trace under one policy: attainment, TTFT, activations, accelerator-hours."""
    if policy not in POLICIES:
        raise Problem(f"policy {policy!r} is not one of {', '.join(POLICIES)}", exit_code=2)
    from tidegate.sim import api

    with _counting(output) as count:
        result = _run(
            lambda: api.simulate(
                trace, policy=policy, fleet=fleet, accelerators=accelerators, slo_ttft_ms=slo_ttft_ms, progress=count
            )
        )
    show(result, output, title=f"{policy} on {trace.name}")


def plan(
    trace: Trace,
    fleet: Fleet = None,
    attainment: Annotated[float, typer.Option(min=0.5, max=1.0, help="share of requests within the target")] = 0.99,
    slo_ttft_ms: Slo = 2_000,
    output: Output = Format.TABLE,
) -> None:
    """The fewest accelerators that meet a target, by policy, beside a lower bound."""
    from tidegate.sim import api

    result = _run(lambda: api.plan(trace, fleet=fleet, attainment=attainment, slo_ttft_ms=slo_ttft_ms))
    show(result, output, title=f"plan for {trace.name}")


@contextmanager
def _counting(output: Format) -> Iterator[Callable[[int], None] | None]:
    """A counter of simulated requests for people who wait; nothing where a program reads."""
    if output is Format.JSON or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading the trace") as status:
        yield lambda done: status.update(f"{done:,} requests simulated")


def _run(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from tidegate.domain.errors import Refusal

    try:
        return work()
    except Refusal as refusal:
        raise Problem(refusal.message, exit_code=2) from None
    except OSError as error:
        raise Problem(f"{error.filename}: {error.strerror}", exit_code=2) from None
