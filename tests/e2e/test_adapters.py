"""Private endpoints that are LoRA adapters on one replica, on the real platform: each its own answers and bill."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.platform import Platform, running, wait_until

pytest.importorskip("torch")
from tests import models

pytestmark = pytest.mark.e2e

ADAPTERS = 12
CONFIG = """
demo = false
[accelerators]
kind = "cpu"
count = 1
memory = "160MiB"
[[tenants]]
id = "acme"
"""


def said(platform: Platform, key: str, endpoint: str) -> str:
    client = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=key, max_retries=0)
    prompt = "the water of the world"
    stream = client.completions.create(
        model=endpoint, prompt=prompt, max_tokens=16, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join(event.choices[0].text for event in stream if event.choices)


def test_twelve_adapters_share_one_replica_and_none_answers_for_another(tmp_path: Path) -> None:
    base = models.llama()
    with running(tmp_path, config=CONFIG) as platform, platform.admin() as admin:
        body = {"model": str(base), "accelerator_memory": "64MiB", "slots": 8,
                "engine_args": {"adapter_bytes_max": str(8 << 20)}}  # fmt: skip
        admin.put("/api/v1/endpoints/acme/base", json=body).raise_for_status()
        names = [f"acme/a{seed}" for seed in range(ADAPTERS)]
        for seed, name in enumerate(names):
            adapter = {"model": str(models.lora(base, seed)), "base": "acme/base"}
            admin.put(f"/api/v1/endpoints/{name}", json=adapter).raise_for_status()
        key = admin.post("/api/v1/keys", json={"tenant": "acme"}).json()["secret"]
        alone = {name: said(platform, key, name) for name in [*names, "acme/base"]}
        assert len(set(alone.values())) == ADAPTERS + 1, "every adapter changes what is said"
        with ThreadPoolExecutor(ADAPTERS) as pool:
            again = list(pool.map(lambda name: (name, said(platform, key, name)), [*names, "acme/base"] * 3))
        assert all(alone[name] == text for name, text in again), "mixed into one batch, an answer was another's"
        assert len(platform.engines()) == 1
        used = wait_until(lambda: _billed(admin, 4 * (ADAPTERS + 1)), "every request in the ledger")
        assert {row["group"]: row["output_tokens"] for row in used} == dict.fromkeys([*names, "acme/base"], 64)
        view = admin.get("/api/v1/endpoints/acme/a0").json()
        assert view["base"] == "acme/base"
        assert view["state"] in ("ready", "idle"), "its state is its base's"
        assert batch(platform, key, "acme/a3") == {alone["acme/a3"]}, "a batch on an adapter is that adapter's"
        (row,) = (
            r for r in wait_until(lambda: _billed(admin, 4 * (ADAPTERS + 1) + 3), "lines") if r["group"] == "acme/a3"
        )
        assert (row["requests"], row["output_tokens"]) == (7, 7 * 16)


def batch(platform: Platform, key: str, endpoint: str) -> set[str]:
    """What three equal lines of a batch are answered with."""
    client = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=key, max_retries=0)
    body = {
        "model": endpoint,
        "prompt": "the water of the world",
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
    }
    lines = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": body} for n in range(3)]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    wait_until(lambda: client.batches.retrieve(made.id).status == "completed", "the batch", 60)
    output = client.batches.retrieve(made.id).output_file_id
    assert output is not None
    results = [json.loads(line) for line in client.files.content(output).text.splitlines()]
    assert len(results) == 3
    return {result["response"]["body"]["choices"][0]["text"] for result in results}


def _billed(admin: object, requests: int) -> list[dict[str, object]]:
    rows = admin.get("/api/v1/usage", params={"by": "endpoint"}).json()  # type: ignore[attr-defined]
    found = rows["data"] if "data" in rows else rows["rows"]
    return found if sum(row["requests"] for row in found) >= requests else []
