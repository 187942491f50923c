"""Endpoints served elsewhere, as desired state: what may be said of them, what gateways are told, not the core."""

from typing import Any

import pytest

from tidegate.control import adapters, batch_lanes, remotes
from tidegate.control.catalog import entry
from tidegate.control.deployments import Facts, deployment
from tidegate.control.engines import BUILTIN, REMOTE
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.wire.admin import EndpointApply
from tidegate.wire.internal import RemoteTarget

FAR = RemoteTarget("far", "https://far.example/v1", "", key="env:FAR_KEY", concurrency_max=5, region="us")
SETTINGS = ControlSettings(engines={"builtin": BUILTIN, "remote": REMOTE}, providers={"far": FAR})
SOURCE = "remote://far/org/model-7b"


def make(source: str = SOURCE, settings: ControlSettings = SETTINGS, **more: Any) -> Deployment:
    model = remotes.profile(source, settings.providers)
    body = EndpointApply(model=source, engine="remote", **more)
    return deployment("acme/far", body, model, Facts(), settings, 1)


def test_gateways_are_told_where_it_is_and_not_the_key() -> None:
    made = entry(make(), SETTINGS)
    assert made.remote is not None
    assert (made.remote.url, made.remote.model, made.remote.key) == (FAR.url, "org/model-7b", "env:FAR_KEY")
    assert made.metering == "usage_event"
    assert made.model == "model-7b"
    paused = entry(make(paused=True), SETTINGS).remote
    assert paused is not None
    assert paused.paused


def test_the_core_never_hears_of_it() -> None:
    made = make()
    assert made.accelerators_per_replica == 0
    assert adapters.placed([made]) == {}
    assert batch_lanes.lanes([made], {made.endpoint: True}) == {}


def test_residency_is_the_providers() -> None:
    assert make().regions == ("us",)
    assert make(regions=["us"]).regions == ("us",)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"min_replicas": 1}, "min_replicas"),
        ({"mode": "dedicated"}, "mode"),
        ({"regions": ["local"]}, "regions"),
        ({"accelerator_memory": "1GiB"}, "accelerator_memory"),
        ({"context_tokens": 1 << 20}, "context_tokens"),
        ({"price_plan": "gold"}, "price_plan"),
        ({"engine_args": {"url": "https://mine.example"}}, "engine_args.url"),
    ],
)
def test_what_makes_no_sense_elsewhere_is_refused(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refusal:
        make(**{**more, **({"mode": Mode(more["mode"])} if "mode" in more else {})})
    assert refusal.value.param == param
    assert "accepted" in refusal.value.message


@pytest.mark.parametrize("source", ["remote://near/model", "remote://far", "remote://far/", "remote://"])
def test_only_declared_providers(source: str) -> None:
    with pytest.raises(Refusal, match="far"):
        make(source)


def test_engine_and_model_must_both_be_remote() -> None:
    local = ModelProfile("/models/a", "d", ModelKind.GENERATIVE, 1, 1, 64)
    with pytest.raises(Refusal, match="remote://"):
        deployment("acme/x", EndpointApply(model="/models/a", engine="remote"), local, Facts(), SETTINGS, 1)
    far = remotes.profile(SOURCE, SETTINGS.providers)
    with pytest.raises(Refusal, match="remote"):
        deployment("acme/x", EndpointApply(model=SOURCE), far, Facts(), SETTINGS, 1)


def test_a_provider_that_is_no_longer_declared_is_not_routed_to() -> None:
    made = make()
    assert entry(made, ControlSettings(engines=SETTINGS.engines)).remote is None
