"""Batch work on accelerators nobody else wants: what a killed process costs, how soon real-time traffic has its
accelerator back, and how much of the idle time is used.

Run: ``python -m bench.batch [--lines N] [--rounds N] [--seconds S] [--memory M] [--gap S]
[--only PART]``. The platform is real: its gateway, engines and itself are processes, asked over HTTP. The end-to-end
tests run a short round of `kills`.

`kills`: one batch; while it runs an engine, the gateway and the platform itself get SIGKILL, one after the other. Each
custom_id must be in the output or the error file once, and the ledger must hold each line once, with the file's tokens.
`reclaim`: one accelerator with room for one replica, busy with batch; a real-time request to another endpoint arrives.
Time to first token, beside that on an idle accelerator (asleep: the same wake without a batch in the way; ready: none).
`harvest`: batch tokens while real-time requests come and go, over what the batch alone does in the time they left idle.
"""

import argparse
import contextlib
import json
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.exactness import entries_sum, ledger_rows
from tests.e2e.platform import Platform, free_port, running, wait_until

URL = "/v1/completions"
WAIT_S_MAX = 3_600.0
CONFIG = """
demo = false
[accelerators]
kind = "cpu"
count = {accelerators}
memory = "{memory}"
[engine]
threads = 1
[capacity]
residency_ms_min = 200
wait_ms_max = 3000
"""


TIGHT = "60MiB"  # for one replica; 120MiB is for both
GAP_S = 10.0


def _config(accelerators: int, memory: str = TIGHT) -> str:
    return CONFIG.format(accelerators=accelerators, memory=memory)


def _apply(platform: Platform, *names: str, slots: int = 4) -> str:
    """Endpoints that fill an accelerator each; a key of their tenant."""
    from tests import models

    with platform.admin() as admin:
        admin.post("/api/v1/tenants", json={"id": "acme"}).raise_for_status()
        key = admin.post("/api/v1/keys", json={"tenant": "acme"}).raise_for_status().json()["secret"]
        for seed, name in enumerate(names):
            body = {"model": str(models.llama(seed=100 + seed)), "accelerator_memory": "48MiB", "slots": slots}
            admin.put(f"/api/v1/endpoints/acme/{name}", json=body).raise_for_status()
    return str(key)


def _client(platform: Platform, key: str) -> httpx.Client:
    return httpx.Client(base_url=platform.base_url, headers={"authorization": f"Bearer {key}"}, timeout=120)


