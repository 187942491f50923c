"""`tidegate simulate` and `tidegate plan`: the policy that runs live, on a recorded trace and a virtual clock."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.files import refusals
from tidegate.cli.output import Format, Output, Problem, show

POLICIES = ("tidegate", "dedicated", "fixed-keepalive", "lru", "knative")

Trace = Annotated[Path, typer.Option(help="CSV, CSV.gz or Parquet: t_s,endpoint,input_tokens,output_tokens")]
Fleet = Annotated[Path | None, typer.Option(help="fleet and model profiles (TOML)")]
Slo = Annotated[int, typer.Option("--slo-ttft-ms", min=1, help="TTFT target beyond the prefill itself")]
TRIES_A_PROCESS = 16
ALONE_SHOWN = 8
Tell = Callable[[str, int, int], None]


def simulate(
    trace: Trace,
    policy: Annotated[str, typer.Option(help=" | ".join(POLICIES))] = "tidegate",
    fleet: Fleet = None,
    accelerators: Annotated[
        int | None, typer.Option(min=1, help="how many in all; one machine of the fleet without it")
    ] = None,
    slo_ttft_ms: Slo = 2_000,
    batch_trace: Annotated[Path | None, typer.Option(help="a batch job to do on what the traffic leaves idle")] = None,
    batch_model: Annotated[str | None, typer.Option(help="the fleet's model that does it")] = None,
    html: Annotated[Path | None, typer.Option(help="also write a page: who was where, latency, attainment")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Replay a trace under one policy: attainment, TTFT, activations, accelerator-hours."""
    _known(policy)
    if html is not None and not html.parent.is_dir():  # before the run, not after it
        raise Problem(f"--html: there is no directory {html.parent}", exit_code=2)
    from tidegate.sim import api
    from tidegate.sim.timeline import Timeline

    timeline = Timeline() if html is not None else None
    with _bar(output) as tell, refusals():
        result = api.simulate(
            trace,
            policy=policy,
            fleet=fleet,
            accelerators=accelerators,
            slo_ttft_ms=slo_ttft_ms,
            batch_trace=batch_trace,
            batch_model=batch_model,
            progress=lambda done, total: tell(policy, done, total),
            timeline=timeline,
        )
    if html is not None and timeline is not None:
        from tidegate.sim.page import render

        with refusals():
            html.write_text(render(result, timeline, trace.name), encoding="utf-8")
    show(result, output, title=f"{policy} on {trace.name}")


def plan(
    trace: Trace,
    fleet: Fleet = None,
    attainment: Annotated[float, typer.Option(min=0.5, max=1.0, help="share of requests within the target")] = 0.99,
    slo_ttft_ms: Slo = 2_000,
    each_endpoint: Annotated[bool, typer.Option(help="ask it of every endpoint with 100 requests or more")] = False,
    policy: Annotated[list[str] | None, typer.Option(help="only this policy (may be repeated)")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="policies searched at once, one process each")] = 1,
    output: Output = Format.TABLE,
) -> None:
    """The fewest accelerators that meet a target, by policy, beside a lower bound."""
    for name in policy or ():
        _known(name)
    from tidegate.sim.plan import plan as search

    with _bar(output) as tell, refusals(), _processes(jobs) as pool:
        result = search(
            trace,
            fleet=fleet,
            attainment=attainment,
            slo_ttft_ms=slo_ttft_ms,
            each_endpoint=each_endpoint,
            policies=tuple(policy) if policy else POLICIES,
            pool=pool,
            progress=lambda name, tried, done, total: tell(f"{name} on {tried}" if tried else name, done, total),
        )
    if output is Format.JSON:
        show(result, output)
        return
    every = "each endpoint" if each_endpoint else "all requests"
    title = f"{trace.name}: fewest accelerators for {attainment:.2%} of {every} within {slo_ttft_ms} ms beyond prefill"
    bound = result["lower_bound"]
    rows = [{"policy": name, "accelerators": fewest or "more than 64"} for name, fewest in result["policies"].items()]
    show([*rows, {"policy": bound["name"], "accelerators": f"≥ {bound['accelerators']}"}], output, title=title)
    if each_endpoint:
        _show_bound(bound, output)
    ways = [{"way": way, **costs} for way, costs in result["keep_alive"]["over_clairvoyant"].items()]
    show(ways, output, title="giving idle places up: cost over the clairvoyant's (1 is its equal)")


def _show_bound(bound: dict[str, Any], output: Format) -> None:
    """What the bound of each endpoint rests on: who needs the most alone, and when all together need the most."""
    most = sorted(bound["alone"].items(), key=lambda found: (-found[1], found[0]))[:ALONE_SHOWN]
    rows = [{"asks": f"{name}, alone", "accelerators": f"≥ {count}"} for name, count in most]
    if (peak := bound["peak"]) is not None:
        when = f"all together, {peak['from_s']:,.0f} to {peak['to_s']:,.0f} s"
        rows = [{"asks": when, "accelerators": f"≥ {peak['accelerators']}"}, *rows]
    show(rows, output, title="what the bound rests on")


def _known(policy: str) -> None:
    if policy.partition(":")[0] not in POLICIES:
        raise Problem(f"policy {policy!r} is not one of {', '.join(POLICIES)}", exit_code=2)


def _processes(jobs: int) -> AbstractContextManager[Executor | None]:
    """So many at once; fresh ones (spawned), because the progress bar has a thread."""
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(jobs, max_tasks_per_child=TRIES_A_PROCESS) if jobs > 1 else nullcontext()


@contextmanager
def _bar(output: Format) -> Iterator[Tell]:
    """A progress bar for people who wait; nothing where a program reads."""
    if output is Format.JSON or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        reading = progress.add_task("reading the trace", total=None)
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            policy = what.partition(" on ")[0]
            if policy not in tasks:
                progress.update(reading, visible=False)
                tasks[policy] = progress.add_task(what, total=total)
            if not done:
                progress.reset(tasks[policy])
            progress.update(tasks[policy], description=what, completed=done, total=total)

        yield tell
