"""The table of docs/policy-results.md: every trace × policy × accelerators × SLO, one process a run, resumable.

Run: ``python -m bench.policy_table --traces DIR --fleet FILE [--jobs N] [--only TEXT,TEXT] [--renew] [--render PAGE]``.
Every finished run is a line of JSON in `--out` (default: bench/results/policy_table.jsonl) with the digest of the code
it ran on; what is there is not run again, so the script may be stopped and started at will. ``--renew`` runs rows of
other code again. `--render` replaces the table between the two marks of that page.

With ``--batch FILE`` (a batch job's lines as a trace) some rows are run a second time with that job behind the traffic;
the page then also says what of the idle time it used and what that did to real-time requests (`tidegate.sim.harvest`).

Composite runs are on `--fleet`; every other trace has one 14B model behind each endpoint, on the built-in fleet. Speed
is the processor time of the run alone (the accelerators of the trace are simulated), so other load matters little.
"""

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tidegate.sim import api

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "policy_table.jsonl"
BEGIN, END = "<!-- policy table -->", "<!-- end of policy table -->"
KEEP_S = (5, 60, 600, 3_600)
POOLED = ("tidegate", "lru", "knative", *(f"fixed-keepalive:{keep_s}" for keep_s in KEEP_S))
SLOS_MS = (500, 2_000)
COMPOSITE = "composite60_24h"
OTHERS = {
    "manytenant_servegen_mlarge_24h": (3, 4),
    "longtail_gentd26_models_12d": (4, 8),
    "spiky_servegen_7d": (2, 3),
    "diurnal_servegen_7d": (2, 3),
    "spiky_azure_code_1h": (2, 4),
}
CODE = ("tidegate/sim", "tidegate/policy", "tidegate/dispatch", "tidegate/domain")


@dataclass(frozen=True)
class Row:
    """One run. `accelerators` 0: as many as the policy provisions (`dedicated`); `batch`: with the job behind it."""

    trace: str
    policy: str
    accelerators: int
    slo_ms: int
    batch: bool = False

    def __str__(self) -> str:
        name = f"{self.trace}/{self.policy}/{self.accelerators}/{self.slo_ms}"
        return f"{name}/batch" if self.batch else name


Lines = dict[Row, dict[str, Any]]
"""What was measured, by row."""


def wanted() -> Iterator[Row]:
    for slo_ms in SLOS_MS:
        for accelerators in (6, 7, 8, 10):
            yield from (Row(COMPOSITE, policy, accelerators, slo_ms) for policy in POOLED)
        yield Row(COMPOSITE, "dedicated", 0, slo_ms)
    yield Row(COMPOSITE, "tidegate", 12, 2_000)  # what batch is compared with there
    for trace, counts in OTHERS.items():
        for accelerators in counts:
            yield from (Row(trace, policy, accelerators, 2_000) for policy in POOLED)
        yield Row(trace, "dedicated", 0, 2_000)


def harvests() -> Iterator[Row]:
    """Those with the job; each has its like without among `wanted`."""
    yield from (Row(COMPOSITE, "tidegate", accelerators, 2_000, batch=True) for accelerators in (8, 10, 12))
    yield from (Row(trace, "tidegate", counts[-1], 2_000, batch=True) for trace, counts in OTHERS.items())


def code_digest() -> str:
    """Of every file that decides a result."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_one(row: Row, traces: Path, fleet: Path, batch: Path | None) -> dict[str, Any]:
    """In a process of its own, so that `rss_mb` is this run's."""
    found = next(path for path in sorted(traces.glob(f"{row.trace}.*")) if ".endpoints" not in path.name)
    began = time.process_time()
    result = api.simulate(
        found,
        policy=row.policy,
        fleet=fleet if row.trace == COMPOSITE else None,
        accelerators=row.accelerators or None,
        slo_ttft_ms=float(row.slo_ms),
        batch_trace=batch if row.batch else None,
    )
    cpu_s = time.process_time() - began
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    measured = {"cpu_s": round(cpu_s, 1), "rss_mb": rss_mb, "load_average": round(os.getloadavg()[0], 1)}
    return {"row": asdict(row), "code": code_digest(), **measured, "result": result}


def load(out: Path) -> Lines:
    """The newest of each row."""
    if not out.exists():
        return {}
    found = (json.loads(line) for line in out.read_text().splitlines())
    return {Row(**line["row"]): line for line in found}


