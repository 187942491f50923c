"""`tidegate bench advise`: what advice costs, and that it is right: on real traffic at two price sets, the recommended
mode against an exhaustive replay of every offer, accelerator and number of replicas.

The baseline is the bare reading of the same requests by the simulator's own trace reader. CPU seconds of one thread, so
that a busy machine does not show. Traces are taken from the folder named in TIDEGATE_TRACES (or one of traces beside
the checkout) and left out where absent; a week of 200,000 generated requests is measured where none is named. Run:
`python bench/advise.py [--week | --exhaustive] [TRACE…]` (prints JSON).
"""

import datetime
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, process_time
from typing import Any

import numpy as np

from tidegate.advisor import catalogue, estimate, read
from tidegate.advisor.advise import Question, advise
from tidegate.advisor.catalogue import Offer, Provider, TokenPrice
from tidegate.advisor.costs import Costing, Need
from tidegate.advisor.described import describe
from tidegate.advisor.hardware import model_named
from tidegate.advisor.traffic import Traffic
from tidegate.sim import trace

TRACES = Path(os.environ.get("TIDEGATE_TRACES", Path(__file__).parents[2] / "shared" / "traces"))
DEARER = 12.0  # the second price set: tokens at twelve times their price, hours as they are
TARGET_S = 30.0
NEED = Need(model_named("llama-8b"))


def run(exhaustive: bool = False, only: tuple[str, ...] = (), week: bool = False) -> dict[str, Any]:
    """`only`: beginnings of the names of traces to look at; none: the generated week, then all of them. `week`: that
    alone.
    """
    today = datetime.date(2026, 11, 21)
    paths = [p for p in _paths() if not week and (not only or p.name.startswith(only))]
    return {
        "bench": "advise",
        "week_of_200000": None if only else _week(today),
        "traces": [row for path in paths for row in _trace(path, today, exhaustive)],
        "estimate_against_replay": _estimates(paths),
    }


def _week(today: datetime.date) -> dict[str, Any]:
    week = describe("mixed", 200_000 / 7, 900, 150)
    cpu, wall = -process_time(), -monotonic()
    answer = advise(week, catalogue.load(), Question(NEED), today)
    cpu, wall = cpu + process_time(), wall + monotonic()
    return {
        "requests": len(week),
        "offers": len(answer["offers"]),
        "replays": answer["replays"],
        "target_s": TARGET_S,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "share_of_target": round(cpu / TARGET_S, 3),
        "times_reading_it": round(cpu / _reading(week), 1),
    }


def _paths() -> list[Path]:
    return [path for path in sorted(TRACES.glob("*.csv.gz")) if "endpoints" not in path.name]


def _trace(path: Path, today: datetime.date, exhaustive: bool) -> Iterator[dict[str, Any]]:
    traffic = read.read(path)
    everything = traffic.t_ms[-1] <= traffic.t_ms[0]
    for name, factor in (("catalogue", 1.0), (f"tokens x {DEARER:g}", DEARER)):
        question = Question(NEED, 1.0 if everything else 0.0)
        cpu = -process_time()
        answer = advise(traffic, _priced(factor), question, today)
        cpu += process_time()
        row: dict[str, Any] = {"trace": path.name.removesuffix(".csv.gz"), "requests": len(traffic), "prices": name}
        row |= {mode["mode"]: _usd(mode) for mode in answer["modes"]}
        row |= {"recommended": answer["recommended"], "with": answer["recommended_offer"], "cpu_s": round(cpu, 1)}
        if exhaustive:
            whole = advise(traffic, _priced(factor), replace(question, need=replace(NEED, exhaustive=True)), today)
            best, again = (next(m for m in a["modes"] if m["mode"] == a["recommended"]) for a in (answer, whole))
            row["exhaustive"] = whole["recommended"]
            row["dearer_than_exhaustive"] = round(best["monthly_usd"] / again["monthly_usd"] - 1.0, 4)
        yield row


def _usd(mode: dict[str, Any]) -> str:
    """USD a month; in brackets where the mode does not meet the target."""
    if mode["monthly_usd"] is None:
        return "-"
    return f"{mode['monthly_usd']:.0f}" if mode["feasible"] else f"({mode['monthly_usd']:.0f})"


def _priced(factor: float) -> list[Provider]:
    def offer(old: Offer) -> Offer:
        tokens = [
            TokenPrice(
                model=t.model,
                input=t.input * factor,
                output=t.output * factor,
                cached=None if t.cached is None else t.cached * factor,
            )
            for t in old.tokens
        ]
        return Offer(**({k: getattr(old, k) for k in old.__struct_fields__} | {"tokens": tokens}))

    return [
        Provider(name=p.name, title=p.title, checked=p.checked, sources=p.sources, offer=[offer(o) for o in p.offer])
        for p in catalogue.load()
    ]


def _estimates(paths: list[Path]) -> list[dict[str, Any]]:
    """Replicas by the estimate that break-even rests on, and by replay, on the accelerator of tidegate's price book."""
    own = next(p for p in catalogue.load() if p.name == "tidegate")
    rental = next(o for o in own.offer if o.id == "dedicated").accelerators[0]
    found = []
    for path in paths:
        traffic = read.read(path)
        for model in ("llama-8b", "qwen-32b-fp8"):
            costing = Costing(traffic, replace(NEED, model=model_named(model)))
            curve = costing.curve_of(traffic, rental, 256)
            if curve is None or traffic.t_ms[-1] <= traffic.t_ms[0]:
                continue
            guess = estimate.replicas(curve, traffic.t_ms, traffic.span_ms, NEED.slo_ttft_ms)
            count, done = costing.smallest(curve, traffic)
            meets = not done.lost and float(np.quantile(done.ttft_ms, 0.99)) <= NEED.slo_ttft_ms
            name = path.name.removesuffix(".csv.gz")
            found.append(
                {
                    "trace": name,
                    "model": model,
                    "replicas_estimate": guess,
                    "replicas_replay": count if meets else None,
                    "p99_ttft_estimate": round(estimate.p99_ttft_ms(curve, traffic.t_ms, count)),
                    "p99_ttft_replay": round(float(np.quantile(done.ttft_ms, 0.99))),
                }
            )
    return found


def _reading(traffic: Traffic) -> float:
    """CPU seconds to read as many rows as the simulator reads them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        columns = zip(traffic.t_ms.tolist(), traffic.inputs.tolist(), traffic.outputs.tolist(), strict=True)
        lines = [f"{t / 1e3:.3f},all,{taken},{given}" for t, taken, given in columns]
        path.write_text("\n".join(["t_s,endpoint,input_tokens,output_tokens", *lines]))
        began = process_time()
        for _ in trace.rows(path):
            pass
        return process_time() - began


if __name__ == "__main__":
    names = tuple(word for word in sys.argv[1:] if not word.startswith("-"))
    print(json.dumps(run(exhaustive="--exhaustive" in sys.argv, only=names, week="--week" in sys.argv), indent=2))
