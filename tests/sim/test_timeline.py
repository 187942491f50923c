"""What a run shows people: the timeline's sums agree with the verdict, and the page says what both do."""

import re
from pathlib import Path
from xml.etree import ElementTree

from tests.sim.test_simulate import small_trace
from tidegate.sim import api
from tidegate.sim.page import render
from tidegate.sim.plan import plan
from tidegate.sim.timeline import BINS, Timeline


def run(tmp_path: Path, accelerators: int = 2) -> tuple[dict[str, object], Timeline]:
    timeline = Timeline()
    trace = small_trace(tmp_path / "t.csv", endpoints=10, minutes=30.0)
    return api.simulate(trace, accelerators=accelerators, slo_ttft_ms=200.0, timeline=timeline), timeline


def test_the_timeline_agrees_with_the_verdict(tmp_path: Path) -> None:
    result, timeline = run(tmp_path)
    totals = timeline.endpoints.values()
    assert sum(t.requests for t in totals) == result["requests"]
    assert sum(t.attained for t in totals) == round(float(str(result["slo_attainment"])) * int(str(result["requests"])))
    assert sum(t.activations for t in totals) == result["activations"]
    assert sum(t.evictions for t in totals) == result["evictions"]
    assert sum(sum(piece.requests.values()) for piece in timeline.slices) == result["requests"]
    assert sum(sum(piece.missed.values()) for piece in timeline.slices) > 0  # 14B models wake in 0.42 s over two links


def test_nobody_is_in_memory_that_is_not_there(tmp_path: Path) -> None:
    _, timeline = run(tmp_path)
    for at in range(BINS):
        at_ms = (at + 0.5) * timeline.span_ms / BINS
        for lane, memory in timeline.lanes.items():
            here = [s for s in timeline.stays if s.lane == lane and s.began_ms <= at_ms < s.ended_ms]
            assert sum(s.nbytes for s in here) <= memory
    assert all(s.ended_ms >= s.ready_ms >= s.began_ms for s in timeline.stays if s.ready_ms >= 0.0)


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    result, timeline = run(tmp_path)
    page = render(result, timeline, "a<b>.csv")
    assert "a&lt;b&gt;.csv" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    drawings = re.findall(r"<svg.*?</svg>", page)
    assert len(drawings) == 3
    named = {t.text for d in drawings for t in ElementTree.fromstring(d).iter() if t.tag.endswith("text")}
    assert named >= set(timeline.endpoints) | set(timeline.lanes)


def test_plan_asks_each_endpoint_and_tells_how_far_it_is(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.csv", endpoints=8, minutes=90.0)
    told: list[tuple[str, int | None, int, int]] = []
    asked = {"attainment": 0.95, "slo_ttft_ms": 500.0, "policies": ("tidegate",)}
    overall = plan(trace, **asked, progress=lambda *seen: told.append(seen))  # type: ignore[arg-type]
    each = plan(trace, **asked, each_endpoint=True)  # type: ignore[arg-type]
    assert overall["policies"]["tidegate"] <= each["policies"]["tidegate"]
    fewest = each["policies"]["tidegate"]
    kept = api.simulate(trace, accelerators=fewest, slo_ttft_ms=500.0)
    fewer = api.simulate(trace, accelerators=fewest - 1, slo_ttft_ms=500.0)
    assert kept["endpoint_attainment_min"] >= 0.95 > fewer["endpoint_attainment_min"]
    assert {policy for policy, *_ in told} == {"tidegate"}
