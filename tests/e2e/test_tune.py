"""`tidegate tune` on the real platform: a curve under real load, a winner within the SLO, nothing left behind."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.platform import Platform, running

pytest.importorskip("torch")
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running(tmp_path_factory.mktemp("tune")) as started:
        yield started


def tune(platform: Platform, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tidegate", "tune", "demo/tides", *arguments, "-o", "json"]
    keys = {"TIDEGATE_URL": platform.base_url, "TIDEGATE_ADMIN_KEY": platform.ready["admin_key"]}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env={"PATH": "/usr/bin:/bin", **keys})


def test_a_winner_with_its_curve_that_the_next_apply_follows(platform: Platform) -> None:
    with platform.admin() as admin:
        model = admin.get("/api/v1/endpoints/demo/tides").json()["model"]["source"]
        slack = {"ttft_ms": 60_000, "tpot_ms": 10_000}  # whatever else this machine does
        assert admin.put("/api/v1/endpoints/demo/tides", json={"model": model, "slo": slack}).status_code == 200
        before = {row["name"] for row in admin.get("/api/v1/endpoints").json()["data"]}
    saved = platform.directory / "data" / "profiles" / "quick.toml"
    saved.parent.mkdir(exist_ok=True)
    done = tune(platform, "--slots", "1,3,100000", "--seconds", "1", "--output-tokens", "8", "--save", str(saved))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["command"] == (
        "tidegate tune demo/tides --slots 1,3,100000 --seconds 1 --prompt-tokens 64 --output-tokens 8"
    )
    assert " × cpu (" in report["machine"]
    assert report["command"] in saved.read_text()
    one, three, refused = report["curve"]
    assert report["winner"] in (one, three)
    assert report["winner"]["tokens_per_s"] == max(one["tokens_per_s"], three["tokens_per_s"]) > 0
    assert one["requests"] >= 1
    assert three["requests"] >= 3
    assert "slots" in refused["refused"]
    with platform.admin() as admin:
        assert {row["name"] for row in admin.get("/api/v1/endpoints").json()["data"]} == before
        keys = [row for row in admin.get("/api/v1/keys").json()["data"] if row["tenant"] == "tuning"]
        assert [row["state"] for row in keys] == ["revoked"]
        profiled = {"model": model, "slo": slack, "profile": "quick"}
        applied = admin.put("/api/v1/endpoints/demo/tides", json=profiled)
        assert applied.status_code == 200, applied.text
        made = applied.json()
        assert made["slots"] == made["concurrency_target"] == report["winner"]["slots"], "the core follows the curve"
        admin.put("/api/v1/endpoints/demo/tides", json={"model": model, "slo": slack})


def test_what_keeps_no_slo_is_said(platform: Platform) -> None:
    with platform.admin() as admin:
        model = admin.get("/api/v1/endpoints/demo/tides").json()["model"]["source"]
        admin.put("/api/v1/endpoints/demo/tides", json={"model": model, "slo": {"ttft_ms": 1, "tpot_ms": 1}})
    done = tune(platform, "--slots", "2", "--seconds", "1", "--output-tokens", "8")
    assert done.returncode == 1
    assert "SLO" in done.stderr
    assert json.loads(done.stdout)["winner"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slots", "0"], "numbers from 1"),
        (["--engine-arg", "x"], "NAME=V1,V2"),
        (["--slots", ",".join(["1"] * 40)], "at most 32"),
    ],
)
def test_wrong_words_are_refused(platform: Platform, arguments: list[str], words: str) -> None:
    done = tune(platform, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
