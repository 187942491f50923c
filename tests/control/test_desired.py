"""Desired state with more than one writer on the same database."""

from pathlib import Path

import pytest

from tests.control.world import running
from tests.loop import on_loop
from tidegate.control import desired
from tidegate.domain.endpoint import Tenant
from tidegate.domain.errors import CommitConflict, Refusal
from tidegate.domain.ports import Change, State


@on_loop
async def test_a_change_somebody_else_made_in_between_is_seen_before_ours_is_decided(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node()
        gateway = await world.gateway()
        await world.apply("acme/tides")
        version = world.store.load().version
        world.store.commit(version, Change(remove_deployments=("acme/tides",), remove_tenants=("acme",)))
        refused = await world.http.put("/api/v1/endpoints/acme/stars", json={"model": "/models/stars"})
        assert refused.json()["error"]["param"] == "name", "its tenant is gone, which only a re-read can know"
        await world.control.loop.settled()
        assert gateway.catalog.version == version + 1, "the other writer's change reaches gateways too"
        assert gateway.catalog.endpoints == ()
        assert world.control.loop.view().endpoints == ()


@on_loop
async def test_who_keeps_losing_is_told_so(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        asked = []

        def lose(expected_version: int, change: Change) -> State:
            asked.append(expected_version)
            raise CommitConflict("always")

        world.store.commit = lose  # type: ignore[method-assign]
        with pytest.raises(Refusal) as refused:
            await world.control.desired.change(lambda state: Change(put=(Tenant("acme", 1),)))
        assert refused.value.code == "conflict"
        assert len(asked) == desired.COMMIT_TRIES_MAX
