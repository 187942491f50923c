"""The catalogue: every platform is there, dated, and says where its figures come from."""

import datetime
from pathlib import Path

import pytest

from tidegate.advisor import catalogue
from tidegate.advisor.claims import check, value
from tidegate.advisor.hardware import known
from tidegate.domain.errors import Refusal

TODAY = datetime.date(2026, 11, 21)
NAMED = {
    "aws-lambda", "banana", "gcp-cloud-run", "gmi", "modal", "parasail", "replicate", "runpod", "sagemaker", "tidegate",
    "vertex-ai",
}  # fmt: skip


def test_every_platform_is_there_with_its_products() -> None:
    found = {p.name: [o.id for o in p.offer] for p in catalogue.load()}
    assert set(found) == NAMED
    assert set(found["parasail"]) == {"serverless", "dedicated", "dedicated-serverless", "batch"}
    assert {"real-time", "autoscaled", "multi-model", "async"} <= set(found["sagemaker"])
    assert {"inference-engine", "prime"} == set(found["gmi"])


@pytest.mark.parametrize("provider", catalogue.load(), ids=lambda p: p.name)
def test_every_offer_is_dated_sourced_and_on_known_hardware(provider: catalogue.Provider) -> None:
    assert provider.checked <= TODAY
    assert provider.sources
    for offer in provider.offer:
        assert offer.sources
        for rental in offer.accelerators:
            assert rental.name in known()[0]
        if offer.billing == "worker":
            assert offer.cold_start_s > 0
        if offer.mode == "batch":
            assert offer.async_only


def test_a_stale_date_is_shown_as_stale() -> None:
    by_name = {p.name: p for p in catalogue.load()}
    assert "STALE: 965 days old" in by_name["banana"].age(TODAY)
    assert not by_name["tidegate"].stale(TODAY)
    assert by_name["tidegate"].stale(TODAY + datetime.timedelta(days=181))


MINE = """
name = "mine"
title = "My cloud"
checked = 2026-11-01
sources = ["my contract"]
[[offer]]
id = "gpu"
mode = "dedicated"
title = "my GPU"
billing = "reserved"
sources = ["my contract"]
[[offer.accelerators]]
name = "h100"
usd_per_hour = 1.10
"""


def test_a_user_adds_a_provider_and_may_replace_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    (tmp_path / "own.toml").write_text(MINE.replace('"mine"', '"tidegate"'))
    found = {p.name: p for p in catalogue.load([tmp_path / "mine.toml", tmp_path / "own.toml"])}
    assert found["mine"].offer[0].accelerators[0].usd_per_hour == 1.10
    assert [o.id for o in found["tidegate"].offer] == ["gpu"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("usd_per_hour = 1.10", "usd_per_hour = -1", r"Expected `float` >= 0"),
        ('mode = "dedicated"', 'mode = "fast"', r"Invalid enum value 'fast' - at `\$\.offer\[0\]\.mode`"),
        ('billing = "reserved"', 'billing = "tokens"', "needs .*offer.tokens"),
        ("usd_per_hour", "usd_per_day", "usd_per_"),
        ("checked = 2026-11-01", "", "missing required field `checked`"),
        ('title = "my GPU"', 'title = "my GPU"\nspeed = 3', "unknown field `speed`"),
        ("name =", "name", "mine.toml"),
    ],
)
def test_a_wrong_provider_file_is_refused_by_name(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "mine.toml").write_text(MINE.replace(old, new))
    with pytest.raises(Refusal, match=rf"mine\.toml: .*{said}|{said}"):
        catalogue.load([tmp_path / "mine.toml"])


VERDICTS = {
    "ten-percent-ten-times": "holds", "batch-half": "holds", "h100-month": "holds", "t4-day": "holds",
    "forty-to-fifty-crossover": "holds if", "crossover-formula": "holds if", "summariser-runpod": "holds if",
    "lambda-hour": "does not follow", "ten-thousand-serverless": "does not follow", "two-warm": "does not follow",
    "ten-thousand-classifier": "does not follow", "two-point-seven-billion": "does not follow",
    "eighty-to-two-hundred-million": "does not follow", "summariser-cold": "does not follow",
}  # fmt: skip


def test_claims_are_recomputed_from_their_own_inputs() -> None:
    found = {row["id"]: row for row in check()}
    assert len(found) == len(check()) >= 30
    assert {name: found[name]["verdict"] for name in VERDICTS} == VERDICTS
    assert "60 times" in found["lambda-hour"]["why"]
    assert found["ten-thousand-serverless"]["computed"] == "20 USD a day"
    assert "100 times" in found["two-warm"]["why"]
    assert "0.98 USD a million" in found["forty-to-fifty-crossover"]["why"]
    for row in found.values():
        if row["verdict"] != "holds":
            assert row["why"], row["id"]


def test_a_formula_is_arithmetic_and_nothing_else() -> None:
    assert value("ceil(a / 2) + 3 ** 2", {"a": 5}) == 12
    for bad in ("__import__('os')", "a.b", "b + 1", "[1]"):
        with pytest.raises(ValueError, match="not arithmetic"):
            value(bad, {"a": 1})
