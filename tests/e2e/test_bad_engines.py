"""Foreign engines that misbehave on the whole platform: the reason is on their endpoint, their requests are held or
refused honestly, and a neighbour of the same engine goes on unharmed. On a stand-in (`tests/engines/standin.py`).
"""

import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contracts.subjects import SHAPE, STANDIN
from tests.e2e.foreign import body, client, usage
from tests.e2e.platform import Platform, running, wait_until

pytest.importorskip("torch")
from tests import models

pytestmark = pytest.mark.e2e

CONFIG = """
demo = false
engine.programs.sglang = "{program}"
engine.start_ms_max = 4000
gateway.hold_ms_max = 20000
accelerators = {{ kind = "cpu", count = 4, memory = "4GiB" }}
[[tenants]]
id = "acme"
api_key = "key-of-acme-0123456789"
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("bad")
    program = folder / "sglang"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {STANDIN} sglang "$@"\n')
    program.chmod(0o700)
    with running(folder / "up", config=CONFIG.format(program=program)) as started:
        apply(started, "good", "").raise_for_status()  # the first shows that sleep is worth something here
        wait_until(lambda: view(started, "good")["state"] in ("ready", "idle"), "the good one to be ready")
        yield started


def apply(platform: Platform, name: str, fault: str) -> httpx.Response:
    shape = SHAPE | ({"hidden": 512, "vocab": 36_000} if fault == "keeps its memory" else {})  # more than is overlooked
    model = models.copy(models.llama(**shape, dtype="bfloat16"), platform.directory / f"model-{name}")
    (model / "fault").write_text(fault)
    with platform.admin() as admin:
        return admin.put(f"/api/v1/endpoints/acme/{name}", json={"model": str(model), "engine": "sglang", "slots": 2})


def view(platform: Platform, name: str) -> dict[str, Any]:
    with platform.admin() as admin:
        return dict(admin.get(f"/api/v1/endpoints/acme/{name}").json())


def act(platform: Platform, name: str, verb: str) -> None:
    with platform.admin() as admin:
        admin.post(f"/api/v1/endpoints/acme/{name}/{verb}").raise_for_status()


def ask(platform: Platform, name: str) -> httpx.Response:
    with client(platform, "acme") as http:
        return http.post("/v1/chat/completions", json=body(f"acme/{name}"))


def ready(platform: Platform, name: str) -> None:
    wait_until(lambda: view(platform, name)["state"] in ("ready", "idle"), f"{name} to be ready")


def told(platform: Platform, name: str) -> str:
    """Everything the audit log says of it."""
    with platform.admin() as admin:
        lines = admin.get("/api/v1/activity", params={"limit": 500}).json()["data"]
    return "\n".join(line["reason"] for line in lines if line["subject"] == f"acme/{name}")


def test_one_that_never_becomes_ready_is_failed_with_its_reason_and_refused(platform: Platform) -> None:
    apply(platform, "stuck", "never ready").raise_for_status()
    reason = wait_until(
        lambda: r if "did not become ready within" in (r := view(platform, "stuck")["reason"]) else "", "its reason"
    )
    assert ask(platform, "good").status_code == 200, "meanwhile its neighbour serves"
    wait_until(lambda: view(platform, "stuck")["state"] == "failed", "the third failure")
    refused = ask(platform, "stuck")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "endpoint_failed"
    assert "did not become ready within" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"].isdigit()
    assert str(platform.directory) not in reason
    with platform.admin() as admin:
        admin.delete("/api/v1/endpoints/acme/stuck").raise_for_status()


@pytest.mark.parametrize(
    ("name", "fault", "says"),
    [
        ("babbling", "gibberish", "canary mismatch"),
        ("keeping", "keeps its memory", "memory_not_freed"),
        ("hanging", "hangs in sleep", "did not sleep within"),
    ],
)
def test_one_that_goes_wrong_in_a_swap_is_ended_told_and_started_afresh(
    platform: Platform, name: str, fault: str, says: str
) -> None:
    """The request that came meanwhile is held and answered by a fresh process; it is billed once, the swap is not."""
    before = usage(platform).get(f"acme/{name}", (0, 0))[1]
    apply(platform, name, fault).raise_for_status()
    ready(platform, name)
    act(platform, name, "sleep")
    wait_until(lambda: view(platform, name)["tier"] != "accelerator", "it to be off its accelerator")
    answer = ask(platform, name)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == ask(platform, "good").json()["choices"][0]["message"]["content"], "and no word of it is gibberish"
    assert says in told(platform, name)
    wait_until(lambda: usage(platform)[f"acme/{name}"][1] == before + 5, "one answer to be billed")
    assert not [line for line in told(platform, "good").splitlines() if says in line], "its neighbour is unharmed"
    with platform.admin() as admin:
        admin.delete(f"/api/v1/endpoints/acme/{name}").raise_for_status()
