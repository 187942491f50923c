"""Private endpoints that are LoRA adapters on one vLLM replica, on the real platform: each its own answers and bill.

On a stand-in for vLLM (`tests/engines/standin.py`), and on the real one where it was asked for.
"""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.contracts.subjects import SHAPE, STANDIN
from tests.e2e.foreign import body, client, usage
from tests.e2e.platform import Platform, running, wait_until
from tests.programs import VLLM_PYTHON

pytest.importorskip("torch")
from tests import models

REAL = pytest.mark.skipif(
    not VLLM_PYTHON, reason="vLLM was not asked for (make engines-vllm, TIDEGATE_TEST_VLLM_PYTHON)"
)
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_800)]

CONFIG = """
demo = false
engine.programs.vllm = "{program}"
engine.start_ms_max = 600000
accelerators = {{ kind = "cpu", count = 1, memory = "6GiB" }}
gateway.hold_ms_max = 900000
[[tenants]]
id = "acme"
api_key = "key-of-acme-0123456789"
"""
BASE: dict[str, Any] = {
    "model": str(models.llama(**(SHAPE | {"vocab": 504}), context=2048, dtype="bfloat16")),  # every token has a text
    "engine": "vllm",
    "slots": 4,
    "engine_args": {"enable_lora": "true", "max_loras": "4", "enforce_eager": "true"},
}


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=[pytest.mark.slow, REAL])])
def platform(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("lora")
    program = f"{VLLM_PYTHON} -m vllm.entrypoints.openai.api_server"
    if request.param == "stand-in":
        program = str(folder / "vllm")
        Path(program).write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {STANDIN} vllm "$@"\n')
        Path(program).chmod(0o700)
    with running(folder / "up", config=CONFIG.format(program=program)) as started:
        apply(started, "acme/base", BASE).raise_for_status()
        yield started


def apply(platform: Platform, name: str, wanted: dict[str, Any]) -> httpx.Response:
    with platform.admin() as admin:
        return admin.put(f"/api/v1/endpoints/{name}", json=wanted)


def adapter(seed: int, rank: int = 4) -> dict[str, Any]:
    return {"model": str(models.lora(Path(BASE["model"]), seed, rank)), "base": "acme/base"}


def ask(platform: Platform, name: str, **more: Any) -> httpx.Response:
    with client(platform, "acme") as http:
        return http.post("/v1/chat/completions", json=body(name, **more))


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def engine(platform: Platform) -> psutil.Process:
    """The one replica's process."""
    words = (STANDIN.name, "vllm.entrypoints")
    return next(p for p in platform.children() if any(word in " ".join(p.cmdline()) for word in words))


def test_adapters_share_one_replica_each_with_its_own_answers_and_bill(platform: Platform) -> None:
    names = [f"acme/a{seed}" for seed in range(3)]
    for seed, name in enumerate(names):
        apply(platform, name, adapter(seed)).raise_for_status()
    said = {name: text(ask(platform, name)) for name in [*names, "acme/base"]}
    assert len(set(said.values())) == 4, "every adapter changes what is said"
    assert {name: text(ask(platform, name)) for name in said} == said
    answered = ask(platform, names[0]).json()["model"]
    assert answered.startswith(f"{names[0]}@"), "an answer names the endpoint and its adapter"
    with (
        client(platform, "acme") as http,
        http.stream("POST", "/v1/chat/completions", json=body(names[1], stream=True)) as stream,
    ):
        events = [line for line in stream.iter_lines() if line.startswith("data: {")]
    assert all(f'"model":"{names[1]}@' in event for event in events)
    counts = dict.fromkeys([*names, "acme/base"], 10) | {names[0]: 15, names[1]: 15}
    wait_until(lambda: {n: t[1] for n, t in usage(platform).items()} == counts, "each to pay for its own", 20)
    assert len([p for p in platform.children() if p.pid == engine(platform).pid]) == 1


def test_an_adapter_applied_anew_is_another_one_and_a_new_engine_is_told_again(platform: Platform) -> None:
    apply(platform, "acme/moving", adapter(7)).raise_for_status()
    before = text(ask(platform, "acme/moving"))
    apply(platform, "acme/moving", adapter(8)).raise_for_status()
    after = wait_until(
        lambda: now if (now := text(ask(platform, "acme/moving"))) != before else "", "the new adapter's words", 20
    )
    engine(platform).send_signal(signal.SIGKILL)
    wait_until(lambda: ask(platform, "acme/moving").status_code == 200, "an answer of the next engine", 900)
    assert text(ask(platform, "acme/moving")) == after


def test_what_the_engine_does_not_take_is_said_and_harms_nobody(platform: Platform) -> None:
    apply(platform, "acme/wide", adapter(9, rank=32)).raise_for_status()
    refused = ask(platform, "acme/wide")
    assert refused.status_code == 503, refused.text
    error = refused.json()["error"]
    assert error["code"] == "endpoint_failed"
    assert "rank 32 is greater than max_lora_rank" in error["message"]
    assert "/" not in error["message"].replace("acme/wide", ""), "no path of this machine"
    assert text(ask(platform, "acme/base"))


def test_a_base_without_room_for_adapters_is_refused_by_field(platform: Platform) -> None:
    apply(platform, "acme/plain", BASE | {"engine_args": {}}).raise_for_status()
    error = apply(platform, "acme/lost", adapter(1) | {"base": "acme/plain"}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_configuration", "base")
    assert 'enable_lora = "true"' in error["message"]
    conflict = apply(platform, "acme/base", BASE | {"engine_args": {}})
    assert conflict.status_code == 409, "a base that carries adapters goes on taking them"
