"""What must hold at the end of ``bench.soak``: each rule adds what breaks it to `World.problems`."""

import contextlib
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.exactness import PROMPTS, entries_sum, ledger_rows
from bench.soak_clients import BATCH_LINES, Seen
from bench.soak_world import World

TAIL_S = 15.0  # how long after an act its effects are still its own
SETTLE_S_MAX = 60.0
GATEWAYS = {"kill_gateway", "stop_gateway", "crash", "stop_platform"}
ENGINES = {"kill_engine", "stop_engine", "kill_template", "kill_node", "stop_node", "crash", "stop_platform"}
EXPLAINED = {
    "model_not_found": {"remove", "tenant_gone"},
    "invalid_api_key": {"rotate", "tenant_gone"},
    "revoked_api_key": {"rotate", "tenant_gone"},
    "endpoint_paused": {"pause"},
    "insufficient_quota": {"budget"},
    "rate_limit_exceeded": {"budget"},
    "budget_unavailable": {"budget"},
    "engine_error": ENGINES,
    "endpoint_failed": ENGINES,
    "residency_denied": {"kill_node", "stop_node", "crash", "stop_platform"},
    "not_ready": GATEWAYS,
    "journal_unavailable": {"full_disk"},
}
Said = dict[tuple[str, str, int], str]
Rows = dict[str, dict[str, Any]]


def judge(world: World, seen: list[Seen], said: Said) -> dict[str, Any]:
    """Every rule on what clients saw and what the ledger has."""
    for one in seen:
        _ended_well(world, one)
        _text_is_right(world, one, said)
    rows = _settled(world, {s.request_id for s in seen if s.outcome == "answered" and s.kind != "session"})
    lines = _batches(world, rows, said)
    _billed(world, seen, rows, lines)
    if total := entries_sum(world.platform):
        world.problems.append(f"entries sum to {total}")
    outcomes = Counter(f"{s.kind} {s.outcome} {s.detail}".strip() for s in seen)
    return {"requests": len(seen), "outcomes": dict(sorted(outcomes.items())), "batch_lines": len(lines)}


def _during(world: World, seen: Seen, kinds: set[str]) -> bool:
    return any(o.kind in kinds and o.from_s <= seen.to_s and seen.from_s <= o.to_s + TAIL_S for o in world.ops)


def _ended_well(world: World, seen: Seen) -> None:
    match seen.outcome:
        case "cut" if not _during(world, seen, GATEWAYS):
            world.problems.append(f"cut off, and no gateway was harmed: {seen}")
        case "failed" if not _during(world, seen, EXPLAINED.get(seen.detail, set())):
            world.problems.append(f"unexplained {seen.detail}: {seen}")


def _text_is_right(world: World, seen: Seen, said: Said) -> None:
    if seen.kind in ("embedding", "session"):
        if seen.text:
            world.problems.append(f"{seen.text}: {seen}")
        return
    got = seen.text.rstrip("\ufffd")  # half a character at a cut is no one's text
    true = [said[model, seen.prompt, seen.count].rstrip("\ufffd") for model in world.spoken[seen.endpoint]]
    if not any(got == text if seen.outcome == "answered" else text.startswith(got) for text in true):
        world.problems.append(f"not what its models say: {seen}")


def _settled(world: World, owed: set[str]) -> Rows:
    """The ledger, once all that must be there is, and no more comes."""
    before, deadline = -1, time.monotonic() + SETTLE_S_MAX
    while True:
        rows = {row["id"]: row for row in ledger_rows(world.platform)}
        if (owed <= rows.keys() and len(rows) == before) or time.monotonic() > deadline:
            return rows
        before = len(rows)
        time.sleep(1)


def _billed(world: World, seen: list[Seen], rows: Rows, lines: set[str]) -> None:
    for one in seen:
        row = rows.get(one.request_id)
        billed = row["output_tokens"] if row else 0
        if one.kind == "session":
            continue
        if one.outcome == "answered" and (row is None or billed != one.tokens or row["outcome"] != "completed"):
            world.problems.append(f"billed {billed} {row and row['outcome']}: {one}")
        elif one.outcome == "failed" and billed != one.tokens:
            world.problems.append(f"billed {billed} of a failed one: {one}")
        elif one.outcome == "aborted" and billed < one.tokens and not _during(world, one, GATEWAYS):
            world.problems.append(f"billed {billed}, less than its client read: {one}")
        if row and (row["tenant"], row["endpoint"]) != (one.tenant, one.endpoint):
            world.problems.append(f"billed to {row['tenant']} for {row['endpoint']}: {one}")
    known = {s.request_id for s in seen} | lines
    strange = [row for row in rows.values() if row["id"] not in known and row["output_tokens"]]
    unseen = [row for row in strange if row["mode"] != "batch"]  # of sessions, and of those who were cut off
    told = sum(s.tokens for s in seen if s.kind == "session")
    if sum(row["output_tokens"] for row in unseen) < told:
        world.problems.append(f"sessions were told of {told} tokens, less is billed")
    expected = sum(s.outcome == "cut" for s in seen) + sum(s.count for s in seen if s.kind == "session")
    if len(unseen) > expected:
        world.problems.append(f"{len(unseen)} billed that {expected} asked: {unseen[:2]}")
    doubled = [row for row in strange if row["mode"] == "batch" and row["outcome"] == "completed"]
    if doubled:
        world.problems.append(f"lines billed that no batch has: {doubled[:2]}")


