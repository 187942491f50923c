"""Two private endpoints on llama-server, one accelerator that holds one: evicted for each other, billed right."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.foreign import body, client, usage
from tests.e2e.platform import Platform, running, wait_until
from tests.programs import LLAMA_SERVER

pytest.importorskip("torch")
from tests import gguf, models

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not LLAMA_SERVER, reason="llama-server was not found on PATH (make engines-llamacpp)"),
]

ENDPOINTS = ("acme/one", "bolt/two")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("llamacpp")
    shape: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 704, "vocab": 2048}
    lines = [
        "demo = false",
        f'engine.programs.llamacpp = "{LLAMA_SERVER}"',
        'accelerators = { kind = "cpu", count = 1, memory = "512MiB" }',
        "gateway.hold_ms_max = 120000",
    ]
    for seed, name in enumerate(ENDPOINTS):
        tenant, short = name.split("/")
        model = gguf.from_llama(models.llama(**shape, context=2048, seed=seed), folder / f"{short}.gguf")
        lines += [f'[[tenants]]\nid = "{tenant}"\napi_key = "key-of-{tenant}-0123456789"']
        lines += [f'[[endpoints]]\nname = "{name}"\nmodel = "{model}"\nengine = "llamacpp"\nslots = 2']
    with running(folder / "up", config="\n".join(lines)) as started:
        yield started


def test_one_gives_way_to_the_other_and_each_pays_for_its_own(platform: Platform) -> None:
    billed = {name: [0, 0] for name in ENDPOINTS}
    said: dict[str, set[str]] = {name: set() for name in ENDPOINTS}
    for _ in range(3):
        for name in ENDPOINTS:
            with client(platform, name.split("/")[0]) as http:
                response = http.post("/v1/chat/completions", json=body(name))
            assert response.status_code == 200, response.text
            answer = response.json()
            billed[name][0] += answer["usage"]["prompt_tokens"]
            billed[name][1] += answer["usage"]["completion_tokens"]
            said[name].add(answer["choices"][0]["message"]["content"])
    assert all(len(texts) == 1 for texts in said.values()), "each wake brings back the very same model"
    assert said[ENDPOINTS[0]] != said[ENDPOINTS[1]]
    expected = {name: (tokens[0], tokens[1]) for name, tokens in billed.items()}
    wait_until(lambda: usage(platform) == expected, f"usage to be {expected}", 20)
    with platform.admin() as admin:
        kinds = [row["kind"] for row in admin.get("/api/v1/activity", params={"limit": 500}).json()["data"]]
    assert kinds.count("wake") >= 3, "evicted means asleep here, not ended: it comes back by waking"


def test_a_stream_the_client_leaves_is_billed_for_what_it_got(platform: Platform) -> None:
    name = ENDPOINTS[0]
    before = usage(platform).get(name, (0, 0))
    seen, tokens = 0, 0
    with (
        client(platform, "acme") as http,
        http.stream("POST", "/v1/chat/completions", json=body(name, stream=True, max_tokens=1500)) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "usage" not in event
                assert "timings" not in event
                seen += 1
            if seen >= 20:
                break
    deadline = time.monotonic() + 20
    while tokens <= 0 and time.monotonic() < deadline:
        tokens = usage(platform).get(name, (0, 0))[1] - before[1]
        time.sleep(0.05)
    assert 19 <= tokens < 1500, "what was sent until it left, not nothing and not the whole"
    assert usage(platform)[name][0] > before[0]


def test_what_an_engine_refuses_is_told_and_not_billed(platform: Platform) -> None:
    before = usage(platform)
    with client(platform, "acme") as http:
        response = http.post("/v1/chat/completions", json=body(ENDPOINTS[0], messages="nonsense"))
        too_long = http.post("/v1/completions", json={"model": ENDPOINTS[0], "prompt": "water " * 5000})
    assert response.status_code == 400
    assert too_long.status_code == 400
    assert usage(platform) == before


def test_a_model_for_another_engine_is_refused_by_name(platform: Platform) -> None:
    with platform.admin() as admin:
        wrong = {"model": str(models.llama()), "engine": "llamacpp"}
        response = admin.put("/api/v1/endpoints/acme/three", json=wrong)
        assert response.status_code in (400, 422), response.text
        assert "GGUF" in response.json()["error"]["message"]
        file = str(Path(platform.directory.parent) / "one.gguf")
        response = admin.put("/api/v1/endpoints/acme/three", json={"model": file})
        assert "safetensors" in response.json()["error"]["message"]
        response = admin.put("/api/v1/endpoints/acme/three", json={"model": file, "engine": "sglang"})
        assert "engine" in response.json()["error"]["message"]
