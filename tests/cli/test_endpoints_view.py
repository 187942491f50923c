"""The live table of endpoints: every state has a look, a share without requests is a dash."""

import io
from typing import Any

from rich.console import Console

from tidegate.cli.endpoints_view import STYLES, table
from tidegate.domain.endpoint import EndpointState

NOTHING = {"requests": 0, "attainment": None, "availability": None, "error_budget": None}
SOME = {"requests": 10, "attainment": 0.9, "availability": 1.0, "error_budget": -9.0}


def row(**changes: Any) -> dict[str, Any]:
    shown = {
        "name": "acme/a", "mode": "serverless", "state": "asleep", "tier": "host", "in_flight": 0, "queued": 2,
        "concurrency": {"current": 0, "full": 16}, "reason": "asleep: wakes on the next request",
        "slo_status": dict.fromkeys(("5m", "1h", "24h", "30d"), NOTHING), "activation_bounds": {},
    }  # fmt: skip
    return shown | changes


def printed(*rows: dict[str, Any]) -> str:
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(table(list(rows)))
    return console.export_text()


def test_every_state_has_a_look() -> None:
    assert STYLES.keys() == {state.value for state in EndpointState}


def test_what_it_shows() -> None:
    bounds = {"host": {"count": 3, "p50_ms": 40, "p95_ms": 50, "p99_ms": 61}}
    text = printed(row(), row(name="acme/b", state="ready", slo_status=dict.fromkeys(("5m", "1h", "24h", "30d"), SOME),
                              activation_bounds=bounds))  # fmt: skip
    assert "asleep(host)" in text
    assert "0 of 0 / 16" in text
    assert "host 61 ms" in text
    assert "90.0%" in text
    assert "overdrawn" in text
    assert "–" in text
