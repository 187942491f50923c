"""Tuning profiles: what an owner left out is taken from the one he names, within the SLO of his endpoint."""

import pytest

from tests.control.world import TIDES
from tidegate.control.tuning import filled, shipped
from tidegate.domain.errors import Refusal
from tidegate.wire import profiles
from tidegate.wire.admin import EndpointApply, SloBody

CURVE = [
    profiles.Point(1, 100.0, 50.0, 5.0),
    profiles.Point(8, 500.0, 90.0, 12.0),
    profiles.Point(32, 900.0, 400.0, 30.0),
]
TUNED = profiles.Profile(
    engine="builtin", source="measured here", engine_args={"adapter_bytes_max": "4096"}, curve=CURVE
)


def fill(profile: profiles.Profile | str, **body: object) -> EndpointApply:
    text = profile if isinstance(profile, str) else profiles.written(profile)
    asked = EndpointApply(model="/models/tides", profile="mine", **body)  # type: ignore[arg-type]
    return filled(asked, TIDES, lambda: {"mine": text})


@pytest.mark.parametrize(
    ("slo", "slots"),
    [(SloBody(2_000, 100, 99), 32), (SloBody(100, 100, 99), 8), (SloBody(2_000, 12, 99), 8), (SloBody(60, 6, 99), 1)],
)
def test_as_many_at_once_as_do_most_within_the_slo(slo: SloBody, slots: int) -> None:
    made = fill(TUNED, slo=slo)
    assert (made.slots, made.engine_args) == (slots, {"adapter_bytes_max": "4096"})


def test_what_the_owner_says_comes_first() -> None:
    made = fill(TUNED, slots=2, engine_args={"adapter_bytes_max": "1"}, slo=SloBody(1, 1, 99))
    assert (made.slots, made.engine_args) == (2, {"adapter_bytes_max": "1"})


@pytest.mark.parametrize(
    ("profile", "body", "says"),
    [
        (TUNED, {"slo": SloBody(10, 100, 99)}, "nothing on this one does"),
        (TUNED, {"engine": "vllm"}, "a profile of engine vllm; this one is of builtin"),
        ("engine = 3", {}, "mine.toml: Expected `str`, got `int` - at `$.engine`"),
        ("engine = 'builtin'\nsource = 'x'\ncurve = [{slots = 0}]", {}, "at `$.curve[0].slots`"),
        ("engine = ", {}, "a profile that can be read"),
        ("engine = 'builtin'\nsource = 'x'\ncolour = 1", {}, "unknown field `colour`"),
        ("engine = 'builtin'\nsource = 'x'\nmodel = 'another digest'", {}, "this one was measured on another"),
        (profiles.Profile(engine="builtin", source="x", percentile=50, curve=CURVE), {}, "it is at p50"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    profile: profiles.Profile | str, body: dict[str, object], says: str
) -> None:
    with pytest.raises(Refusal) as refused:
        fill(profile, **body)
    assert (refused.value.code, refused.value.param) == ("invalid_configuration", "profile")
    assert says in refused.value.message


def test_an_unknown_one_is_refused_with_those_there_are() -> None:
    with pytest.raises(Refusal, match="vllm-throughput"):
        filled(EndpointApply(model="/m", profile="no"), TIDES, shipped)


def test_every_shipped_profile_can_be_read_and_says_where_it_is_from() -> None:
    for name, text in shipped().items():
        profile = profiles.parse(text)
        assert profile.source.startswith(("measured", "vLLM")), name
        assert profile.curve or "not measured" in profile.source, name


def test_what_was_written_is_read_again() -> None:
    odd = profiles.Profile(
        engine="vllm", source='a "quoted"\nline', model="d", slots=3, engine_args={"b": "2", "a": "1"}
    )
    for profile in (TUNED, odd):
        assert profiles.parse(profiles.written(profile)) == profile
