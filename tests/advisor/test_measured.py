"""A measured curve in place of the roofline: read from a profile, used on its accelerator only."""

from pathlib import Path

import numpy as np
import pytest

from tidegate.advisor import described, hardware
from tidegate.advisor.measured import read
from tidegate.domain.errors import Refusal
from tidegate.wire import profiles

CURVE = [
    profiles.Point(16, 1_600.0, 200.0, 9.0),
    profiles.Point(1, 150.0, 40.0, 6.0),
    profiles.Point(64, 2_400.0, 900.0, 25.0),
]
PROFILE = profiles.Profile(
    engine="vllm", source="measured here", accelerator="h100", prompt_tokens=500, output_tokens=100, curve=CURVE
)


def saved(folder: Path, profile: profiles.Profile | str = PROFILE) -> Path:
    path = folder / "chat.toml"
    path.write_text(profile if isinstance(profile, str) else profiles.written(profile))
    return path


def test_a_replica_is_as_fast_as_it_was_measured(tmp_path: Path) -> None:
    """Traffic of the very shape that was measured is served at the measured rate."""
    model = hardware.Model("mine", 16.0, 8e9, 1e-4, measured=read(saved(tmp_path)))
    traffic = described.describe("steady", 2_000, 500, 100)
    h100 = hardware.known()[0]["h100"]
    for tpot_ms, slots, rate in ((30, 64, 2_400.0), (9, 16, 1_600.0), (6, 1, 150.0)):
        made = hardware.curve(traffic, model, h100, 1, tpot_ms, 256)
        assert made is not None
        assert made.slots == slots
        mean = np.mean(traffic.outputs) / np.mean(traffic.inputs) / (100 / 500)
        assert made.tokens_per_s == pytest.approx(rate, rel=0.02 + abs(mean - 1))
        assert made.token_ms[slots] == pytest.approx({64: 25.0, 16: 9.0, 1: 6.0}[slots])
    assert hardware.curve(traffic, model, h100, 1, 5.9, 256) is None, "not even one keeps it"
    assert hardware.fitting(model, h100, 8) == 1


def test_longer_prompts_and_answers_take_in_proportion(tmp_path: Path) -> None:
    model = hardware.Model("mine", 16.0, 8e9, 1e-4, measured=read(saved(tmp_path)))
    h100 = hardware.known()[0]["h100"]
    plain, long = (described.describe("steady", 2_000, n, m) for n, m in ((500, 100), (500, 400)))
    rates = []
    for traffic in (plain, long):
        made = hardware.curve(traffic, model, h100, 1, 30, 256)
        assert made is not None
        rates.append(made.tokens_per_s)
    assert rates[0] < rates[1] < 2_400 / (1 - 40 / (100 / 2.4)), "less of its time goes to prompts"


def test_another_accelerator_keeps_its_roofline(tmp_path: Path) -> None:
    plain = hardware.model_named("llama-8b")
    told = hardware.Model(plain.name, plain.weights_gb, plain.params, plain.kv_gb_per_token, read(saved(tmp_path)))
    traffic = described.describe("steady", 2_000, 500, 100)
    a100 = hardware.known()[0]["a100"]
    one, other = (hardware.curve(traffic, model, a100, 1, 50, 64) for model in (plain, told))
    assert one is not None
    assert other is not None
    assert (one.slots, one.tokens_per_s) == (other.slots, other.tokens_per_s)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("engine = 1", "Expected `str`, got `int` - at `$.engine`"),
        (profiles.Profile(engine="vllm", source="x", accelerator="abacus"), "accelerator 'abacus' is not known"),
        (profiles.Profile(engine="vllm", source="x", accelerator="h100"), "has no curve"),
    ],
)
def test_a_profile_that_is_no_use_is_refused_by_name(
    tmp_path: Path, profile: profiles.Profile | str, says: str
) -> None:
    path = saved(tmp_path, profile)
    with pytest.raises(Refusal) as refused:
        read(path)
    assert says in refused.value.message
    assert str(path) in refused.value.message


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="cannot be read"):
        read(tmp_path / "none.toml")
