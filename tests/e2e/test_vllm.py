"""Two private endpoints on real vLLM (its CPU build), one accelerator that holds one: one stops for the other, billed.

Opt-in: each start takes tens of seconds.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.foreign import body, client, usage
from tests.e2e.platform import Platform, running, wait_until
from tests.programs import VLLM_PYTHON

pytest.importorskip("torch")
from tests import models

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(1_800),
    pytest.mark.skipif(not VLLM_PYTHON, reason="vLLM was not asked for (make engines-vllm, TIDEGATE_TEST_VLLM_PYTHON)"),
]

ENDPOINTS = ("acme/one", "bolt/two")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("vllm")
    shape: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 704, "vocab": 504}
    lines = [
        "demo = false",
        f'engine.programs.vllm = "{VLLM_PYTHON} -m vllm.entrypoints.openai.api_server"',
        "engine.start_ms_max = 600000",
        'accelerators = { kind = "cpu", count = 1, memory = "6GiB" }',
        "gateway.hold_ms_max = 900000",
    ]
    for seed, name in enumerate(ENDPOINTS):
        tenant, _ = name.split("/")
        model = models.llama(**shape, context=2048, seed=seed, dtype="bfloat16")
        lines += [f'[[tenants]]\nid = "{tenant}"\napi_key = "key-of-{tenant}-0123456789"']
        lines += [f'[[endpoints]]\nname = "{name}"\nmodel = "{model}"\nengine = "vllm"\nslots = 2']
        lines += ['engine_args = { enforce_eager = "true" }']
    with running(folder / "up", config="\n".join(lines)) as started:
        yield started


def test_one_stops_for_the_other_and_each_pays_for_its_own(platform: Platform) -> None:
    billed = {name: [0, 0] for name in ENDPOINTS}
    for name in (*ENDPOINTS, ENDPOINTS[0]):
        with client(platform, name.split("/")[0]) as http:
            response = http.post("/v1/chat/completions", json=body(name))
        assert response.status_code == 200, response.text
        billed[name][0] += response.json()["usage"]["prompt_tokens"]
        billed[name][1] += response.json()["usage"]["completion_tokens"]
    expected = {name: (tokens[0], tokens[1]) for name, tokens in billed.items()}
    wait_until(lambda: usage(platform) == expected, f"usage to be {expected}", 20)
    with platform.admin() as admin:
        rows = admin.get("/api/v1/activity", params={"limit": 500}).json()["data"]
    reasons = [row["reason"] for row in rows]
    assert any("stops instead of sleeping (asleep it still holds" in reason for reason in reasons)


def test_a_stream_the_client_leaves_is_billed_for_what_it_got(platform: Platform) -> None:
    name, seen = ENDPOINTS[0], 0
    before = usage(platform)[name]
    with (
        client(platform, "acme") as http,
        http.stream("POST", "/v1/chat/completions", json=body(name, stream=True, max_tokens=1500)) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: {"):
                assert "usage" not in json.loads(line[6:])
                seen += 1
            if seen >= 20:
                break
    wait_until(lambda: usage(platform)[name][1] > before[1], "the cut-off stream to be billed", 20)
    assert seen - 2 <= usage(platform)[name][1] - before[1] < 1500
