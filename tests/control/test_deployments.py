"""Request body → Deployment: whatever is not refused can be placed and keeps its own promises."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.world import TIDES
from tidegate.control.catalog import catalog
from tidegate.control.deployments import Facts, deployment, split_name, succeed
from tidegate.control.engines import BUILTIN, EngineTraits
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import ApiKey, Deployment, Mode, ModelKind, ModelProfile, Scaling, ScheduleEntry
from tidegate.domain.errors import Refusal
from tidegate.domain.ports import State
from tidegate.domain.units import MIB
from tidegate.wire.admin import EndpointApply, ScalingBody, ScheduleBody

VLLM = EngineTraits(arguments={"dtype": "auto|float16"}, movable=True)
SETTINGS = ControlSettings(engines={"builtin": BUILTIN, "vllm": VLLM})
FACTS = Facts(("default", "gold"), {"local": 64 * MIB, "east": 32 * MIB}, {"local": 2, "east": 4})

counts = st.none() | st.integers(1, 64)
bodies = st.builds(
    EndpointApply,
    model=st.just("m"),
    mode=st.sampled_from(Mode),
    min_replicas=st.none() | st.integers(0, 4),
    max_replicas=st.none() | st.integers(1, 4),
    concurrency_target=counts,
    slots=counts,
    context_tokens=st.none() | st.integers(16, 600),
    accelerators_per_replica=st.integers(1, 5),
    accelerator_memory=st.none() | st.integers(1, 80 * MIB) | st.sampled_from(["9MiB", "1.5 MiB", "nonsense", "0"]),
    regions=st.none() | st.lists(st.sampled_from(["local", "east", "mars"]), min_size=1, max_size=3),
    engine=st.sampled_from(["builtin", "vllm", "magic"]),
    price_plan=st.sampled_from(["default", "gold"]),
    paused=st.booleans(),
)
models = st.builds(
    lambda size, kv, context: replace(TIDES, weight_bytes=size, kv_bytes_per_token=kv, context_tokens_max=context),
    st.integers(1, 80 * MIB),
    st.integers(0, 8_192),
    st.integers(16, 8_192),
)


def _tried(body: EndpointApply, model: ModelProfile, facts: Facts) -> Deployment | Refusal:
    try:
        return deployment("acme/a", body, model, facts, SETTINGS, 5)
    except Refusal as refusal:
        return refusal


@given(bodies, models, st.sampled_from([FACTS, Facts(("default", "gold"))]))
def test_what_is_accepted_fits_and_keeps_its_promises(body: EndpointApply, model: ModelProfile, facts: Facts) -> None:
    made = _tried(body, model, facts)
    if isinstance(made, Refusal):
        assert made.code == "invalid_configuration"
        assert made.param
        assert f"`{made.param}`" in made.message
        return
    shards, context = made.accelerators_per_replica, made.model.context_tokens_max
    assert 0 <= made.min_replicas <= made.max_replicas
    assert made.min_replicas >= (made.mode is Mode.DEDICATED)
    assert 1 <= made.concurrency_target <= made.slots
    assert context <= min(model.context_tokens_max, SETTINGS.context_tokens_max)
    one = (made.model.weight_bytes + made.model.kv_bytes_per_token * context) / shards
    assert made.accelerator_bytes >= one
    if body.slots is None or body.accelerator_memory is None:
        whole = (made.model.weight_bytes + made.model.kv_bytes_per_token * context * made.slots) / shards
        assert made.accelerator_bytes >= whole
    if facts.accelerator_bytes:
        assert made.accelerator_bytes <= max(facts.accelerator_bytes.get(region, 0) for region in made.regions)
        assert shards <= max(facts.accelerators.get(region, 0) for region in made.regions)
    assert made.movable is (made.engine == "vllm")
    again = deployment("acme/a", body, model, facts, SETTINGS, 99)
    assert succeed(made, again) is made


def test_the_next_generation_keeps_when_it_was_made() -> None:
    first = deployment("acme/a", EndpointApply(model="m"), TIDES, FACTS, SETTINGS, 5)
    moved = succeed(first, deployment("acme/a", EndpointApply(model="m", max_replicas=2), TIDES, FACTS, SETTINGS, 99))
    assert (moved.generation, moved.created_ms, moved.max_replicas) == (2, 5, 2)
    assert succeed(None, first) is first


@pytest.mark.parametrize("name", ["", "a", "/a", "a/", "a/b/c", "A/b", "a/b\n", "-a/b", "a/" + "b" * 64, "a/ü", "a /b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(Refusal):
        split_name(name)


def test_the_catalog_says_what_gateways_need_and_never_a_path() -> None:
    wanted = deployment("acme/a", EndpointApply(model="m"), TIDES, FACTS, SETTINGS, 5)
    shared = replace(wanted, endpoint="acme/s", mode=Mode.SERVERLESS, engine="vllm")
    keys = (ApiKey("k1", "acme", "aa", "h", 1, revoked_ms=2), ApiKey("k2", None, "bb", "h", 1, expires_ms=3))
    made = catalog(State(7, (), keys, (wanted, shared)), SETTINGS)
    assert made.version == 7
    assert [(key.id, key.tenant, key.revoked, key.expires_ms) for key in made.keys] == [
        ("k1", "acme", True, None),
        ("k2", None, False, 3),
    ]
    first, second = made.endpoints
    assert (first.model, first.kind, first.context_tokens_max) == ("tides", ModelKind.GENERATIVE, 512)
    assert (first.shared, first.metering, second.shared, second.metering) == (False, "sse_id", True, "usage_event")
    assert "/" not in first.model


@pytest.mark.parametrize(
    ("entry", "field", "accepted"),
    [
        ({"cron": "0 8 * * 9", "min_replicas": 1, "max_replicas": 1}, "schedule[0].cron", "0 to 7"),
        ({"cron": "0 8 * *  ", "min_replicas": 1, "max_replicas": 1}, "schedule[0].cron", "5 fields"),
        ({"cron": "0 8 * * *", "min_replicas": 3, "max_replicas": 2}, "schedule[0].min_replicas", "max_replicas = 2"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(entry: dict[str, object], field: str, accepted: str) -> None:
    body = EndpointApply(model="m", schedule=[ScheduleBody(**entry)])  # type: ignore[arg-type]
    with pytest.raises(Refusal) as refused:
        deployment("t/a", body, TIDES, FACTS, SETTINGS, 0)
    assert refused.value.param == field
    assert accepted in str(refused.value)


@pytest.mark.parametrize(
    ("mode", "scaling", "field", "accepted"),
    [
        (Mode.BATCH, {"headroom_slots": 2}, "scaling.headroom", "0 with mode batch"),
        (Mode.BATCH, {"up_window_ms": 5}, "scaling.up_window_ms", "0 with mode batch"),
        (Mode.SERVERLESS, {"up_window_ms": SETTINGS.hold_ms_max + 1}, "scaling.up_window_ms", "gateway.hold_ms_max"),
    ],
)
def test_windows_that_make_no_sense_are_refused(mode: Mode, scaling: dict[str, int], field: str, accepted: str) -> None:
    body = EndpointApply(model="m", mode=mode, scaling=ScalingBody(**scaling))
    with pytest.raises(Refusal) as refused:
        deployment("t/a", body, TIDES, FACTS, SETTINGS, 0)
    assert refused.value.param == field
    assert accepted in str(refused.value)


def test_scaling_is_kept_as_given_and_left_out_is_the_installations() -> None:
    body = ScalingBody(headroom_slots=2, headroom_percent=25, up_window_ms=500, zero_window_ms=0)
    found = deployment("t/a", EndpointApply(model="m", scaling=body), TIDES, FACTS, SETTINGS, 0)
    assert found.scaling == Scaling(2, 25, 500, None, 0)
    assert deployment("t/a", EndpointApply(model="m"), TIDES, FACTS, SETTINGS, 0).scaling == Scaling()


def test_a_schedule_is_kept_as_given() -> None:
    entry = ScheduleBody(cron="0 8 * * 1-5", min_replicas=1, max_replicas=4, utc_offset_minutes=60)
    found = deployment("t/a", EndpointApply(model="m", schedule=[entry]), TIDES, FACTS, SETTINGS, 0)
    assert found.schedule == (ScheduleEntry("0 8 * * 1-5", 1, 4, 60),)
