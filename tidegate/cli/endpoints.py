"""`tidegate endpoints`: what a tenant calls, as desired and as it is."""

import json
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.client import Api, Key, Url, escaped, given
from tidegate.cli.output import Format, Output, Problem, cell, show, size

app = typer.Typer(help="Create, change, watch and wake endpoints.", no_args_is_help=True)


def whole(name: str | None) -> str | None:
    """Refused here: a bare name would be another path of the API, and the answer to that explains nothing."""
    if name is not None and not all(name.partition("/")):
        raise typer.BadParameter(f"{name[:80]!r} is not TENANT/NAME, e.g. demo/tides")
    return name


Name = Annotated[str, typer.Argument(metavar="TENANT/NAME", callback=whole)]
COLUMNS = ("name", "state", "tier", "mode", "queued", "in_flight", "replicas", "memory", "activation_ms_last", "reason")
BOUNDS = ("size", "from", "count", "p50_ms", "p95_ms", "p99_ms")
SPARE = ("memory", "activation_ms_last", "tier", "queued", "in_flight", "mode")
WAIT_POLL_S = 0.3
WAIT_S_MAX = 600.0
SETTLED = {"ready", "idle", "asleep", "paused"}


@app.command("list")
def list_(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """All endpoints this key may see."""
    rows = Api(url, key).get("endpoints")["data"]
    show(rows if output is Format.JSON else [_row(row) for row in rows], output, COLUMNS, "endpoints", SPARE)


@app.command()
def bounds(output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """What activations take on this fleet, by model size and by the tier they came from; measured."""
    found = Api(url, key).get("activation-bounds")["data"]
    rows = [{"size": group["size"], "from": tier, **took} for group in found for tier, took in group["tiers"].items()]
    show(found if output is Format.JSON else rows, output, BOUNDS, "activation bounds")


@app.command()
def get(name: Name, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """One endpoint: state, reason, replicas, tier, limits."""
    show(Api(url, key).get(f"endpoints/{escaped(name)}"), output, title=name)


@app.command()
def create(
    name: Name,
    model: Annotated[str, typer.Option(help="model directory, hf://, s3://, a GGUF file, or remote://PROVIDER/MODEL")],
    mode: Annotated[str | None, typer.Option(help="serverless | dedicated | dedicated_serverless | batch")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="replicas kept ready without traffic")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="most replicas")] = None,
    concurrency_target: Annotated[int | None, typer.Option(help="requests a replica, where another is wanted")] = None,
    slots: Annotated[int | None, typer.Option(help="requests one replica takes at once")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="bound on the context, for KV memory")] = None,
    accelerator_memory: Annotated[str | None, typer.Option(help="footprint on its accelerator, e.g. 512MiB")] = None,
    price_plan: Annotated[str | None, typer.Option(help="price plan that rates it")] = None,
    engine: Annotated[str | None, typer.Option(help="builtin | llamacpp | vllm | sglang | trtllm | remote")] = None,
    engine_arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of that engine; may be repeated")] = None,
    profile: Annotated[str | None, typer.Option(help="tuning profile for slots and arguments left out")] = None,
    base: Annotated[str | None, typer.Option(help="carry it as a LoRA adapter on this endpoint's replicas")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="wait until it is ready or has failed")] = False,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Create an endpoint; refused where one of that name exists (`apply` changes it)."""
    body = given(
        model=_model(model),
        mode=mode,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        concurrency_target=concurrency_target,
        slots=slots,
        context_tokens=context_tokens,
        accelerator_memory=accelerator_memory,
        price_plan=price_plan,
        engine=engine,
        engine_args=_engine_args(engine_arg),
        profile=profile,
        base=base,
    )
    api = Api(url, key)
    if any(endpoint["name"] == name for endpoint in api.get("endpoints")["data"]):
        raise Problem(f"{name} exists already; `tidegate endpoints apply` changes it", exit_code=2)
    _ensure_tenant(api, name)
    _brief([_apply(api, name, body, wait)], output)


def _engine_args(given: list[str] | None) -> dict[str, str] | None:
    for word in given or ():
        if "=" not in word:
            accepted = "NAME=VALUE, e.g. max_num_seqs=16"
            raise Problem(f"--engine-arg {word!r} is not accepted; accepted: {accepted}", exit_code=2)
    return dict(word.split("=", 1) for word in given) if given else None


@app.command()
def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="TOML or JSON: one endpoint, or a list `endpoints`")],
    wait: Annotated[bool, typer.Option("--wait", help="wait until it is ready or has failed")] = False,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Make endpoints be as the file says: one, or a list `endpoints`. Applying the same again changes nothing."""
    api, applied, declared = Api(url, key), [], _declared(file)
    for body in declared:
        name = str(body.pop("name"))
        body["model"] = _model(str(body.get("model", "")))
        if isinstance(canary := body.get("canary"), dict):
            body["canary"] = canary | {"model": _model(str(canary.get("model", "")))}
        try:
            _ensure_tenant(api, name)
            applied.append(_apply(api, name, body, wait))
        except Problem as problem:
            if len(declared) == 1:
                raise
            before = f"; {len(applied)} of {len(declared)} were applied before it"
            raise Problem(f"{name}: {problem}{before}", problem.exit_code) from None
    if output is Format.JSON and len(applied) > 1:
        show(applied, output)
    else:
        _brief(applied, output)


