"""Accelerator time on a real platform: the states of each accelerator sum to wall time, also across a SIGKILL."""

from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
from tests.e2e.platform import Platform, running

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONFIG = '[accelerators]\nkind = "cpu"\ncount = 2\n'


def usage_time(platform: Platform) -> dict[str, Any]:
    with platform.admin() as admin:
        return dict(admin.get("/api/v1/usage/time").raise_for_status().json())


def ask(platform: Platform) -> None:
    body = {"model": platform.ready["endpoints"][0], "prompt": "hello", "max_tokens": 4}
    headers = {"authorization": f"Bearer {platform.ready['api_key']}"}
    httpx.post(f"{platform.base_url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()


def check_conserved(view: dict[str, Any]) -> int:
    """Every accelerator's wall time in milliseconds, which must be the same for all."""
    walls = {one["wall_ms"] for one in view["accelerators"]}
    assert len(view["accelerators"]) == 2
    assert len(walls) == 1
    for one in view["accelerators"]:
        assert abs(sum(one["states_ms"].values()) - one["wall_ms"]) <= len(one["states_ms"])
    return int(walls.pop())


def test_every_millisecond_is_accounted_for(tmp_path: Path) -> None:
    with running(tmp_path, config=CONFIG) as platform:
        ask(platform)
        before = usage_time(platform)
        wall_ms = check_conserved(before)
        used = next(e for e in before["endpoints"] if e["endpoint"] == platform.ready["endpoints"][0])
        assert used["ready_ms"] > 0
        assert used["states_ms"].get("activating", 0) > 0
        assert "unreported" not in before["platform"]["states_ms"]
        platform.crash()
        after = usage_time(platform)
        assert check_conserved(after) > wall_ms
        assert after["platform"]["states_ms"]["unreported"] > 0, "while it was dead, nobody's time"
        same = next(e for e in after["endpoints"] if e["endpoint"] == used["endpoint"])
        assert same["ready_ms"] >= used["ready_ms"], "what was known before the kill is still known"
