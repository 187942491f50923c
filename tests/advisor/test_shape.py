"""The shape of traffic of which the shape is known."""

from dataclasses import replace

import numpy as np
import pytest

from tidegate.advisor import svg
from tidegate.advisor.described import describe
from tidegate.advisor.shape import measure
from tidegate.advisor.traffic import DAY_MS


@pytest.mark.parametrize("kind", ["steady", "business-hours", "spiky", "mixed"])
def test_described_shapes_are_recognised(kind: str) -> None:
    assert measure(describe(kind, 4_000)).kind == kind


def test_steady_traffic_is_all_base() -> None:
    shape = measure(describe("steady", 14_400))
    assert shape.mean == pytest.approx(10.0)
    assert shape.burstiness == pytest.approx(1.0, abs=0.03)
    assert shape.base_share > 0.8
    assert shape.spike_share < 0.01
    assert shape.idle_share < 0.001
    assert shape.hour_peak_to_mean < 1.3


def test_business_hours_are_idle_at_night_and_predictable_but_for_the_weekend() -> None:
    shape = measure(describe("business-hours", 4_000))
    assert shape.hour_of_day[3] == 0
    assert max(range(24), key=shape.hour_of_day.__getitem__) in (10, 11, 14, 15)
    assert shape.idle_share > 0.5
    assert shape.predictability is not None
    assert shape.predictability > 0.5
    assert shape.weekday is not None
    assert shape.weekday[0] > 5 * shape.weekday[6]


def test_a_week_that_begins_after_midnight_has_its_seven_days() -> None:
    traffic = describe("business-hours", 4_000)
    shape = measure(replace(traffic, start_ms=20_759 * DAY_MS + 3 * 60_000.0))  # a Monday, three minutes past
    assert shape.weekday is not None
    assert np.isfinite(shape.weekday).all()
    assert shape.weekday[0] > 5 * shape.weekday[6]


def test_bursts_are_bursty_and_unpredictable() -> None:
    shape = measure(describe("spiky", 4_000))
    assert shape.burstiness > 5
    assert shape.spike_share > 0.5
    assert shape.predictability is not None
    assert shape.predictability < 0.3


def test_pictures_are_whole_and_escaped() -> None:
    shape = measure(describe("mixed", 1_000))
    picture = svg.heat(shape.days, "<traffic>", [f"day {k}" for k in range(len(shape.days))])
    assert picture.count("<rect") == int(np.sum(~np.isnan(shape.days)))
    assert "<traffic>" not in picture
    drawn = svg.lines([("a", [(1.0, 2.0), (2.0, 4.0)])], label="l", x_name="x", y_name="y", marks=[(1.5, "here")])
    assert drawn.count("<polyline") == 1
    assert "here" in drawn
