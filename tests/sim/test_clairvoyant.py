"""Keep-alive against the clairvoyant on made gaps, through the public report."""

from pathlib import Path

import pytest

from tests.sim.test_simulate import small_trace
from tidegate.sim.clairvoyant import report


def test_regular_gaps_cost_hardly_more_than_the_clairvoyant(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = sorted((60.0 * number + 1.7 * which, f"e{which}") for number in range(300) for which in range(3))
    lines = "".join(f"{at:.3f},{name},100,10\n" for at, name in rows)
    trace.write_text("t_s,endpoint,input_tokens,output_tokens\n" + lines)
    found = report(trace)
    assert found["endpoints"] == 3
    ratios = found["over_clairvoyant"]
    assert ratios["tidegate"]["worst"] < 1.05
    assert ratios["ski-rental"]["pooled"] == pytest.approx(2.0, rel=0.01)
    assert ratios["keep 600 s"]["pooled"] > 5.0


def test_bursts_are_never_above_the_guard_rail(tmp_path: Path) -> None:
    ratios = report(small_trace(tmp_path / "t.csv", minutes=60.0))["over_clairvoyant"]
    assert ratios["tidegate"]["pooled"] <= ratios["ski-rental"]["pooled"]
    assert ratios["tidegate"]["worst"] <= 2.0
