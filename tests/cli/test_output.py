"""How tables look: nothing is cut off on a narrow terminal, and values read as people read them."""

from typing import Any

import pytest
from rich.console import Console

from tidegate.cli.output import cell, heading, table

ROWS: list[dict[str, Any]] = [
    {
        "name": f"acme/endpoint-{k}", "mode": "dedicated_serverless", "queued": k, "memory_bytes": 3 << 30,
        "created_ms": 1_795_287_484_821, "usd": "0.000019200", "nothing": None,
        "reason": "asleep: wakes on the next request, which then waits for the load from disk",
    }
    for k in range(3)
]  # fmt: skip


def drawn(width: int, rows: list[dict[str, Any]] | None = None, spare: tuple[str, ...] = ()) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(table(rows or ROWS, list(ROWS[0]), "endpoints", spare))
    return capture.get()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_every_value_is_there_at_every_width(width: int) -> None:
    """Cut or folded names cannot be copied; prose may be wrapped at its spaces."""
    text = drawn(width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for whole in ("acme/endpoint-0", "dedicated_serverless", "2026-11-21 18:58:04", "0.0000192", "3.0 GiB"):
        assert text.count(whole) >= 1, (width, whole)
    assert " ".join(text.split()).count("request") == len(ROWS)


def test_a_narrow_terminal_loses_empty_columns_first_then_spare_ones_and_says_so() -> None:
    wide = drawn(200, spare=("memory_bytes",))
    assert "nothing" in wide
    assert "3.0 GiB" in wide
    narrow = drawn(100, spare=("memory_bytes",))
    assert "nothing" not in narrow
    assert "3.0 GiB" not in narrow
    assert "not shown here: memory (-o json)" in narrow


def test_cells_are_not_markup() -> None:
    assert "[bold]" in drawn(200, [ROWS[0] | {"name": "[bold]x[/]"}])


@pytest.mark.parametrize(
    ("value", "name", "said"),
    [
        (1_795_287_484_821, "created_ms", "2026-11-21 18:58:04"),
        (636, "activation_ms_last", "636"),
        (636, "took_ms", "636"),
        ("2026-11-21T18:00:00.000Z", "hour", "2026-11-21 18:00"),
        ("2.500000000", "accelerator_hour_usd", "2.50"),
        ("0.2", "unit_usd", "0.20"),
        ("3", "price_usd", "3.00"),
        ("-0.081009966", "margin_usd", "-0.081009966"),
        ("2.500000000", "version", "2.500000000"),
        (1_288_490_188, "accelerator_bytes", "1.2 GiB"),
        ({"a_ms": 5, "b": None}, "slo", "a_ms=5"),
        ([], "regions", "-"),
        (None, "usd", "-"),
        ("", "", "-"),
        (True, "", "yes"),
        (1.5, "", "1.5"),
        (2.0, "", "2"),
        ([1, 2], "", "1, 2"),
        ({"a": 1}, "", "a=1"),
        (5, "host_bytes", "5 B"),
        (0, "host_bytes", "0 B"),
        (1 << 20, "host_bytes", "1.0 MiB"),
    ],
)
def test_cells(value: Any, name: str, said: str) -> None:
    assert cell(value, name) == said


def test_a_heading_keeps_the_unit_of_a_duration() -> None:
    assert heading("since_ms", [1_795_287_484_821]) == "since"
    assert heading("hold_ms", [20]) == "hold ms"
    assert heading("host_bytes") == "host"
