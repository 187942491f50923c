"""The three-way conversation: admin API → core → node and gateways, over links in memory and real SQLite."""

import asyncio
from pathlib import Path

from tests.control.world import TIDES, S, World, running
from tests.loop import on_loop, until
from tidegate.domain import plan
from tidegate.domain.endpoint import EndpointState
from tidegate.policy.reconcile import CoreSettings
from tidegate.wire.internal import GatewayHello


async def _ready(world: World, gateway: object, endpoint: str) -> None:
    await until(lambda: gateway.targets(endpoint), f"route of {endpoint}")  # type: ignore[attr-defined]


@on_loop
async def test_apply_then_demand_starts_a_replica_and_its_route_reaches_the_gateway(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        await world.apply("acme/tides")
        await until(lambda: gateway.catalog.endpoints, "catalog with the endpoint")
        await gateway.demand("acme/tides", queued=1, arrived=1)
        await _ready(world, gateway, "acme/tides")
        (target,) = gateway.targets("acme/tides")
        (start,) = node.commands
        assert isinstance(start, plan.Start)
        assert target.replica == start.replica
        assert target.address == f"unix:/run/{start.replica}.sock"
        assert start.accelerator_bytes == start.deployment.accelerator_bytes
        shown = await world.endpoint("acme/tides")
        assert shown["state"] in ("ready", "idle")
        assert shown["tier"] == "accelerator"
        assert shown["activations"] == 1
        assert shown["activation_ms_last"] is not None


@on_loop
async def test_a_swap_is_drain_fence_sleep_then_start_and_back_again_with_wake(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node(memory_bytes=24 * 1024 * 1024)  # room for one of the two
        gateway = await world.gateway()
        await world.apply("acme/tides", slots=8)
        await world.apply("zeta/stars", "/models/stars", slots=8)
        for endpoint in ("acme/tides", "zeta/stars", "acme/tides"):
            await gateway.demand(endpoint, queued=1, arrived=1)
            await _ready(world, gateway, endpoint)
            await gateway.demand(endpoint, queued=0)
        steps = [line for line in world.log if "Route" not in line]
        assert steps == [
            "node Start acme.tides",
            "g1 Drain acme/tides", "g1 fenced acme/tides", "node Sleep acme.tides", "node Start zeta.stars",
            "g1 Drain zeta/stars", "g1 fenced zeta/stars", "node Sleep zeta.stars", "node Wake acme.tides",
        ]  # fmt: skip
        drained = world.log.index("g1 Drain acme/tides")
        withdrawn = [i for i, line in enumerate(world.log) if line == "g1 Route acme/tides []"]
        assert any(i > drained for i in withdrawn)
        metrics = (await world.http.get("/metrics")).text
        assert 'tidegate_swap_seconds_count{from_tier="host"} 1.0' in metrics
        assert 'tidegate_swap_seconds_count{from_tier="disk"} 1.0' in metrics
        assert "tidegate_thrash_ratio 0.5" in metrics
        assert 'tidegate_lent_accelerator_seconds_total{owner="acme/tides"}' in metrics


@on_loop
async def test_a_drain_waits_for_every_gateway_and_a_lost_one_counts_as_fenced(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node = await world.node()
        gateway, mute = await world.gateway("g1"), await world.gateway("g2", obliging=False)
        await world.apply("acme/tides", slots=8)
        await world.apply("zeta/stars", "/models/stars", slots=8)
        await gateway.demand("acme/tides", queued=1, arrived=1)
        await _ready(world, gateway, "acme/tides")
        await gateway.demand("acme/tides", queued=0)
        await gateway.demand("zeta/stars", queued=1, arrived=1)
        await until(lambda: mute.drains, "drain at both gateways")
        await world.control.loop.settled()
        assert not any(isinstance(command, plan.Sleep) for command in node.commands)
        await world.lose(mute)
        await _ready(world, gateway, "zeta/stars")
        assert any(isinstance(command, plan.Sleep) for command in node.commands)


@on_loop
async def test_a_lost_node_withdraws_its_routes_and_a_returning_one_brings_its_replicas_back(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        await world.apply("acme/tides")
        await gateway.demand("acme/tides", queued=1, arrived=1)
        await _ready(world, gateway, "acme/tides")
        await gateway.demand("acme/tides", queued=0)
        await world.lose(node)
        await until(lambda: not gateway.targets("acme/tides"), "route withdrawn")
        assert (await world.http.get("/api/v1/nodes")).json()["data"] == []
        back = await world.node()
        assert back.commands == []
        replica = next(iter(node.replicas.values()))
        await world.lose(back)
        returning = await world.node("n2")
        await returning.link.send(plan.ReplicaChanged(replica))  # about another node: refused, and its link ended
        await until(lambda: not world.control.loop.nodes, "the liar is cut off")


@on_loop
async def test_a_node_that_rejoins_with_living_replicas_gets_no_second_start(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        await world.apply("acme/tides")
        await gateway.demand("acme/tides", queued=1, arrived=1)
        await _ready(world, gateway, "acme/tides")
        link = await world.listener.connect()
        await link.send(plan.NodeJoined(node.node, tuple(node.replicas.values())))  # the old link is not yet known dead
        await until(lambda: node.link._peer._closed, "the old session is replaced")  # type: ignore[attr-defined]
        await world.control.loop.settled()
        await until(lambda: gateway.targets("acme/tides"), "route again")
        assert len(node.commands) == 1
        assert len(world.control.loop.nodes) == 1


@on_loop
async def test_a_model_that_cannot_start_fails_its_endpoint_and_harms_no_other(tmp_path: Path) -> None:
    core = CoreSettings(first_load=False, residency_ms_min=0, wait_ms_max=200, backoff_ms_first=1, backoff_ms_max=2)
    async with running(tmp_path, core=core) as world:
        node, gateway = await world.node(accelerators=2), await world.gateway()
        node.broken.add("d-stars")
        await world.apply("acme/tides")
        await world.apply("zeta/stars", "/models/stars")
        await gateway.demand("zeta/stars", queued=1, arrived=1)
        await gateway.demand("acme/tides", queued=1, arrived=1)
        await _ready(world, gateway, "acme/tides")

        def failed() -> bool:
            route = gateway.routes.get("zeta/stars")
            return route is not None and route.state is EndpointState.FAILED

        await until(failed, "failed state")
        shown = await world.endpoint("zeta/stars")
        assert (shown["state"], shown["reason"]) == ("failed", "weights are truncated")
        logs = (await world.http.get("/api/v1/endpoints/zeta/stars/logs")).json()["data"]
        assert any(line["kind"] == "failed" and "weights are truncated" in line["reason"] for line in logs)


@on_loop
async def test_a_gateway_that_joins_late_gets_the_catalog_first_then_every_route(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node(accelerators=2)
        early = await world.gateway("g1")
        for endpoint, model in (("acme/tides", "/models/tides"), ("zeta/stars", "/models/stars")):
            await world.apply(endpoint, model)
            await early.demand(endpoint, queued=1, arrived=1)
            await _ready(world, early, endpoint)
        late = await world.gateway("g2")
        await until(lambda: late.targets("acme/tides") and late.targets("zeta/stars"), "all routes")
        assert late.first == "Catalog"
        assert late.catalog == early.catalog
        assert late.routes == early.routes


@on_loop
async def test_desired_state_is_served_again_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node()
        await world.apply("acme/tides", min_replicas=1)
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        await _ready(world, gateway, "acme/tides")
        assert isinstance(node.commands[0], plan.Start)
        assert [entry.endpoint for entry in gateway.catalog.endpoints] == ["acme/tides"]


@on_loop
async def test_removing_an_endpoint_stops_its_replica_and_no_late_gateway_hears_of_it(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        await world.apply("acme/tides", min_replicas=1)
        await _ready(world, gateway, "acme/tides")
        assert (await world.http.delete("/api/v1/endpoints/acme/tides")).status_code == 200
        await until(lambda: all(r.state is S.STOPPED for r in node.replicas.values()), "replica gone")
        assert gateway.catalog.endpoints == ()
        assert not gateway.targets("acme/tides")
        late = await world.gateway("g2")
        await world.control.loop.settled()
        assert late.routes == {}
        assert (await world.http.get("/api/v1/endpoints/acme/tides")).status_code == 404


@on_loop
async def test_strangers_and_liars_are_cut_off_and_everybody_else_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        status = plan.ReplicaStatus("r", "acme/tides", "n1", 1, S.READY)
        openings: list[list[object]] = [
            [plan.Tick()],
            ["not a message"],
            [GatewayHello("g9", "local"), plan.ReplicaChanged(status)],
            [GatewayHello("g9", "local"), plan.DemandReported("g1", "acme/tides", 5, 0, 5)],
        ]
        for messages in openings:
            link = await world.listener.connect()
            for message in messages:
                await link.send(message)
            await until(lambda link=link: link._peer._closed, f"{messages[-1]!r} is cut off")  # type: ignore[misc]
        await world.apply("acme/tides")
        await gateway.demand("acme/tides", queued=1, arrived=1)
        await _ready(world, gateway, "acme/tides")
        assert world.control.loop.gateways == ("g1",)
        assert len(node.commands) == 1


@on_loop
async def test_every_command_is_in_the_audit_log_with_its_rule(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node, gateway = await world.node(), await world.gateway()
        await world.apply("acme/tides")
        with world.control.activity.subscribed() as live:
            await gateway.demand("acme/tides", queued=1, arrived=1)
            await _ready(world, gateway, "acme/tides")
            kinds = []
            async with asyncio.timeout(5):
                while "ready" not in kinds:
                    kinds.append((await anext(live)).kind)
        lines = (await world.http.get("/api/v1/activity?subject=acme/tides")).json()["data"]
        (start,) = [line for line in lines if line["kind"] == "start"]
        (command,) = node.commands
        assert start["actor"] == "core"
        assert start["reason"].startswith(str(command.reason))
        assert kinds.index("start") < kinds.index("ready")
        applied = next(line for line in lines if line["kind"] == "apply")
        assert applied["actor"] == f"key:{world.admin_key.id}"
        assert "model=tides" in applied["reason"]
        assert TIDES.weight_bytes == 4 << 20


@on_loop
async def test_a_change_of_state_is_said_once(tmp_path: Path) -> None:
    """No "loading → loading", no "asleep: asleep": the reason begins where the state ends."""
    async with running(tmp_path) as world:
        await world.node()
        gateway = await world.gateway()
        await world.apply("acme/a")
        await gateway.demand("acme/a", queued=1, arrived=1)
        await until(lambda: gateway.targets("acme/a"), "a replica")
        await gateway.demand("acme/a")
        await world.http.post("/api/v1/endpoints/acme/a/sleep")
        await until(lambda: not gateway.targets("acme/a"), "asleep")
        await world.control.loop.settled()
        lines = await world.control.activity.newest(100, "acme/a")
        said = [line.reason for line in lines if line.kind == "state"]
        assert any(text.endswith("→ asleep: wakes on the next request") for text in said), said
        for text in said:
            was, _, now = text.partition(" → ")
            assert not now.startswith(was), text
            assert len(set(text.split(": "))) == len(text.split(": ")), text
