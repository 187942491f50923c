"""Eight private endpoints on two accelerators that hold two each, random requests over them, and things that die.

Shows: every request is answered by the right model, none is lost or billed twice, and the ledger equals what was
delivered. Run: ``python -m bench.exactness [--seed N] [--requests N]``; the end-to-end tests run shorter rounds of it.

What a round counts: requests sent, answered, wrong answers (another model's text), aborted by the client, failed (with
an error the client can read), cut (the connection died with the gateway), ledger rows, rows billed twice, and tokens
billed above or below what the client received. A SIGKILL of the gateway may leave a stream billed for up to one second
less than was delivered, and a finished unary answer billed though its last bytes never left (`billed_unseen`).
"""

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import main
from tests.e2e.platform import Platform, running, wait_until

ENDPOINTS = 8
ACCELERATORS = 2
REPLICA_MEMORY = "48MiB"
ACCELERATOR_MEMORY = "96MiB"  # holds two replicas
PROMPTS = ("the water of the world", "how many people came", "two more days", "a name for the new place")
TOKENS = (4, 12, 24)
KILLS_MIN = 4
FAULTS = ("none", "engine", "gateway", "platform")
REQUESTS_MAX = 20_000
CONFIG = f"""
demo = false
[accelerators]
kind = "cpu"
count = {ACCELERATORS}
memory = "{ACCELERATOR_MEMORY}"
[engine]
threads = 1
[capacity]
residency_ms_min = 200
wait_ms_max = 3000
"""


@dataclass
class Answer:
    """What one client saw of one request."""

    endpoint: str
    request_id: str = ""
    text: str = ""
    tokens: int = 0
    outcome: str = "cut"  # answered | aborted | failed | cut
    detail: str = ""
    truth: str = ""

    @property
    def wrong(self) -> bool:
        """Another model's text, or not what this model greedily says. Half a character at a cut is no one's text."""
        got = self.text.rstrip("\ufffd")
        return got != self.truth.rstrip("\ufffd") if self.outcome == "answered" else not self.truth.startswith(got)


