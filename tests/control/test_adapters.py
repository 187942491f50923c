"""Adapter endpoints: applied on a base that can carry them, refused by field otherwise, invisible to the fleet core."""

from pathlib import Path
from typing import Any

import pytest

from tests.control.world import World, running
from tests.loop import on_loop
from tidegate.domain.units import MIB

BASE: dict[str, Any] = {"engine_args": {"adapter_bytes_max": str(4 * MIB)}, "slots": 2}


async def refused(world: World, endpoint: str, **body: Any) -> dict[str, Any]:
    answer = await world.http.put(f"/api/v1/endpoints/{endpoint}", json={"model": "/adapters/de-fr", **body})
    assert answer.status_code in (400, 409), answer.text
    return dict(answer.json()["error"])


@on_loop
async def test_an_adapter_shows_its_base_and_brings_no_replica(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node = await world.node()
        gateway = await world.gateway()
        base = await world.apply("acme/base", **BASE)
        made = await world.apply("acme/de-fr", "/adapters/de-fr", base="acme/base", slo={"ttft_ms": 700})
        assert (made["base"], made["mode"], made["slo"]["ttft_ms"]) == ("acme/base", base["mode"], 700)
        assert made["model"]["context_tokens_max"] == base["model"]["context_tokens_max"]
        await world.http.post("/api/v1/endpoints/acme/base/wake")
        assert {status.endpoint for status in node.replicas.values()} == {"acme/base"}
        entry = next(e for e in gateway.catalog.endpoints if e.endpoint == "acme/de-fr")
        assert (entry.base, entry.adapter) == ("acme/base", "d/adapters/de-fr /adapters/de-fr")
        assert (await world.http.post("/api/v1/endpoints/acme/de-fr/sleep")).status_code == 409


@on_loop
async def test_what_an_adapter_cannot_have_is_refused_by_field(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.apply("acme/base", **BASE)
        await world.apply("acme/bare", "/models/stars")
        await world.apply("other/base", **BASE)
        await world.apply("acme/de-fr", "/adapters/de-fr", base="acme/base")
        for param, body in [
            ("base", {"base": "acme/none"}),
            ("base", {"base": "acme/bare"}),  # takes no adapters
            ("base", {"base": "other/base"}),  # another tenant's, and not serverless
            ("base", {"base": "acme/de-fr"}),  # an adapter itself
            ("base", {"base": "acme/x"}),  # itself
            ("mode", {"base": "acme/base", "mode": "dedicated"}),
            ("max_replicas", {"base": "acme/base", "max_replicas": 3}),
            ("overflow", {"base": "acme/base", "overflow": {"to": "acme/bare", "above_queue_ms": 5}}),
            ("model", {"base": "acme/base", "model": "/models/stars"}),  # an adapter for another base
        ]:
            error = await refused(world, "acme/x", **body)
            assert (error["param"], error["code"]) == (param, "invalid_configuration"), error
        await world.apply("small/base", **(BASE | {"engine_args": {"adapter_bytes_max": "5"}}))
        error = await refused(world, "small/x", base="small/base")
        assert f"at least {2 * MIB} bytes" in error["message"], error


@on_loop
async def test_a_serverless_base_carries_adapters_of_every_tenant(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.apply("platform/base", mode="serverless", **BASE)
        await world.apply("acme/de-fr", "/adapters/de-fr", base="platform/base")
        gateway = await world.gateway()
        shared = {e.endpoint: e.shared for e in gateway.catalog.endpoints}
        assert shared == {"platform/base": True, "acme/de-fr": False}, "an adapter is private, whoever owns its base"


@on_loop
async def test_a_base_stays_fit_for_what_it_carries(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.apply("acme/base", **BASE)
        await world.apply("acme/de-fr", "/adapters/de-fr", base="acme/base")
        error = await refused(world, "acme/base", model="/models/tides")  # without room for adapters
        assert error["code"] == "conflict"
        assert "acme/de-fr" in error["message"]
        gone = await world.http.delete("/api/v1/endpoints/acme/base")
        assert (gone.status_code, gone.json()["error"]["code"]) == (409, "conflict")
        assert (await world.http.delete("/api/v1/endpoints/acme/de-fr")).status_code == 200
        assert (await world.http.delete("/api/v1/endpoints/acme/base")).status_code == 200


@pytest.mark.parametrize("room", ["0", "-5", "many", ""])
@on_loop
async def test_room_for_adapters_is_a_number_of_bytes(tmp_path: Path, room: str) -> None:
    async with running(tmp_path) as world:
        await world.control.tenancy.create_tenant("acme", "test")
        error = await refused(world, "acme/base", model="/models/tides", engine_args={"adapter_bytes_max": room})
        assert error["param"] == "engine_args.adapter_bytes_max"
