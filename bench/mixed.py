"""Mixed traffic on the whole real platform, on PostgreSQL, with everything dying: what the ledger says, and what was.

Run: ``python -m bench.mixed [--seeds N] [--first N] [--seconds S] [--faults F …]``; kept figures are in
bench/results/faults.md. Each seed is a platform of its own (its gateway, engines and control plane are processes, asked
over HTTP) on a PostgreSQL server of its own. Clients ask six private endpoints on two accelerators, all at once:

* unary answers and streams, three streams in ten aborted at a random event
* embeddings, requests that are refused, and a batch that goes through the real runner, lines retried as it does

and at random instants one of: an engine, the gateway, the whole platform (control plane and ingest with it), every
process of the database, or any of these (`everything`) gets SIGKILL. At the end, once the batch is done, each record in
the database (read by SQL, past every layer of ours) is compared with what its client received, and what
``/api/v1/usage`` sums up with the records. Finished: a client saw the end of it.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from bench import exactness
from bench.exactness import Answer, Load, Strike, one_of
from tests import postgres
from tests.e2e.platform import Platform, running, wait_until

FAULTS = ("none", "engine", "gateway", "platform", "database", "everything")
GENERATIVE = 4
KILLS_MIN = 3
BATCH_LINES = 150
BATCH_TOKENS = 6
CONFIG = (
    exactness.CONFIG
    + """
[prices.default]
input_usd_per_million_tokens = "0.2"
cached_input_usd_per_million_tokens = "0.2"
output_usd_per_million_tokens = "0.8"
"""
)
INPUT_NANO, OUTPUT_NANO, BATCH_PERCENT = 200, 800, 50


@dataclass
class Others:
    """What came back of embeddings and of requests that are wrong: request id → prompt tokens, and the refused ids."""

    embedded: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    lost: int = 0


@dataclass(slots=True)
class Tally:
    """Sums over seeds. `wrong`: finished, and not billed with the tokens and the amount that were delivered. `over`:
    tokens billed that nobody got. `under`: tokens of streams a gateway died under, delivered and not billed. `unseen`:
    answers billed whose last bytes were lost with a gateway. `twice`: one request or one batch line billed twice.
    `unbalanced`: transactions that do not sum to zero, and sums that are not what they sum.
    """

    seeds: int = 0
    kills: int = 0
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    cut: int = 0
    failed: int = 0
    embeddings: int = 0
    batch_lines: int = 0
    delivered_tokens: int = 0
    billed_tokens: int = 0
    wrong_answers: int = 0
    wrong: int = 0
    over: int = 0
    under: int = 0
    unseen: int = 0
    twice: int = 0
    unbalanced: int = 0
    problems: list[str] = field(default_factory=list)


# --- traffic --------------------------------------------------------------------------------------------------------


async def _others(base_url: str, key: str, until: Callable[[], bool], seed: int, seen: Others) -> None:
    """Embeddings, and requests nobody can serve, one after the other."""
    dice = random.Random(f"{seed}/others")
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=120) as client:
        while not until():
            wrong = dice.random() < 0.2
            body: dict[str, Any] = {"model": "acme/embed", "input": list(exactness.PROMPTS)[: dice.randint(1, 4)]}
            try:
                if wrong:
                    answer = await client.post("/v1/completions", json={"model": "acme/e0", "prompt": "x", "n": -1})
                    seen.refused.append(answer.headers["x-request-id"])
                    continue
                answer = await client.post("/v1/embeddings", json=body)
            except httpx.TransportError:
                seen.lost += 1
                await asyncio.sleep(0.3)
                continue
            if answer.status_code == 200:
                seen.embedded[answer.headers["x-request-id"]] = answer.json()["usage"]["prompt_tokens"]
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Batch:
    """What the runner wrote into output and error file."""

    id: str
    lines: list[dict[str, Any]]

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """By the name their usage records have."""
        answered = (line for line in self.lines if line["response"] and line["response"]["status_code"] == 200)
        return {f"{self.id}-{line['custom_id'].removeprefix('line-')}": line for line in answered}


def _batch_file() -> bytes:
    body = {"model": "acme/bulk", "max_tokens": BATCH_TOKENS, "temperature": 0, "ignore_eos": True}
    lines = (
        {"custom_id": f"line-{n}", "method": "POST", "url": "/v1/completions",
         "body": {**body, "prompt": exactness.PROMPTS[n % len(exactness.PROMPTS)]}}
        for n in range(1, BATCH_LINES + 1)  # as the runner counts them
    )  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _submit(client: httpx.Client) -> str:
    form = {"purpose": (None, "batch"), "file": ("lines.jsonl", _batch_file())}
    file_id = client.post("/v1/files", files=form).raise_for_status().json()["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    return str(client.post("/v1/batches", json=body).raise_for_status().json()["id"])


def _finished_batch(client: httpx.Client, batch_id: str) -> Batch:
    """Waits for it."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        with contextlib.suppress(httpx.TransportError):
            answer = client.get(f"/v1/batches/{batch_id}")
            if answer.status_code == 200:
                found.update(answer.json())
        return found.get("status") in ("completed", "failed", "expired")

    wait_until(ended, "the batch's end", 300)
    files = [found[name] for name in ("output_file_id", "error_file_id") if found[name]]
    texts = [client.get(f"/v1/files/{file_id}/content").raise_for_status().text for file_id in files]
    return Batch(batch_id, [json.loads(line) for text_ in texts for line in text_.splitlines()])