@dataclass
class Load:
    """Bounded random traffic from one seed: at least `requests`, on until `kills_min` kills and for `seconds_min`,
    `concurrency` at once.
    """

    base_url: str
    key: str
    truths: dict[tuple[str, str, int], str]
    requests: int
    concurrency: int
    seed: int
    kills_min: int = 0
    kills: int = 0
    seconds_min: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    async def run(self) -> None:
        dice = random.Random(self.seed)
        kinds = sorted(self.truths)

        began = time.monotonic()

        def wanted() -> bool:
            sent = len(self.answers)
            more = self.kills < self.kills_min or time.monotonic() - began < self.seconds_min
            return sent < self.requests or (more and sent < REQUESTS_MAX)

        limits = httpx.Limits(max_connections=self.concurrency)
        headers = {"authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.base_url, headers=headers, limits=limits, timeout=120) as client:

            async def worker() -> None:
                while wanted():
                    (endpoint, prompt, tokens), stream, abort = dice.choice(kinds), dice.random(), dice.random()
                    answer = Answer(endpoint, truth=self.truths[endpoint, prompt, tokens])
                    body = {
                        "model": endpoint,
                        "prompt": prompt,
                        "max_tokens": tokens,
                        "temperature": 0,
                        "ignore_eos": True,
                    }
                    self.answers.append(answer)
                    with contextlib.suppress(httpx.TransportError):  # the gateway died under it: outcome stays "cut"
                        if stream < 0.5:
                            await _unary(client, body, answer)
                        else:
                            await _stream(client, body, answer, events_max=1 + int(abort * 6) if abort < 0.3 else None)
                    if answer.outcome in ("cut", "failed"):
                        await asyncio.sleep(0.5)  # a client's back-off while what died comes back

            await asyncio.gather(*(worker() for _ in range(self.concurrency)))


async def _unary(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer) -> None:
    response = await client.post("/v1/completions", json=body)
    answer.request_id = response.headers.get("x-request-id", "")
    document = response.json()
    if response.status_code != 200:
        answer.outcome, answer.detail = "failed", f"{response.status_code} {document['error']['code']}"
        return
    answer.text = document["choices"][0]["text"]
    answer.tokens = document["usage"]["completion_tokens"]
    answer.outcome = "answered"


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, events_max: int | None) -> None:
    body = {**body, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        answer.request_id = response.headers.get("x-request-id", "")
        if response.status_code != 200:
            document = json.loads(await response.aread())
            answer.outcome, answer.detail = "failed", f"{response.status_code} {document['error']['code']}"
            return
        events = 0
        async for line in response.aiter_lines():
            if line.startswith("id:"):
                answer.tokens = int(line[3:])
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                answer.outcome = "answered"
                return
            event = json.loads(data)
            if "error" in event:
                answer.outcome, answer.detail = "failed", f"stream {event['error']['code']}"
                return
            for choice in event["choices"]:
                answer.text += choice["text"]
            events += 1
            if events_max is not None and events >= events_max:
                answer.outcome = "aborted"
                return


def truths(models: dict[str, Path]) -> dict[tuple[str, str, int], str]:
    """What each model greedily says to each prompt, from transformers' own `generate`: an independent reference."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = {}
    for endpoint, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=max(TOKENS),
                    max_new_tokens=max(TOKENS), eos_token_id=None,
                )[0, ids.shape[1] :]  # fmt: skip
            for count in TOKENS:
                said[endpoint, prompt, count] = tokenizer.decode(out[:count], skip_special_tokens=True)
    return said


def apply_endpoints(platform: Platform, models: dict[str, Path]) -> str:
    """One tenant a pair of endpoints would hide nothing more: all are of one tenant, whose key is returned."""
    with platform.admin() as admin:
        admin.post("/api/v1/tenants", json={"id": "acme"}).raise_for_status()
        key = admin.post("/api/v1/keys", json={"tenant": "acme"}).raise_for_status().json()["secret"]
        for endpoint, folder in models.items():
            body = {"model": str(folder), "accelerator_memory": REPLICA_MEMORY, "slots": 4}
            admin.put(f"/api/v1/endpoints/{endpoint}", json=body).raise_for_status()
    wait_until(
        lambda: all(_state(platform, endpoint) not in ("creating", "loading") for endpoint in models),
        "first loads",
        120,
    )
    return str(key)


def _state(platform: Platform, endpoint: str) -> str:
    with platform.admin() as admin:
        return str(admin.get(f"/api/v1/endpoints/{endpoint}").raise_for_status().json()["state"])


Strike = Callable[[random.Random], bool]
"""Kills something; whether it did."""


def one_of(victims_of: Callable[[], list[psutil.Process]]) -> Strike:
    def strike(dice: random.Random) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            if victims := victims_of():
                dice.choice(victims).send_signal(signal.SIGKILL)
                return True
        return False

    return strike


def _strike(fault: str, platform: Platform) -> Strike | None:
    def everything(_: random.Random) -> bool:
        platform.crash()
        return True

    return {
        "none": None,
        "engine": one_of(platform.engines),
        "gateway": one_of(platform.gateways),
        "platform": everything,
    }[fault]


async def _kill(load: Load, strike: Strike, every_s: float) -> None:
    """Again and again until cancelled."""
    dice = random.Random(load.seed + 1)
    while True:
        await asyncio.sleep(every_s * (0.5 + dice.random()))
        load.kills += await asyncio.to_thread(strike, dice)


async def with_faults(load: Load, strike: Strike | None, every_s: float) -> None:
    killer = asyncio.create_task(_kill(load, strike, every_s)) if strike else None
    await load.run()
    if killer is not None:
        killer.cancel()
        await asyncio.wait({killer})


def ledger_rows(platform: Platform) -> list[dict[str, Any]]:
    """The usage records as they stand in the ledger, read past every layer of ours that could flatter them."""
    database = next((platform.directory / "data").rglob("*.db"))
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM usage_records")]


def entries_sum(platform: Platform) -> int:
    database = next((platform.directory / "data").rglob("*.db"))
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT coalesce(sum(amount), 0) FROM entries").fetchone()[0])


def judge(load: Load, platform: Platform) -> dict[str, Any]:
    """Waits until the ledger has seen every finished request (an aborted one may die with a gateway), then compares."""
    owed = {"answered"} if any(a.outcome == "cut" for a in load.answers) else {"answered", "aborted"}
    served = {a.request_id for a in load.answers if a.outcome in owed}
    wait_until(lambda: served <= {row["id"] for row in ledger_rows(platform)}, "every served request in the ledger", 30)
    rows = {row["id"]: row for row in ledger_rows(platform)}
    outcomes = Counter(a.outcome for a in load.answers)
    over = under = 0
    for answer in load.answers:
        row = rows.get(answer.request_id)
        billed = row["output_tokens"] if row else 0
        under += max(0, answer.tokens - billed)
        if answer.outcome != "aborted":  # an aborting client leaves tokens unread that were already sent to it
            over += max(0, billed - answer.tokens)
    seen = {a.request_id for a in load.answers}
    return {
        "sent": len(load.answers),
        "answered": outcomes["answered"],
        "wrong_answers": sum(a.wrong for a in load.answers),
        "aborted": outcomes["aborted"],
        "failed": outcomes["failed"],
        "failed_how": dict(Counter(a.detail for a in load.answers if a.outcome == "failed")),
        "cut": outcomes["cut"],
        "ledger_rows": len(rows),
        "billed_twice": len(ledger_rows(platform)) - len(rows),
        "delivered_tokens_answered": sum(a.tokens for a in load.answers if a.outcome == "answered"),
        "billed_over": over,
        "billed_under": under,
        "billed_under_answered": sum(
            max(0, a.tokens - rows[a.request_id]["output_tokens"]) for a in load.answers if a.outcome == "answered"
        ),
        "billed_unseen": sum(1 for id, row in rows.items() if id not in seen and row["output_tokens"]),
        "entries_sum": entries_sum(platform),
    }


def round_of(
    fault: str, requests: int, concurrency: int, seed: int, directory: Path, every_s: float = 2.0
) -> dict[str, Any]:
    """One round: `fault` is none | engine | gateway | platform (all of it, control plane and ingest too)."""
    from tests import models as make

    models = {f"acme/e{i}": make.llama(seed=100 + i) for i in range(ENDPOINTS)}
    said = truths(models)
    with running(directory, config=CONFIG) as platform:
        key = apply_endpoints(platform, models)
        load = Load(platform.base_url, key, said, requests, concurrency, seed, KILLS_MIN if fault != "none" else 0)
        started = time.monotonic()
        asyncio.run(with_faults(load, _strike(fault, platform), every_s))
        return {
            "fault": fault,
            "killed": load.kills,
            "seconds": round(time.monotonic() - started, 1),
            **judge(load, platform),
        }


def run(requests: int = 200, concurrency: int = 16, seed: int = 1) -> dict[str, Any]:
    """All rounds."""
    rounds = []
    for fault in FAULTS:
        with tempfile.TemporaryDirectory(prefix="tidegate-exactness-") as folder:
            rounds.append(round_of(fault, requests, concurrency, seed, Path(folder)))
    return {"endpoints": ENDPOINTS, "accelerators": ACCELERATORS, "held_by_each": 2, "rounds": rounds}


if __name__ == "__main__":
    main(run)
