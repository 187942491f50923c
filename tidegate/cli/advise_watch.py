"""`tidegate advise --watch`: the two-week experiment on a live platform: what the articles ask to be measured, and when
the answer changes.
"""

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import typer

from tidegate.cli.output import Format, Problem

EVERY_S = 300.0
WEEKS_S = 14 * 86_400.0
FAILURES_MAX = 12  # an hour without an answer ends the experiment
COLD_SHARE_MAX = 0.20  # above it the article says to look at dedicated


def watch(
    ask: Callable[[], dict[str, Any]], output: Format, *, every_s: float = EVERY_S, for_s: float = WEEKS_S
) -> None:
    """One line every `every_s` seconds for `for_s` seconds (JSON lines with -o json), until Ctrl-C. `ask` gives the
    platform's advice about its own ledger.
    """
    began = time.monotonic()
    last: str | None = None
    failures = 0
    while True:
        try:
            answer = ask()
            failures = 0
            line = observed(answer, last)
            last = line["recommended"]
            _say(line, output)
        except Problem as problem:
            failures += 1
            if failures >= FAILURES_MAX:
                raise
            typer.echo(f"no answer yet: {problem}", err=True)
        if time.monotonic() - began + every_s > for_s:
            return
        try:
            time.sleep(every_s)
        except KeyboardInterrupt:
            return


def observed(answer: dict[str, Any], last: str | None) -> dict[str, Any]:
    """One observation: the measures, the answer, and whether it is another than `last`."""
    seen = answer["measured"]
    best = next((row for row in answer["modes"] if row["mode"] == answer["recommended"]), None)
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": seen["requests"],
        "hours": round(seen["hours"], 3),
        "cold_share": round(seen["cold_share"], 6),
        "cold_starts_a_day": round(seen["cold_starts_a_day"], 2),
        "accelerator_ms_per_request": round(seen["accelerator_ms_per_request"], 2),
        "p99_ttft_ms": seen["ttft_ms"]["p99"],
        "recommended": answer["recommended"],
        "monthly_usd": best["monthly_usd"] if best else None,
        "changed_from": last if last is not None and last != answer["recommended"] else None,
        "too_cold": seen["cold_share"] > COLD_SHARE_MAX,
    }


def _say(line: dict[str, Any], output: Format) -> None:
    if output is Format.JSON:
        import json

        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        return
    cold = f"cold {100 * line['cold_share']:.2f} % ({line['cold_starts_a_day']:.1f} starts a day)"
    time_taken = f"{line['accelerator_ms_per_request']:.1f} accelerator ms a request"
    typer.echo(f"{line['at']}  {line['requests']:,} requests  {cold}  {time_taken}  → {line['recommended']}")
    if line["changed_from"]:
        typer.echo(f"  THE ANSWER CHANGED: {line['changed_from']} → {line['recommended']}")
    if line["too_cold"]:
        typer.echo("  more than one request in five is cold: if users notice, look at dedicated or keep a replica warm")
