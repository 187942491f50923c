"""A short round of bench/batch.py: what it shows at length must hold every time."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
from bench import batch

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_every_process_killed_once_and_every_line_done_and_billed_once(tmp_path: Path) -> None:
    result = batch.kills(400, tmp_path)
    assert {"engine", "gateway", "platform"} <= set(result["killed"]), result
    assert result["status"] == "completed"
    assert (result["done"], result["done_twice"], result["failed"]) == (400, 0, 0), result
    assert (result["billed"], result["billed_twice"]) == (400, 0), result
    assert result["tokens_billed"] == result["tokens"] == 400 * 8
    assert result["entries_sum"] == 0
