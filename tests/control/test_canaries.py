"""Canaries and rollback: what is applied, what the core and the gateways are told, what is refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.control.world import FakeGateway, World, running
from tests.loop import on_loop, until

STARS = {"model": "/models/stars", "weight": 0.25}


async def _started(world: World) -> FakeGateway:
    await world.node(accelerators=2)
    return await world.gateway()


@on_loop
async def test_a_canary_stands_beside_the_endpoint_and_a_rollback_drops_it(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        gateway = await _started(world)
        await world.apply("acme/a", min_replicas=1)
        await until(lambda: gateway.targets("acme/a"), "the endpoint's own replica")
        own = gateway.targets("acme/a")
        shown = await world.apply("acme/a", min_replicas=1, canary=STARS)
        assert (shown["canary"]["weight"], shown["canary"]["model"]["digest"]) == (0.25, "d-stars")
        await until(lambda: gateway.targets("acme/a:canary"), "the canary's replica")
        assert gateway.targets("acme/a") == own, "the endpoint's own replica never noticed"
        entries = {entry.endpoint: entry for entry in gateway.catalog.endpoints}
        assert (entries["acme/a"].canary, entries["acme/a"].canary_permille) == ("acme/a:canary", 250)
        lane = entries["acme/a:canary"]
        assert (lane.serves, lane.fallback, lane.resident, lane.model) == ("acme/a", "acme/a", True, "stars")

        heavier = await world.apply("acme/a", min_replicas=1, canary={**STARS, "weight": 0.5})
        same = gateway.targets("acme/a:canary")
        assert heavier["canary"]["generation"] == shown["canary"]["generation"]
        assert gateway.targets("acme/a:canary") == same, "another weight needs no new replica"

        back = (await world.http.post("/api/v1/endpoints/acme/a/rollback")).json()
        assert back["canary"] is None
        await until(lambda: not gateway.targets("acme/a:canary"), "the canary to be withdrawn")
        assert gateway.targets("acme/a") == own
        assert [entry.endpoint for entry in gateway.catalog.endpoints] == ["acme/a"]


@on_loop
async def test_a_rollback_without_a_canary_goes_back_to_the_generation_before(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await _started(world)
        first = await world.apply("acme/a", slots=2)
        assert first["rollback_to"] is None
        nothing = await world.http.post("/api/v1/endpoints/acme/a/rollback")
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "conflict")
        second = await world.apply("acme/a", "/models/stars", slots=3)
        assert (second["generation"], second["rollback_to"]) == (2, 1)
        back = (await world.http.post("/api/v1/endpoints/acme/a/rollback")).json()
        assert (back["generation"], back["model"]["digest"], back["slots"]) == (3, "d-tides", 2)
        again = (await world.http.post("/api/v1/endpoints/acme/a/rollback")).json()
        assert (again["model"]["digest"], again["slots"]) == ("d-stars", 3)
        missing = await world.http.post("/api/v1/endpoints/acme/nobody/rollback")
        assert missing.status_code == 404


@on_loop
async def test_applying_the_same_canary_again_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        first = await world.apply("acme/a", canary=STARS)
        again = await world.apply("acme/a", canary=STARS)
        assert first["generation"] == again["generation"]
        version = world.control.desired.state.version
        await world.apply("acme/a", canary=STARS)
        assert world.control.desired.state.version == version


@on_loop
async def test_a_canary_survives_a_restart_of_the_control_plane(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.apply("acme/a", canary=STARS)
    async with running(tmp_path) as world:
        gateway = await world.gateway()
        assert {entry.endpoint for entry in gateway.catalog.endpoints} == {"acme/a", "acme/a:canary"}


@pytest.mark.parametrize(
    ("canary", "param", "words"),
    [
        ({"model": "/models/stars", "weight": 1.5}, "canary.weight", "<= 1"),
        ({"model": "/models/stars", "weight": -0.1}, "canary.weight", ">= 0"),
        ({"model": "/models/stars"}, "canary.weight", "required"),
        ({"model": "/models/embed", "weight": 0.1}, "canary.model", "a generative model, as its own is"),
        ({"model": "/models/nowhere", "weight": 0.1}, "model", "does not exist"),
        ({"model": "/models/huge", "weight": 0.1}, "model", "accepted: a smaller model"),
    ],
)
def test_wrong_canaries_are_refused_by_name(tmp_path: Path, canary: dict[str, Any], param: str, words: str) -> None:
    @on_loop
    async def check() -> None:
        async with running(tmp_path) as world:
            await _started(world)
            await world.control.tenancy.create_tenant("acme", "test")
            body = {"model": "/models/tides", "canary": canary}
            answer = await world.http.put("/api/v1/endpoints/acme/a", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param, answer.json()
            assert words in answer.json()["error"]["message"]

    check()