def measure(options: argparse.Namespace) -> None:
    code, done = code_digest(), load(options.out)
    rows = [*wanted(), *(harvests() if options.batch is not None else ())]
    rows = [row for row in rows if any(text in str(row) for text in options.only.split(","))]
    rows = [row for row in rows if row not in done or (options.renew and done[row]["code"] != code)]
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=1) as pool, options.out.open("a") as file:
        runs = [pool.submit(run_one, row, options.traces, options.fleet, options.batch) for row in rows]
        for number, run in enumerate(as_completed(runs), start=1):
            line = run.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            share = line["result"]["slo_attainment"]
            print(f"{number} of {len(rows)}: {Row(**line['row'])} {share:.2%} in {line['cpu_s']} s", file=sys.stderr)


SHOWN = ("tidegate", "lru", "knative", "fixed-keepalive:60", "dedicated")  # of other traces

HEAD = (
    "| trace | TTFT SLO | policy | accelerators | attainment | worst endpoint | endpoints below 99 % | activations "
    "| cold share | code |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table(lines: Lines) -> str:
    """Markdown, in the order of `wanted`, with what is missing left out."""
    body = []
    for row in wanted():
        line = lines.get(row)
        if line is None or (row.trace != COMPOSITE and row.policy not in SHOWN):
            continue
        result = line["result"]
        worst, code = result["endpoint_attainment_min"], line["code"]
        body.append(
            f"| {row.trace} | {row.slo_ms / 1000:g} s | {row.policy} | {result['accelerators']} "
            f"| {result['slo_attainment']:.2%} | {'–' if worst is None else f'{worst:.1%}'} "
            f"| {result['endpoints_below_99']} | {result['activations']:,} | {result['cold_share']:.1%} | {code} |"
        )
    return "\n".join([HEAD, *body])


def harvest_table(lines: Lines) -> str:
    """Batch behind the traffic: what it got, and TTFT with it and without."""
    body = []
    for row in harvests():
        line, without = lines.get(row), lines.get(replace(row, batch=False))
        if line is None or without is None:
            continue
        result, before = line["result"], without["result"]["ttft_ms"]["p99"]
        share, after = result["harvest_share"], result["ttft_ms"]["p99"]
        body.append(
            f"| {row.trace} | {row.accelerators} | {result['idle_accelerator_hours']:.1f} h "
            f"| {result['batch_accelerator_hours']:.1f} h | {'–' if share is None else f'{share:.0%}'} "
            f"| {result['batch_lines']:,} of {result['batch_lines'] + result['batch_lines_left']:,} "
            f"| {result['batch_preempted']:,} | {before:,.0f} → {after:,.0f} ms | {line['code']} |"
        )
    head = "| trace | accelerators | idle | batch ran | harvest | lines done | asked again | p99 TTFT | code |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *body])


def speeds(lines: Lines) -> str:
    """Requests a second of processor time and memory, of tidegate's runs."""
    body = []
    for row in wanted():
        line = lines.get(row)
        if line is not None and row.policy == "tidegate" and line["cpu_s"]:
            per_s, load = line["result"]["requests"] / line["cpu_s"], line["load_average"]
            cells = row.trace, str(row.accelerators), f"{row.slo_ms / 1000:g} s", f"{per_s:,.0f}"
            body.append(f"| {' | '.join(cells)} | {1e6 / per_s:.0f} s | {line['rss_mb']} MB | {load} |")
    head = "| trace | accelerators | SLO | requests a CPU second | 1,000,000 requests | peak memory | load average |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *body])


def render(page: Path, out: Path) -> None:
    lines, text = load(out), page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [table(lines)]
    if any(row.batch for row in lines):
        parts += ["Batch behind the traffic (`tidegate` at 2 s; harvest as defined below):", harvest_table(lines)]
    parts += ["Speed of the simulator:", speeds(lines)]
    page.write_text(before + "\n\n".join([BEGIN, *parts, END]) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with the traces")
    parser.add_argument("--fleet", type=Path, help="fleet of composite60_24h")
    parser.add_argument("--batch", type=Path, help="a batch job's lines, as a trace")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose trace/policy/accelerators/SLO contain one of these")
    parser.add_argument("--renew", action="store_true", help="run rows of other code again")
    parser.add_argument("--render", type=Path, help="page whose table to replace")
    options = parser.parse_args()
    if options.traces is not None:
        if options.fleet is None:
            parser.error("--traces needs --fleet, the fleet of composite60_24h")
        measure(options)
    if options.render is not None:
        render(options.render, options.out)


if __name__ == "__main__":
    main()
