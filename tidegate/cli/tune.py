"""`tidegate tune`: with how many requests at once, and which engine arguments, an endpoint does most within its SLO."""

import contextlib
import datetime
import itertools
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, escaped
from tidegate.cli.endpoints import Name
from tidegate.cli.load import Seen, offer
from tidegate.cli.output import Format, Output, Problem, show
from tidegate.wire import profiles

TENANT = "tuning"  # whose usage it is, so that no customer is billed for it
CANDIDATES_MAX = 32
KEY_S = 86_400
COLUMNS = ("slots", "engine_args", "tokens_per_s", "ttft_ms", "tpot_ms", "requests", "failed", "within_slo", "refused")


def tune(
    endpoint: Name,
    slots: Annotated[str, typer.Option(help="requests at once to try, comma-separated")] = "1,2,4,8,16",
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=V1,V2: values of an engine argument to try; may be repeated")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, max=3_600, help="length of the load on each candidate")] = 20.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="words of each prompt")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, max=100_000, help="tokens of each answer")] = 64,
    save: Annotated[Path | None, typer.Option(help="write a profile with the winner's curve to this TOML file")] = None,
    accelerator: Annotated[str, typer.Option(help="what the advisor calls the accelerator it runs on, e.g. h100")] = "",
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Try settings of an endpoint under real load, and find the one with most tokens a second within its SLO.

    A twin of it, with one replica and usage of its own tenant, is loaded and removed again; the endpoint itself is
    left alone. Exit code 1 when nothing keeps the SLO.
    """
    api = Api(url, key)
    wanted = api.get(f"endpoints/{escaped(endpoint)}")
    if wanted["model"]["kind"] != "generative" or wanted["engine"] == "remote" or wanted["base"]:
        accepted = "a generative endpoint with replicas of its own"
        raise Problem(f"{endpoint} cannot be tuned; accepted: {accepted}", exit_code=2)
    candidates = _candidates(slots, engine_arg or [], wanted["engine_args"])
    run = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    curve: list[dict[str, Any]] = []
    with _twin(api, endpoint) as (twin, secret):
        for number, candidate in enumerate(candidates, 1):
            typer.echo(f"{number}/{len(candidates)}: {_words(candidate)}", err=True)
            try:
                api.put(f"endpoints/{escaped(twin)}", _body(wanted, candidate))
            except Problem as problem:
                curve.append({**candidate, "refused": str(problem)})
                continue
            offer(api.url, secret, twin, streams=1, seconds=0.001, **run)  # held until it is there, and warmed up
            seen = offer(api.url, secret, twin, streams=candidate["slots"], seconds=seconds, **run)
            curve.append({**candidate, **_judged(seen, wanted["slo"])})
    kept = [point for point in curve if point.get("within_slo")]
    winner = max(kept, key=lambda point: float(point["tokens_per_s"]), default=None)
    report = {
        "endpoint": endpoint,
        "model": wanted["model"]["digest"],
        "engine": wanted["engine"],
        "slo": wanted["slo"],
        "measured_ms": time.time_ns() // 1_000_000,
        "command": _command(endpoint, slots, engine_arg or [], seconds, prompt_tokens, output_tokens),
        "machine": _machine(api),
        "load_average": os.getloadavg()[0],
        "seconds": seconds,
        **run,
        "winner": winner,
        "curve": curve,
    }
    if save is not None and winner is not None:
        save.write_text(profiles.written(_profile(report, wanted, accelerator)))
    show(report if output is Format.JSON else [_row(point, winner) for point in curve], output, COLUMNS, endpoint)
    if winner is None:
        raise Problem(f"nothing that was tried keeps {endpoint} within its SLO ({wanted['slo']})")


def _candidates(slots: str, engine_arg: list[str], present: dict[str, str]) -> list[dict[str, Any]]:
    counts = slots.split(",")
    if not all(count.strip().isdigit() and int(count) > 0 for count in counts):
        raise Problem(f"--slots {slots!r} is not accepted; accepted: numbers from 1, e.g. 1,4,16", exit_code=2)
    choices: list[list[tuple[str, str]]] = []
    for word in engine_arg:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise Problem(f"--engine-arg {word!r} is not accepted; accepted: NAME=V1,V2", exit_code=2)
        choices.append([(name, value) for value in values.split(",")])
    found = [
        {"slots": int(count), "engine_args": {**present, **dict(chosen)}}
        for chosen in itertools.product(*choices)
        for count in counts
    ]
    if len(found) > CANDIDATES_MAX:
        raise Problem(f"{len(found)} candidates are too many; accepted: at most {CANDIDATES_MAX}", exit_code=2)
    return found


@contextlib.contextmanager
def _twin(api: Api, endpoint: str) -> Iterator[tuple[str, str]]:
    """Name and key of an endpoint beside the one that is tuned; both are gone afterwards, whatever happened."""
    twin = f"{TENANT}/{endpoint.replace('/', '.')}"[: len(TENANT) + 64]
    if TENANT not in {known["id"] for known in api.get("tenants")["data"]}:
        api.post("tenants", {"id": TENANT})
    made = api.post("keys", {"tenant": TENANT, "expires_in_s": KEY_S})
    try:
        yield twin, str(made["secret"])
    finally:
        api.delete(f"keys/{escaped(made['id'])}")
        if any(known["name"] == twin for known in api.get("endpoints")["data"]):
            api.delete(f"endpoints/{escaped(twin)}")


def _body(wanted: dict[str, Any], candidate: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": wanted["model"]["source"],
        "engine": wanted["engine"],
        "engine_args": candidate["engine_args"],
        "slots": candidate["slots"],
        "concurrency_target": candidate["slots"],
        "context_tokens": wanted["limits"]["context_tokens_max"],
        "accelerators_per_replica": wanted["accelerators_per_replica"],
        "regions": wanted["regions"],
        "max_replicas": 1,
    }


def _judged(seen: Seen, slo: dict[str, int]) -> dict[str, Any]:
    ttft = seen.percentile(seen.ttft_ms, slo["percentile"])
    tpot = seen.percentile(seen.tpot_ms, slo["percentile"])
    kept = bool(seen.ttft_ms) and not seen.failed and ttft <= slo["ttft_ms"] and tpot <= slo["tpot_ms"]
    return {
        "tokens_per_s": round(seen.tokens_per_s, 1),
        "ttft_ms": round(ttft, 1),
        "tpot_ms": round(tpot, 2),
        "requests": len(seen.ttft_ms),
        "failed": seen.failed,
        "within_slo": kept,
    }


def _profile(report: dict[str, Any], wanted: dict[str, Any], accelerator: str) -> profiles.Profile:
    """The winner's engine arguments, and how fast they were with how many requests at once."""
    same = [p for p in report["curve"] if "refused" not in p and p["engine_args"] == report["winner"]["engine_args"]]
    fast = [p for p in same if p["requests"] and not p["failed"] and p["tokens_per_s"] > 0]
    day = datetime.datetime.fromtimestamp(report["measured_ms"] / 1000, datetime.UTC).date()
    return profiles.Profile(
        engine=report["engine"],
        source=f"measured on {day} by `{report['command']}` on {report['machine']}, load average "
        f"{report['load_average']:.1f}",
        model=report["model"],
        accelerator=accelerator,
        accelerators_per_replica=wanted["accelerators_per_replica"],
        prompt_tokens=report["prompt_tokens"],
        output_tokens=report["output_tokens"],
        percentile=report["slo"]["percentile"],
        engine_args=report["winner"]["engine_args"],
        curve=[profiles.Point(p["slots"], p["tokens_per_s"], p["ttft_ms"], p["tpot_ms"]) for p in fast],
    )


def _command(
    endpoint: str, slots: str, engine_arg: list[str], seconds: float, prompt_tokens: int, output_tokens: int
) -> str:
    """What measures the same again; without what only the user knows (keys, files)."""
    arguments = "".join(f" --engine-arg {word}" for word in engine_arg)
    tokens = f"--prompt-tokens {prompt_tokens} --output-tokens {output_tokens}"
    return f"tidegate tune {endpoint} --slots {slots}{arguments} --seconds {seconds:g} {tokens}"


def _machine(api: Api) -> str:
    """The platform's accelerators, and this machine's processor, which is the accelerator where that is a CPU."""
    kinds = Counter(a["kind"] for node in api.get("nodes")["data"] for a in node["accelerators"])
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    processor = found[1].strip() if found else platform.machine()
    return f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())} ({os.cpu_count()} cores of {processor})"


def _words(candidate: dict[str, Any]) -> str:
    return " ".join([f"slots={candidate['slots']}", *(f"{k}={v}" for k, v in candidate["engine_args"].items())])


def _row(point: dict[str, Any], winner: dict[str, Any] | None) -> dict[str, Any]:
    arguments = " ".join(f"{k}={v}" for k, v in point["engine_args"].items())
    within = "" if "refused" in point else "best" if point is winner else "yes" if point["within_slo"] else "no"
    return {**point, "engine_args": arguments, "within_slo": within}