@app.command()
def delete(name: Name, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Drain an endpoint and remove it; its usage and bills stay."""
    Api(url, key).delete(f"endpoints/{escaped(name)}")
    show({"name": name, "deleted": True}, output)


@app.command()
def wake(name: Name, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Bring an endpoint to ready without waiting for a request."""
    api = Api(url, key)
    api.post(f"endpoints/{escaped(name)}/wake")
    _brief([api.get(f"endpoints/{escaped(name)}")], output)


@app.command()
def sleep(name: Name, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Give an endpoint's accelerator memory back now; its next request wakes it."""
    api = Api(url, key)
    api.post(f"endpoints/{escaped(name)}/sleep")
    _brief([api.get(f"endpoints/{escaped(name)}")], output)


@app.command()
def logs(name: Name, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Lifecycle lines of an endpoint's replicas, newest first. Never text of requests."""
    rows = Api(url, key).get(f"endpoints/{escaped(name)}/logs")["data"]
    show(rows, output, ("at_ms", "actor", "kind", "reason"), "lines", ("actor",))


@app.command()
def rollback(name: Name, output: Output = Format.TABLE, url: Url = None, key: Key = None) -> None:
    """Drop an endpoint's canary, or go back to what it was before its last change."""
    show(Api(url, key).post(f"endpoints/{escaped(name)}/rollback"), output, title=name)


@app.command()
def watch(
    name: Annotated[str | None, typer.Argument(metavar="TENANT/NAME", callback=whole)] = None,
    events: Annotated[bool, typer.Option("--events", help="capacity decisions with their reasons instead")] = False,
    output: Output = Format.TABLE,
    url: Url = None,
    key: Key = None,
) -> None:
    """Follow endpoints until Ctrl-C: states, limits, attainment as a live table, or with --events every decision."""
    api = Api(url, key)
    if output is Format.TABLE and not events and sys.stdout.isatty():
        from tidegate.cli.endpoints_view import follow

        follow(api, name)
        return
    seen: set[tuple[Any, ...]] = set()  # of the last answers only
    try:
        while True:
            rows = api.get("activity", limit=100)["data"]
            for row in reversed(rows):
                if tuple(row.values()) not in seen and (name is None or name in f"{row['subject']} {row['reason']}"):
                    _line(row, output)
            seen = {tuple(row.values()) for row in rows}
            time.sleep(WAIT_POLL_S)
    except KeyboardInterrupt:
        return


def _line(row: dict[str, Any], output: Format) -> None:
    if output is Format.JSON:
        text = json.dumps(row)
    else:
        at = time.strftime("%H:%M:%S", time.localtime(row["at_ms"] / 1000))
        text = f"{at}  {row['kind']:<16} {row['subject']:<28} {row['reason']}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _row(endpoint: dict[str, Any]) -> dict[str, Any]:
    replicas = [f"{r['state']}@{','.join(r['accelerators']) or r['node']}" for r in endpoint["replicas"]]
    return endpoint | {"replicas": cell(replicas), "memory": size(endpoint["accelerator_bytes"])}


def _apply(api: Api, name: str, body: dict[str, Any], wait: bool) -> dict[str, Any]:
    endpoint = api.put(f"endpoints/{escaped(name)}", body)
    deadline = time.monotonic() + WAIT_S_MAX
    while wait and endpoint["state"] not in SETTLED:
        if endpoint["state"] == "failed":
            raise Problem(f"{name} failed: {endpoint['reason']}")
        if time.monotonic() > deadline:
            raise Problem(f"{name} is still {endpoint['state']} after {WAIT_S_MAX:.0f} s: {endpoint['reason']}")
        time.sleep(WAIT_POLL_S)
        endpoint = api.get(f"endpoints/{escaped(name)}")
    return dict(endpoint)


def _brief(endpoints: Sequence[dict[str, Any]], output: Format) -> None:
    """After an act: lines of the list; `get` shows the whole."""
    show(endpoints[0] if output is Format.JSON else [_row(one) for one in endpoints], output, COLUMNS, "", SPARE)


def _ensure_tenant(api: Api, name: str) -> None:
    tenant = _tenant(name)
    if tenant not in {known["id"] for known in api.get("tenants")["data"]}:
        raise Problem(f"there is no tenant {tenant!r}; `tidegate tenants create {tenant}` makes it", exit_code=2)


def _tenant(name: str) -> str:
    tenant, slash, _ = name.partition("/")
    if not slash:  # of a file; arguments were looked at before
        raise Problem(f"{name!r} is not TENANT/NAME", exit_code=2)
    return tenant


def _model(source: str) -> str:
    """A relative directory is meant relative to where the command runs, not to where the platform does."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _declared(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text()
        loaded = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise Problem(f"{file}: {error.strerror}", exit_code=2) from None
    except (ValueError, tomllib.TOMLDecodeError) as error:
        raise Problem(f"{file}: {error}", exit_code=2) from None
    bodies = loaded.get("endpoints", [loaded]) if isinstance(loaded, dict) else loaded
    if not bodies or not all(isinstance(body, dict) and isinstance(body.get("name"), str) for body in bodies):
        raise Problem(f"{file}: each endpoint needs `name`", exit_code=2)
    return list(bodies)
