"""Advice as a whole: the contract, the cheapest feasible mode, exhaustive against pruned, the page, the command."""

import datetime
import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidegate.advisor import breakeven, catalogue, read
from tidegate.advisor.advise import Question, advise
from tidegate.advisor.catalogue import Offer, Provider, TokenPrice
from tidegate.advisor.costs import Need
from tidegate.advisor.described import describe
from tidegate.advisor.hardware import model_named
from tidegate.advisor.page import page
from tidegate.advisor.traffic import Traffic
from tidegate.domain.errors import Refusal

TODAY = datetime.date(2026, 11, 21)
TRACES = Path(__file__).parents[3] / "shared" / "traces"
ROWS = 2_000
NEED = Need(model_named("llama-8b"))


def dear_tokens(factor: float) -> list[Provider]:
    """The second price set: every token at `factor` times its price."""

    def offer(old: Offer) -> Offer:
        tokens = [TokenPrice(model=t.model, input=t.input * factor, output=t.output * factor,
                             cached=None if t.cached is None else t.cached * factor) for t in old.tokens]  # fmt: skip
        return Offer(**({k: getattr(old, k) for k in old.__struct_fields__} | {"tokens": tokens}))

    return [
        Provider(name=p.name, title=p.title, checked=p.checked, sources=p.sources, offer=[offer(o) for o in p.offer])
        for p in catalogue.load()
    ]


def cheapest(answer: dict[str, Any]) -> tuple[str, float]:
    """By hand: the least monthly cost among all offers and the hybrid that meet the target."""
    found = [(o["monthly_usd"], o["mode"]) for o in answer["offers"] if o["feasible"] and o["monthly_usd"] is not None]
    hybrid = answer["hybrid"]
    if hybrid and hybrid["feasible"]:
        found.append((hybrid["monthly_usd"], "hybrid"))
    usd, mode = min(found)
    return mode, usd