# --- faults ---------------------------------------------------------------------------------------------------------


def _strike(fault: str, platform: Platform, crash_database: Callable[[], None]) -> Strike | None:
    def crash(_: random.Random) -> bool:
        platform.crash()
        return True

    def database(_: random.Random) -> bool:
        crash_database()
        return True

    strikes: dict[str, Strike] = {
        "engine": one_of(platform.engines),
        "gateway": one_of(platform.gateways),
        "platform": crash,
        "database": database,
    }
    if fault == "everything":
        return lambda dice: dice.choice(list(strikes.values()))(dice)
    return strikes.get(fault)


# --- what came of it ------------------------------------------------------------------------------------------------


def _rows(url: str, query: str) -> list[dict[str, Any]]:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]
    finally:
        engine.dispose()


RECORDS = """
SELECT r.*, coalesce(e.amount, 0) AS owed FROM usage_records r
LEFT JOIN entries e ON e.transaction_id = r.transaction_id AND e.account = 'tenant/acme'
"""
UNBALANCED = "SELECT transaction_id FROM entries GROUP BY transaction_id HAVING sum(amount) <> 0"
DRIFTED = """
SELECT account FROM balances b
WHERE amount <> (SELECT coalesce(sum(amount), 0) FROM entries e WHERE e.account = b.account)
"""


def _settled(url: str, owed: set[str]) -> list[dict[str, Any]]:
    """Every record, once all that must be there are, and no more come."""
    found: list[dict[str, Any]] = []

    def all_there() -> bool:
        with contextlib.suppress(SQLAlchemyError):  # the database may be just on its way back
            before = len(found)
            found[:] = _rows(url, RECORDS)
            return owed <= {row["id"] for row in found} and len(found) == before
        return False

    wait_until(all_there, "every finished request in the ledger", 60)
    return found


def _price(row: dict[str, Any]) -> int:
    """What a record costs: the price book of CONFIG, written down a second time."""
    lines = (row["input_tokens"] * INPUT_NANO, row["output_tokens"] * OUTPUT_NANO)  # even, so halves are exact
    return sum(lines) * BATCH_PERCENT // 100 if row["mode"] == "batch" else sum(lines)


def judge(load: Load, others: Others, batch: Batch, platform: Platform, url: str, tally: Tally, seed: int) -> None:
    cut = any(a.outcome == "cut" for a in load.answers) or others.lost
    owed = {a.request_id for a in load.answers if a.outcome in ({"answered"} if cut else {"answered", "aborted"})}
    rows = _settled(url, owed | set(others.embedded) | set(batch.done))
    by_id = {row["id"]: row for row in rows}
    _generative(load.answers, by_id, tally, seed)
    for request_id, tokens in others.embedded.items():
        row = by_id[request_id]
        _finished(row, tokens, 0, tally, seed)
    for request_id, line in batch.done.items():
        usage = line["response"]["body"]["usage"]
        _finished(by_id[request_id], usage["prompt_tokens"], usage["completion_tokens"], tally, seed)
    seen = {a.request_id for a in load.answers} | set(others.embedded) | set(batch.done) | set(others.refused)
    for row in rows:
        free = row["outcome"] == "refused" or (row["outcome"] != "completed" and not row["output_tokens"])
        if row["owed"] != (0 if free else _price(row)):
            tally.wrong += 1
            tally.problems.append(f"seed {seed}: {row['id']} {row['outcome']} owes {row['owed']}")
        if row["id"] in seen or free:
            continue
        if row["mode"] == "batch":  # a completed line has one name: whatever else was billed for it is too much
            tally.twice += 1
            tally.problems.append(f"seed {seed}: {row['id']} of a batch is billed beside its line")
        else:
            tally.unseen += row["outcome"] == "completed"
    tally.twice += len(rows) - len(by_id) + len(batch.lines) - len({line["custom_id"] for line in batch.lines})
    if len(batch.done) != BATCH_LINES:
        tally.wrong += 1
        tally.problems.append(f"seed {seed}: {len(batch.done)} of {BATCH_LINES} batch lines")
    tally.billed_tokens += sum(row["output_tokens"] for row in rows)
    tally.embeddings += len(others.embedded)
    tally.batch_lines += len(batch.done)
    _sums(rows, platform, url, tally, seed)


