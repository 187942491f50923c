"""Money under SIGKILL, a few seeds of it: the whole table is `python -m bench.faults`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", ["none", "gateway", "ingest", "engine", "all"])
def test_the_ledger_is_what_was_delivered_whatever_is_killed(fault: str) -> None:
    command = [sys.executable, "-m", "bench.faults", "--seeds", "2", "--first", "7001", "--faults", fault]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr[-2_000:]
    (row,) = json.loads(done.stdout)["table"]
    assert row["kills"] == (0 if fault in ("none", "engine") else 6)
    assert row["finished"] > 10
    assert (row["wrong"], row["over"], row["twice"], row["unbalanced"]) == (0, 0, 0, 0), row["problems"]
    assert done.returncode == 0
    if fault in ("none", "ingest", "engine"):
        assert row["delivered_tokens"] == row["billed_tokens"]