@pytest.fixture
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break-even only at the traffic as it is: what is compared needs no curve over volumes, and that takes longest."""
    monkeypatch.setattr(breakeven, "STEPS", (1.0,))


def compare(traffic: Traffic, offers: list[Provider], need: Need) -> None:
    quick = advise(traffic, offers, Question(need), TODAY)
    whole = advise(traffic, offers, Question(replace(need, exhaustive=True)), TODAY)
    assert whole["replays"] >= quick["replays"]
    mode, usd = cheapest(whole)
    assert quick["recommended"] == mode
    best = next(m for m in quick["modes"] if m["mode"] == quick["recommended"])
    assert best["monthly_usd"] <= usd * 1.001
    assert best["p99_ttft_ms"] is None or best["p99_ttft_ms"] <= need.slo_ttft_ms


@pytest.mark.usefixtures("no_curve")
@pytest.mark.parametrize("factor", [1.0, 30.0])
@pytest.mark.parametrize("shape", ["spiky", "business-hours"])
def test_the_recommended_mode_is_the_cheapest_feasible_one(shape: str, factor: float) -> None:
    compare(describe(shape, 300, 900, 200), dear_tokens(factor), NEED)


@pytest.mark.usefixtures("no_curve")
@pytest.mark.parametrize("factor", [1.0, 30.0])
@pytest.mark.parametrize("name", ["diurnal_servegen_7d", "spiky_servegen_7d", "steady_azure_conv_1h"])
def test_also_on_real_traffic(name: str, factor: float) -> None:
    path = TRACES / f"{name}.csv.gz"
    if not path.exists():
        pytest.skip("the shared traces are not here")
    traffic = read.read(path)
    thinned = traffic.chosen(np.arange(len(traffic)) % max(1, len(traffic) // ROWS) == 0)
    compare(thinned, dear_tokens(factor), NEED)


def test_the_contract() -> None:
    answer = advise(describe("mixed", 2_000), catalogue.load(), Question(NEED, current="dedicated"), TODAY)
    assert [m["mode"] for m in answer["modes"]] == [
        "serverless",
        "dedicated",
        "dedicated_serverless",
        "batch",
        "hybrid",
    ]
    for row in answer["modes"]:
        assert {"mode", "monthly_usd", "p99_ttft_ms", "feasible", "why"} <= set(row)
        assert row["why"]
    assert answer["recommended"] == cheapest(answer)[0]
    assert {"utilisation", "tokens_month", "requests_per_hour", "sensitivity"} <= set(answer["break_even"])
    assert answer["changes"][0].startswith("move from dedicated to ")
    assert json.loads(json.dumps(answer)) == json.loads(json.dumps(answer, allow_nan=False))
    ranged = next(m for m in answer["modes"] if m["mode"] == "dedicated_serverless")
    assert ranged["low_usd"] < ranged["monthly_usd"] < ranged["high_usd"]


def test_break_even_is_where_both_cost_the_same() -> None:
    answer = advise(describe("steady", 5_000), catalogue.load(), Question(NEED, 0.0, ("tidegate",)), TODAY)
    even = answer["break_even"]
    assert even["requests_per_hour"] * even["usd_per_request"] == pytest.approx(even["usd_per_hour"])
    known = dict(even["sensitivity"])
    assert known["token prices 20 % lower"] == pytest.approx(even["utilisation"] / 0.8)
    assert known["throughput 20 % higher"] == pytest.approx(even["utilisation"] / 1.2)


def test_a_hybrid_is_the_best_of_its_curve() -> None:
    answer = advise(describe("mixed", 20_000, 2_000, 300), dear_tokens(12.0), Question(NEED, 0.0, ("tidegate",)), TODAY)
    hybrid = answer["hybrid"]
    curve = hybrid["curve"]
    assert curve[0] == pytest.approx(
        next(m for m in answer["modes"] if m["mode"] == "dedicated_serverless")["monthly_usd"]
    )
    assert np.diff(curve)[-1] <= 1825.01  # a replica costs at most itself
    if hybrid["replicas"]:
        assert hybrid["monthly_usd"] == pytest.approx(min(curve[1:-1]))


@pytest.mark.usefixtures("no_curve")
def test_bursts_overflow_before_a_base_replica_is_full() -> None:
    """With all its places taken a base replica is too slow for a burst; the hybrid was given up for that."""
    calm = describe("steady", 40_000, 500, 30)
    calm = calm.chosen(calm.t_ms < 2 * 3.6e6)
    at_ms = np.concatenate([calm.t_ms, *(k * 120_000.0 + np.arange(80) * 20.0 for k in range(60))])
    order = np.argsort(at_ms, kind="stable")
    burst = np.full(60 * 80, 1)

    def with_bursts(column: Any, value: int) -> Any:
        return np.concatenate([column, burst * value])[order]

    traffic = replace(
        calm, t_ms=at_ms[order], inputs=with_bursts(calm.inputs, 3_000), outputs=with_bursts(calm.outputs, 20),
        cached=with_bursts(calm.cached, 0), service_ms=with_bursts(calm.service_ms, 0),
        endpoint_of=with_bursts(calm.endpoint_of, 0), span_ms=2 * 3.6e6,
    )  # fmt: skip
    hybrid = advise(traffic, dear_tokens(12.0), Question(NEED, 0.0, ("tidegate",)), TODAY)["hybrid"]
    assert hybrid["feasible"]
    assert hybrid["concurrency"] < 80
    assert f"overflow above {hybrid['concurrency']} at once" in hybrid["why"]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (Question(NEED, async_share=1.5), "--async-share"),
        (Question(NEED, providers=("nobody",)), "--provider: 'nobody' is not in the catalogue; there are aws-lambda"),
        (Question(NEED, current="fast"), "--current: 'fast'"),
    ],
)
def test_questions_that_cannot_be_answered(question: Question, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        advise(describe("steady", 100), catalogue.load(), question, TODAY)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """``<rect/>``: opened and closed at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing() -> None:
    answer = advise(describe("mixed", 1_000), catalogue.load(), Question(NEED), TODAY)
    answer["trace"] = "<script>alert(1)</script>"
    text = page(answer)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links == []
    assert "<script>" not in text
    for part in ("The traffic", "Every mode", "Break-even", "The decision", "STALE", "What is assumed"):
        assert part in text
    assert text.count("<svg") >= 4


def tidegate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tidegate", "advise", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    rows = "\n".join(f"{k * 7.5},acme/chat,{100 + k % 50},{20 + k % 9}" for k in range(300))
    (tmp_path / "t.csv").write_text(f"t_s,endpoint,input_tokens,output_tokens\n{rows}\n")
    done = tidegate("--trace", "t.csv", "--provider", "tidegate", "-o", "json", "--html", "a.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["recommended"] in {m["mode"] for m in answer["modes"]}
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    table = tidegate("--trace", "t.csv", "--provider", "tidegate", "--endpoint", "acme/chat", cwd=tmp_path)
    assert "The decision" in table.stdout
    assert "300 requests of the 1,000 wanted (30 %)" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trace", "none.csv"), "none.csv: No such file"),
        (("--trace", "bad.csv"), "bad.csv: row 2: zero input tokens; expected 1 or more"),
        (("--trace", "bad.csv", "--columns", "input"), "--columns: 'input'; expected FIELD=COLUMN"),
        (("--shape", "flat"), "--shape: 'flat' is not one of"),
        (("--shape", "steady", "--model", "gpt"), "--model: 'gpt' is not known; accepted: llama-8b"),
        (("--shape", "steady", "--endpoint", "x"), "--endpoint: 'x' is not in"),
        (("--shape", "steady", "--providers", "bad.csv"), "bad.csv: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "bad.csv").write_text("t_s,endpoint,input_tokens,output_tokens\n1,a,0,1\n2,a,1,1\n")
    done = tidegate(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