# --- batches ----------------------------------------------------------------------------------------------------------


def _batches(world: World, rows: Rows, said: Said) -> set[str]:
    """Ids of the lines that are done. Each line of a batch is in its files once; what is done is billed once."""
    done: set[str] = set()
    for batch, (tenant, cancelled) in world.batches.items():
        headers = {"authorization": f"Bearer {world.keys[tenant].secret}"}
        with httpx.Client(base_url=world.platform.base_url, headers=headers, timeout=60) as http:
            found = _ended(http, batch)
            if found is None:
                if not any(op.kind == "tenant_gone" and tenant in op.subject for op in world.ops):
                    world.problems.append(f"{batch} of {tenant} is gone")
                continue
            files = [found[name] for name in ("output_file_id", "error_file_id") if found.get(name)]
            texts = [http.get(f"/v1/files/{file}/content").text for file in files]
        names = [re.search(r'"custom_id":"(line-\d+)"', line) for text in texts for line in text.splitlines()]
        lines = [name[1] for name in names if name]
        if len(lines) != len(set(lines)) or (found["status"] == "completed" and len(lines) != BATCH_LINES):
            world.problems.append(f"{batch} {found['status']}: lines {sorted(lines)}")
        away = found["status"] == "failed" and any(o.kind in ("remove", "tenant_gone") for o in world.ops)
        told = {error["code"] for error in found["errors"]["data"]} if away else set()
        if found["status"] not in ("completed", "cancelled" if cancelled else "completed") and told != {
            "model_not_found"
        }:
            world.problems.append(f"{batch} is {found['status']}: {found.get('errors')}")
        finished = [f"{batch}-{name.removeprefix('line-')}" for name in lines]
        done |= {name for name in finished if name in rows}
    return done


def _ended(http: httpx.Client, batch: str) -> dict[str, Any] | None:
    deadline = time.monotonic() + SETTLE_S_MAX
    while True:
        reply = http.get(f"/v1/batches/{batch}")
        if reply.status_code == 404:
            return None
        found: dict[str, Any] = reply.json()
        if found.get("status") in ("completed", "cancelled", "expired", "failed") or time.monotonic() > deadline:
            return found
        time.sleep(0.3)


# --- what is left -----------------------------------------------------------------------------------------------------


def resources(world: World) -> dict[str, dict[str, int]]:
    """Of each long-lived process: descriptors and resident MiB."""
    found = {}
    for process in [psutil.Process(world.platform.process.pid), *world.platform.gateways()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = "gateway" if "tidegate.assemble.gateway" in process.cmdline() else "up"
            found[f"{name} {process.pid}"] = {"fds": process.num_fds(), "mib": process.memory_info().rss >> 20}
    return found


def as_many_as_there_should_be(world: World) -> None:
    """Engines are as many as replicas, and so are their sockets."""
    deadline = time.monotonic() + SETTLE_S_MAX
    while True:
        views = world.admin("GET", "/api/v1/endpoints").json()["data"]
        replicas = sum(len(view["replicas"]) for view in views)
        engines, sockets = len(world.engines()), len(_sockets(world))
        if replicas == engines == sockets:
            return
        if time.monotonic() > deadline:
            world.problems.append(f"{replicas} replicas, {engines} engines, {sockets} sockets of engines")
            return
        time.sleep(0.5)


def _sockets(world: World) -> list[Path]:
    data = world.platform.directory / "data"
    runs = {(folder / "run").resolve() for folder in (data, *data.glob("nodes/*"), data.parent / "far")}
    return [socket for run in runs for socket in run.glob("engine-*.sock")]


def left_over(world: World, before: list[psutil.Process]) -> None:
    """After the end: processes, sockets, tracebacks, prompts and answers."""
    _, alive = psutil.wait_procs(before, 10)
    for process in alive:
        world.problems.append(f"still there: {process}")
    for socket in _sockets(world):
        world.problems.append(f"still there: {socket.name}")
    for file in sorted(world.platform.directory.rglob("*")):
        if not file.is_file() or file.is_symlink():
            continue
        content = file.read_bytes()
        for prompt in PROMPTS:
            if prompt.encode() in content:
                world.problems.append(f"{prompt!r} is in {file.name}")
        if b"Traceback (most recent call last)" in content:
            at = content.index(b"Traceback (most recent call last)")
            shown = content[max(0, at - 300) : at + 2_500].decode(errors="replace")
            count = content.count(b"Traceback (most recent call last)")
            world.problems.append(f"{count} tracebacks in {file.name}: {shown}")