def _lines(count: int, tokens: int, seed: int) -> bytes:
    dice = random.Random(seed)
    words = ("water", "tide", "harbour", "moon", "people", "name", "river", "stone")
    made = []
    for number in range(count):
        prompt = " ".join(dice.choice(words) for _ in range(dice.randint(2, 12)))
        body = {"model": "bulk", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        made.append(json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": URL, "body": body}))
    return ("\n".join(made) + "\n").encode()


def _submit(client: httpx.Client, data: bytes) -> str:
    form = {"purpose": (None, "batch"), "file": ("lines.jsonl", data)}
    file_id = client.post("/v1/files", files=form).raise_for_status().json()["id"]
    body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    return str(client.post("/v1/batches", json=body).raise_for_status().json()["id"])


def _batch(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    """Asked again while the platform is on its way back."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = client.get(f"/v1/batches/{batch_id}")
            if answer.status_code == 200:
                return dict(answer.json())
        time.sleep(0.1)


def _ended(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    wait_until(lambda: _batch(client, batch_id)["status"] in ("completed", "failed"), "the batch's end", WAIT_S_MAX)
    return _batch(client, batch_id)


def _done(batch: dict[str, Any]) -> int:
    return int(batch["request_counts"]["completed"] + batch["request_counts"]["failed"])


# --- kills ------------------------------------------------------------------------------------------------------------


def kills(lines: int, directory: Path, seed: int = 1, tokens: int = 8) -> dict[str, Any]:
    """An engine dies after a fifth of the lines, the gateway after two fifths, all of the platform after three."""
    config, port, killed = _config(2), free_port(), []
    started = time.monotonic()
    with contextlib.suppress(ProcessLookupError), running(directory, config=config, port=port) as platform:
        key = _apply(platform, "bulk", slots=16)
        with _client(platform, key) as client:
            batch_id = _submit(client, _lines(lines, tokens, seed))
            for share, what in ((0.2, "engine"), (0.4, "gateway"), (0.6, "platform")):
                target = lines * share
                wait_until(
                    lambda target=target: _done(_batch(client, batch_id)) >= target, f"{what}'s turn", WAIT_S_MAX
                )
                for victim in _victims(platform, what):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.send_signal(signal.SIGKILL)
                        killed.append(what)
            platform.process.wait(10)
    with running(directory, config=config, port=port) as platform, _client(platform, key) as client:
        batch = _ended(client, batch_id)
        taken_s = time.monotonic() - started
        return {
            "lines": lines,
            "killed": dict(Counter(killed)),
            "status": batch["status"],
            **_judge(platform, client, batch),
            "lines_per_s": round(lines / taken_s, 1),
        }


def _victims(platform: Platform, what: str) -> list[psutil.Process]:
    match what:
        case "engine":
            return platform.engines()
        case "gateway":
            return platform.gateways()
        case _:
            return [psutil.Process(platform.process.pid)]


def _judge(platform: Platform, client: httpx.Client, batch: dict[str, Any]) -> dict[str, Any]:
    found: Counter[str] = Counter()
    tokens = 0
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        for line in client.get(f"/v1/files/{file_id}/content").text.splitlines() if file_id else ():
            result = json.loads(line)
            found[result["custom_id"]] += 1
            if file_id == batch["output_file_id"]:
                tokens += result["response"]["body"]["usage"]["completion_tokens"]
    wait_until(lambda: len(_billed(platform)) >= batch["request_counts"]["completed"], "the ledger", 60)
    billed = _billed(platform)
    return {
        "done": len(found),
        "done_twice": sum(count - 1 for count in found.values()),
        "failed": batch["request_counts"]["failed"],
        "billed": len(billed),
        "billed_twice": len(billed) - len({row["id"] for row in billed}),
        "tokens": tokens,
        "tokens_billed": sum(row["output_tokens"] for row in billed),
        "entries_sum": entries_sum(platform),
    }


def _billed(platform: Platform) -> list[dict[str, Any]]:
    return [row for row in ledger_rows(platform) if row["mode"] == "batch" and row["outcome"] == "completed"]


# --- reclaim ----------------------------------------------------------------------------------------------------------


def reclaim(rounds: int, directory: Path) -> dict[str, Any]:
    """Milliseconds to the first token of `acme/live`, on the one accelerator."""
    with running(directory, config=_config(1)) as platform:
        key = _apply(platform, "live", "bulk")
        with _client(platform, key) as client:
            _ttft_ms(client)
            ready = [_ttft_ms(client) for _ in range(rounds)]
            asleep = []
            for _ in range(rounds):
                _sleep_live(platform)
                asleep.append(_ttft_ms(client))
            batch_id = _submit(client, _lines(50_000, 24, 1))
            busy = []
            for _ in range(rounds):
                _until_batch_runs(platform, client, batch_id)
                busy.append(_ttft_ms(client))
            client.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
            wait_until(lambda: _batch(client, batch_id)["status"] == "cancelled", "the cancelled batch", 60)
            counts = _batch(client, batch_id)["request_counts"]
    return {
        "rounds": rounds,
        "ready": _percentiles(ready),
        "asleep": _percentiles(asleep),
        "busy_with_batch": _percentiles(busy),
        "busy_over_asleep_p50": round(statistics.median(busy) / statistics.median(asleep), 2),
        "batch_lines_done_meanwhile": counts["completed"],
    }


def _ttft_ms(client: httpx.Client) -> float:
    body = {"model": "live", "prompt": "the water", "max_tokens": 4, "temperature": 0, "stream": True}
    started = time.perf_counter()
    first = 0.0
    with client.stream("POST", URL, json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data:") and not first:
                first = time.perf_counter()
    return (first - started) * 1000


def _sleep_live(platform: Platform) -> None:
    with platform.admin() as admin:
        admin.post("/api/v1/endpoints/acme/live/sleep").raise_for_status()
        wait_until(lambda: admin.get("/api/v1/endpoints/acme/live").json()["state"] == "asleep", "live asleep", 30)


def _until_batch_runs(platform: Platform, client: httpx.Client, batch_id: str) -> None:
    before = _done(_batch(client, batch_id))
    wait_until(lambda: _done(_batch(client, batch_id)) > before, "batch on the accelerator", 60)


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50_ms": round(statistics.median(ordered), 1),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 1),
    }


# --- harvest ----------------------------------------------------------------------------------------------------------


def harvest(seconds: float, directory: Path, seed: int = 1, memory: str = TIGHT, gap: float = GAP_S) -> dict[str, Any]:
    """The same real-time bursts on one accelerator without and with a batch behind them. With memory for one replica
    the first request of a burst finds the accelerator lent and pays for the way back; with memory for both, batch only
    stops computing. `rest` are the requests behind the first of a burst.
    """
    with running(directory, config=_config(1, memory)) as platform:
        key = _apply(platform, "live", "bulk")
        with _client(platform, key) as client:
            _ttft_ms(client)
            without = _Bursts(client, seconds, seed, gap)
            batch_id = _submit(client, _lines(50_000, 24, seed))
            _until_batch_runs(platform, client, batch_id)
            rate = _tokens_during(client, batch_id, lambda: time.sleep(seconds / 2)) / (seconds / 2)
            found: list[_Bursts] = []
            tokens = _tokens_during(client, batch_id, lambda: found.append(_Bursts(client, seconds, seed, gap)))
            client.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
    with_batch = found[0]
    before, after = _percentiles(without.all), _percentiles(with_batch.all)
    return {
        "seconds": seconds,
        "accelerator_memory": memory,
        "gap_s": gap,
        "bursts": len(with_batch.first),
        "requests": len(with_batch.all),
        "real_time_share": round(with_batch.busy_s / seconds, 3),
        "batch_tokens_per_s_alone": round(rate, 1),
        "harvest": round(tokens / (rate * (seconds - with_batch.busy_s)), 3),
        "ttft_without": before,
        "ttft_with": after,
        "ttft_p99_ratio": round(after["p99_ms"] / before["p99_ms"], 2),
        "first_of_a_burst": {"without": _percentiles(without.first), "with": _percentiles(with_batch.first)},
        "rest": {"without": _percentiles(without.rest), "with": _percentiles(with_batch.rest)},
    }


def _tokens_during(client: httpx.Client, batch_id: str, act: Any) -> float:
    before = _batch(client, batch_id)["usage"]["output_tokens"]
    act()
    time.sleep(1.1)  # counts are written down once a second
    return float(_batch(client, batch_id)["usage"]["output_tokens"] - before)


class _Bursts:
    """Requests in bursts with pauses of about `gap` seconds: their TTFTs, and the seconds they were under way."""

    def __init__(self, client: httpx.Client, seconds: float, seed: int, gap: float) -> None:
        dice = random.Random(seed)
        self.first: list[float] = []
        self.rest: list[float] = []
        self.busy_s = 0.0
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for number in range(dice.randint(2, 6)):
                started = time.monotonic()
                (self.rest if number else self.first).append(_ttft_ms(client))
                self.busy_s += time.monotonic() - started
            threading.Event().wait(min(dice.expovariate(1 / gap), max(0.0, left)))

    @property
    def all(self) -> list[float]:
        return self.first + self.rest


def run(
    lines: int = 2_000,
    rounds: int = 30,
    seconds: float = 120.0,
    only: str = "",
    tokens: int = 8,
    memory: str = TIGHT,
    gap: float = GAP_S,
) -> dict[str, Any]:
    """All three, or `only` one of them, each on a platform of its own."""
    parts = {
        "kills": lambda folder: kills(lines, folder, tokens=tokens),
        "reclaim": lambda folder: reclaim(rounds, folder),
        "harvest": lambda folder: harvest(seconds, folder, memory=memory, gap=gap),
    }
    figures = {}
    for name, part in parts.items():
        if only in ("", name):
            with tempfile.TemporaryDirectory(prefix="tidegate-batch-") as folder:
                figures[name] = part(Path(folder))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=8, help="of each answer, in kills")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--memory", default=TIGHT, help="of the accelerator, in harvest")
    parser.add_argument("--gap", type=float, default=GAP_S, help="mean seconds between bursts, in harvest")
    parser.add_argument("--only", choices=("kills", "reclaim", "harvest"), default="")
    options = parser.parse_args()
    figures = run(**vars(options))
    print(json.dumps(figures, indent=2))
