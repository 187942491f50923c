"""The table of docs/policy-results.md: every trace × policy × accelerators × SLO, one process a run, resumable.

Run: ``python -m bench.policy_table --traces FOLDER --fleet FILE [--jobs N] [--only TEXT] [--renew] [--render PAGE]``.
Every finished run is a line of JSON in `--out` (default: bench/results/policy_table.jsonl) with the digest of the code
it ran on; what is there is not run again, so the script may be stopped and started at will. ``--renew`` runs rows of
other code again. `--render` replaces the table between the two marks of that page.

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
from dataclasses import asdict, dataclass
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
    """One run. `accelerators` 0: as many as the policy provisions (`dedicated`)."""

    trace: str
    policy: str
    accelerators: int
    slo_ms: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.trace, self.policy, self.accelerators, self.slo_ms


def wanted() -> Iterator[Row]:
    for slo_ms in SLOS_MS:
        for accelerators in (6, 7, 8, 10):
            yield from (Row(COMPOSITE, policy, accelerators, slo_ms) for policy in POOLED)
        yield Row(COMPOSITE, "dedicated", 0, slo_ms)
    for trace, counts in OTHERS.items():
        for accelerators in counts:
            yield from (Row(trace, policy, accelerators, 2_000) for policy in POOLED)
        yield Row(trace, "dedicated", 0, 2_000)


def code_digest() -> str:
    """Of every file that decides a result."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_one(row: Row, traces: Path, fleet: Path) -> dict[str, Any]:
    """In a process of its own, so that `rss_mb` is this run's."""
    found = next(path for path in sorted(traces.glob(f"{row.trace}.*")) if ".endpoints" not in path.name)
    began = time.process_time()
    result = api.simulate(
        found,
        policy=row.policy,
        fleet=fleet if row.trace == COMPOSITE else None,
        accelerators=row.accelerators or None,
        slo_ttft_ms=float(row.slo_ms),
    )
    cpu_s = time.process_time() - began
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    measured = {"cpu_s": round(cpu_s, 1), "rss_mb": rss_mb, "load_average": round(os.getloadavg()[0], 1)}
    return {"row": asdict(row), "code": code_digest(), **measured, "result": result}


def load(out: Path) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """The newest of each row."""
    if not out.exists():
        return {}
    found = (json.loads(line) for line in out.read_text().splitlines())
    return {Row(**line["row"]).key: line for line in found}


def measure(options: argparse.Namespace) -> None:
    code, done = code_digest(), load(options.out)
    rows = [row for row in wanted() if options.only in "/".join(map(str, row.key))]
    rows = [row for row in rows if row.key not in done or (options.renew and done[row.key]["code"] != code)]
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=1) as pool, options.out.open("a") as file:
        runs = [pool.submit(run_one, row, options.traces, options.fleet) for row in rows]
        for number, run in enumerate(as_completed(runs), start=1):
            line = run.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            share = line["result"]["slo_attainment"]
            print(f"{number} of {len(rows)}: {line['row']} {share:.2%} in {line['cpu_s']} s", file=sys.stderr)


HEAD = (
    "| trace | TTFT SLO | policy | accelerators | attainment | worst endpoint | endpoints below 99 % | activations "
    "| cold share | code |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table(lines: dict[tuple[str, str, int, int], dict[str, Any]]) -> str:
    """Markdown, in the order of `wanted`, with what is missing left out."""
    body = []
    for row in wanted():
        line = lines.get(row.key)
        if line is None:
            continue
        result = line["result"]
        worst, code = result["endpoint_attainment_min"], line["code"]
        body.append(
            f"| {row.trace} | {row.slo_ms / 1000:g} s | {row.policy} | {result['accelerators']} "
            f"| {result['slo_attainment']:.2%} | {'–' if worst is None else f'{worst:.1%}'} "
            f"| {result['endpoints_below_99']} | {result['activations']:,} | {result['cold_share']:.1%} | {code} |"
        )
    return "\n".join([HEAD, *body])


def speeds(lines: dict[tuple[str, str, int, int], dict[str, Any]]) -> str:
    """Requests a second of processor time and memory, of tidegate's runs."""
    body = []
    for row in wanted():
        line = lines.get(row.key)
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
    page.write_text(f"{before}{BEGIN}\n{table(lines)}\n\nSpeed of the simulator:\n\n{speeds(lines)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with the traces")
    parser.add_argument("--fleet", type=Path, help="fleet of composite60_24h")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose trace/policy/accelerators/SLO contain this")
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
