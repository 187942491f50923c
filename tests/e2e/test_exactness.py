"""Short rounds of bench/exactness.py: what it shows at length must hold every time."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from bench import exactness

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def check_always(result: dict[str, Any]) -> None:
    assert result["wrong_answers"] == 0, "a tenant got another model's text"
    assert result["billed_twice"] == 0
    assert result["entries_sum"] == 0
    assert result["answered"] + result["aborted"] + result["failed"] + result["cut"] == result["sent"]


def test_without_faults_everything_is_answered_and_billed_exactly(tmp_path: Path) -> None:
    result = exactness.round_of("none", requests=120, concurrency=16, seed=11, directory=tmp_path)
    check_always(result)
    assert result["failed"] == result["cut"] == 0, result
    assert (result["billed_over"], result["billed_under"], result["billed_unseen"]) == (0, 0, 0)
    assert result["ledger_rows"] == result["sent"]


def test_engines_killed_again_and_again(tmp_path: Path) -> None:
    result = exactness.round_of("engine", requests=120, concurrency=16, seed=12, directory=tmp_path, every_s=1.5)
    check_always(result)
    assert result["killed"] >= 1
    assert result["cut"] == 0, "an engine's death must not cut a client off without an error"
    assert (result["billed_over"], result["billed_under"], result["billed_unseen"]) == (0, 0, 0)
    assert result["ledger_rows"] == result["sent"]


def test_the_gateway_killed_and_restarted(tmp_path: Path) -> None:
    result = exactness.round_of("gateway", requests=120, concurrency=16, seed=13, directory=tmp_path, every_s=2.0)
    check_always(result)
    assert result["killed"] >= 1
    assert result["answered"] > 0
    assert (result["billed_over"], result["billed_under_answered"]) == (0, 0), "a finished answer is billed exactly"
