"""Lanes for batch lines: what they take from their endpoint, what the core and gateways are told of them."""

from dataclasses import replace

from tests.policy.world import deployment
from tidegate.control import batch_lanes
from tidegate.control.catalog import catalog
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Mode
from tidegate.domain.ports import State

OWNER = replace(
    deployment("acme/chat", mode=Mode.DEDICATED, min_replicas=2, max_replicas=3, slots=4),
    tenant="acme",
    fallback="acme/x",
)
SHARED = replace(deployment("house/common", mode=Mode.SERVERLESS), tenant="house")
BULK = replace(deployment("acme/bulk", mode=Mode.BATCH), tenant="acme")


def test_a_lane_is_the_same_model_in_the_lowest_class() -> None:
    lanes = batch_lanes.lanes([OWNER, SHARED, BULK], {"acme/chat": False, "acme/bulk": False, "acme/gone": True})
    assert list(lanes) == ["acme/chat:batch"], "an endpoint of mode batch needs none, one that is gone has none"
    lane = lanes["acme/chat:batch"]
    assert (lane.mode, lane.min_replicas, lane.concurrency_target, lane.fallback) == (Mode.BATCH, 0, 4, "")
    assert (lane.model, lane.slots, lane.generation) == (OWNER.model, OWNER.slots, OWNER.generation)
    assert lane.reserved == 0, "whatever its endpoint is, a lane can always be taken from"


def test_a_batch_in_a_hurry_competes_like_serverless_and_is_billed_as_batch() -> None:
    lanes = batch_lanes.lanes([OWNER], {"acme/chat": True})
    assert lanes["acme/chat:batch"].mode is Mode.SERVERLESS
    plain = catalog(State(7, deployments=(OWNER, SHARED)), ControlSettings())
    told = batch_lanes.with_lanes(plain, lanes, 3, "digest", ControlSettings())
    (entry,) = told.batch
    assert (entry.endpoint, entry.serves, entry.mode, entry.shared) == (
        "acme/chat:batch",
        "acme/chat",
        Mode.BATCH,
        False,
    )
    assert told.version == 10, "a gateway takes what is newer: each change of lanes counts"
    assert [entry.endpoint for entry in told.endpoints] == ["acme/chat", "house/common"]
    assert [(key.digest, key.runner) for key in told.keys] == [("digest", True)]


def test_the_lines_of_an_adapter_are_done_in_the_lane_of_its_base() -> None:
    tone = replace(OWNER, endpoint="acme/tone", base="acme/chat")
    lanes = batch_lanes.lanes([OWNER, tone], {"acme/tone": True})
    assert list(lanes) == ["acme/chat:batch"]
    assert lanes == batch_lanes.lanes([OWNER, tone], {"acme/chat": False, "acme/tone": True}), (
        "one in a hurry is enough"
    )
    plain = catalog(State(7, deployments=(OWNER, tone)), ControlSettings())
    own, carried = batch_lanes.with_lanes(plain, lanes, 3, "digest", ControlSettings()).batch
    assert (own.endpoint, own.serves, own.base) == ("acme/chat:batch", "acme/chat", "")
    assert (carried.serves, carried.base, carried.mode) == ("acme/tone", "acme/chat:batch", Mode.BATCH)
    assert carried.adapter == next(e.adapter for e in plain.endpoints if e.endpoint == "acme/tone") != ""
    assert batch_lanes.with_lanes(plain, {}, 4, "digest", ControlSettings()).batch == ()