def _generative(answers: list[Answer], by_id: dict[str, dict[str, Any]], tally: Tally, seed: int) -> None:
    for answer in answers:
        row = by_id.get(answer.request_id)
        billed = row["output_tokens"] if row else 0
        tally.wrong_answers += answer.wrong
        tally.delivered_tokens += answer.tokens
        match answer.outcome:
            case "answered":
                tally.finished += 1
                if billed != answer.tokens:
                    tally.wrong += 1
                    tally.problems.append(f"seed {seed}: {answer.request_id} got {answer.tokens}, billed {billed}")
            case "aborted":  # what was sent and not read any more is billed too
                tally.under += max(0, answer.tokens - billed)
            case _:
                tally.under += max(0, answer.tokens - billed)
                tally.over += max(0, billed - answer.tokens) if answer.outcome == "failed" else 0
    outcomes = Counter(answer.outcome for answer in answers)
    tally.requests += len(answers)
    tally.aborted += outcomes["aborted"]
    tally.cut += outcomes["cut"]
    tally.failed += outcomes["failed"]


def _finished(row: dict[str, Any], input_tokens: int, output_tokens: int, tally: Tally, seed: int) -> None:
    tally.finished += 1
    tally.requests += 1
    tally.delivered_tokens += output_tokens
    if (row["input_tokens"], row["output_tokens"], row["outcome"]) != (input_tokens, output_tokens, "completed"):
        tally.wrong += 1
        tally.problems.append(f"seed {seed}: {row['id']} got {input_tokens} and {output_tokens} tokens, billed {row}")


def _sums(rows: list[dict[str, Any]], platform: Platform, url: str, tally: Tally, seed: int) -> None:
    with platform.admin() as admin:
        used = admin.get("/api/v1/usage?by=tenant&from=2026-01-01&to=2100-01-01").raise_for_status().json()["rows"]
    (mine,) = [row for row in used if row["group"] == "acme"]
    expected = (sum(r["output_tokens"] for r in rows), sum(r["owed"] for r in rows))
    drifted = _rows(url, UNBALANCED) + _rows(url, DRIFTED)
    tally.unbalanced += len(drifted) + ((mine["output_tokens"], mine["nano_usd"]) != expected)
    if drifted:
        tally.problems.append(f"seed {seed}: {drifted[:3]}")


# --- all of it ------------------------------------------------------------------------------------------------------


def run_seed(fault: str, seed: int, seconds: float, directory: Path, tally: Tally) -> None:
    from tests import models as make

    pg_ctl = postgres.find_pg_ctl()
    if pg_ctl is None:
        raise SystemExit("PostgreSQL is not installed")
    models = {f"acme/e{i}": make.llama(seed=100 + i) for i in range(GENERATIVE)}
    said = exactness.truths(models)
    models |= {"acme/embed": make.bert_embedding(), "acme/bulk": make.llama(seed=100)}
    with postgres.server(pg_ctl) as server:
        url = postgres.new_database(server)
        config = f"database_url = {json.dumps(url)}\n" + CONFIG
        with running(directory, config=config) as platform:
            key = exactness.apply_endpoints(platform, models)
            strike = _strike(fault, platform, server.crash)
            load = Load(
                platform.base_url, key, said, requests=40, concurrency=8, seed=seed, seconds_min=seconds,
                kills_min=KILLS_MIN if strike else 0,
            )  # fmt: skip
            others = Others()
            with httpx.Client(
                base_url=platform.base_url, headers={"authorization": f"Bearer {key}"}, timeout=120
            ) as client:
                batch_id = _submit(client)
                asyncio.run(_traffic(load, others, strike, platform.base_url, key))
                batch = _finished_batch(client, batch_id)
            judge(load, others, batch, platform, url, tally, seed)
    tally.kills += load.kills
    tally.seeds += 1


async def _traffic(load: Load, others: Others, strike: Strike | None, base_url: str, key: str) -> None:
    over = threading.Event()
    beside = asyncio.create_task(_others(base_url, key, over.is_set, load.seed, others))
    await exactness.with_faults(load, strike, every_s=2.5)
    over.set()
    await beside


def run(seeds: int = 3, first: int = 1, seconds: float = 12.0, faults: tuple[str, ...] = FAULTS) -> dict[str, Any]:
    """A table: a row a fault."""
    table = []
    for fault in faults:
        tally = Tally()
        for seed in range(first, first + seeds):
            with tempfile.TemporaryDirectory(prefix="tidegate-mixed-") as folder:
                run_seed(fault, seed, seconds, Path(folder), tally)
        table.append({"fault": fault, **asdict(tally), "problems": tally.problems[:5]})
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    return {"database": "postgresql", "seeds_a_fault": seeds, "seconds_a_seed": seconds, "table": table}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="a fault")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12.0, help="of traffic a seed")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    options = parser.parse_args()
    began = time.monotonic()
    found = run(options.seeds, options.first, options.seconds, tuple(options.faults))
    print(json.dumps({**found, "wall_s": round(time.monotonic() - began)}, indent=2))
    sys.exit(any(row["wrong"] or row["over"] or row["twice"] or row["unbalanced"] for row in found["table"]))
