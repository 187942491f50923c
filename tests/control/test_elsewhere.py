"""Overflow and fallback as configuration: every contradiction is refused by field, value and what is accepted."""

from pathlib import Path
from typing import Any

import pytest

from tests.control.world import MIB, World, running
from tests.loop import on_loop
from tidegate.assemble.declared import apply_endpoints
from tidegate.config import EndpointConfig, OverflowConfig

LONG = {"model": "/models/tides", "accelerator_memory": 6 * MIB}


async def _refused(world: World, name: str, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = await world.http.put(f"/api/v1/endpoints/{name}", json={"model": "/models/tides", **body})
    assert answer.status_code >= 400, answer.json()
    return answer.status_code, dict(answer.json()["error"])


@on_loop
async def test_what_is_accepted_is_shown_and_reaches_the_gateways(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.http.post("/api/v1/tenants", json={"id": "acme"})
        gateway = await world.gateway()
        await world.apply("acme/pool")
        shown = await world.apply("acme/base", overflow={"to": "acme/pool", "above_queue_ms": 200})
        assert shown["overflow"] == {
            "to": "acme/pool", "above_concurrency": None, "above_queue_ms": 200, "above_ttft_ms": None
        }  # fmt: skip
        assert shown["fallback"] == {"to": "acme/pool"}, "the target of overflow is the fallback, too"
        entry = next(e for e in gateway.catalog.endpoints if e.endpoint == "acme/base")
        assert (entry.overflow.to, entry.overflow.above_queue_ms, entry.fallback) == ("acme/pool", 200, "acme/pool")
        in_use = await world.http.delete("/api/v1/endpoints/acme/pool")
        assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "conflict")
        await world.apply("acme/base")
        assert (await world.http.delete("/api/v1/endpoints/acme/pool")).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"overflow": {"to": "acme/base", "above_queue_ms": 1}}, "overflow.to", "another endpoint than this one"),
        ({"fallback": {"to": "acme/base"}}, "fallback.to", "another endpoint than this one"),
        ({"overflow": {"to": "acme/nobody", "above_queue_ms": 1}}, "overflow.to", "acme/embed, acme/pool"),
        ({"overflow": {"to": "other/secret", "above_queue_ms": 1}}, "overflow.to", "of this tenant or a serverless"),
        ({"overflow": {"to": "acme/pool"}}, "overflow", "exactly one of above_concurrency"),
        ({"overflow": {"to": "acme/pool", "above_queue_ms": 1, "above_ttft_ms": 1}}, "overflow", "2 thresholds"),
        ({"overflow": {"to": "acme/pool", "above_concurrency": 0}}, "overflow.above_concurrency", "1"),
        ({"overflow": {"to": "acme/pool", "above_load": 1}}, "overflow.above_load", "unknown field"),
        ({"lend": True}, "lend", "mode dedicated only"),
        ({"mode": "dedicated", "min_replicas": 0}, "min_replicas", "at least 1 with mode dedicated"),
        ({"fallback": {"to": "acme/embed"}}, "fallback.to", "embedding model, not a generative one"),
        ({"fallback": {"to": "acme/batch"}}, "fallback.to", "no capacity of their own"),
        ({"fallback": {"to": "acme/short"}}, "fallback.to", "context is 128 tokens, accepted are 512 or more"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path: Path, body: dict[str, Any], param: str, words: str) -> None:
    @on_loop
    async def check() -> None:
        async with running(tmp_path) as world:
            for tenant in ("acme", "other"):
                await world.http.post("/api/v1/tenants", json={"id": tenant})
            await world.apply("acme/pool")
            await world.apply("acme/embed", "/models/embed")
            await world.apply("acme/batch", mode="batch")
            await world.apply("acme/short", context_tokens=128)
            await world.apply("other/secret")
            status, error = await _refused(world, "acme/base", **body)
            assert (status, error["param"]) == (400, param)
            assert words in error["message"]

    check()


@on_loop
async def test_a_mode_stands_for_an_endpoint_of_that_mode_with_the_same_model(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        for tenant in ("acme", "house", "other"):
            await world.http.post("/api/v1/tenants", json={"id": tenant})
        await world.apply("acme/a-stars", "/models/stars")
        await world.apply("acme/b-short", context_tokens=128)
        await world.apply("house/common", mode="serverless")
        await world.apply("other/private")
        asked = {"mode": "dedicated", "overflow": {"to": "serverless", "above_concurrency": 4}}
        shown = await world.apply("acme/base", **asked)
        assert (shown["overflow"]["to"], shown["fallback"]) == ("house/common", {"to": "house/common"})
        assert (await world.apply("acme/base", **asked))["generation"] == shown["generation"], "nothing has changed"
        both = asked | {"fallback": {"to": "dedicated_serverless"}}
        status, error = await _refused(world, "acme/base", **both)
        assert (status, error["param"]) == (400, "fallback.to")
        assert "acme/b-short is one, but its context is 128 tokens" in error["message"]
        await world.apply("acme/pool")
        shown = await world.apply("acme/base", **both)
        assert (shown["overflow"]["to"], shown["fallback"]["to"]) == ("house/common", "acme/pool")
        status, error = await _refused(world, "acme/pool", overflow={"to": "dedicated_serverless", "above_queue_ms": 1})
        assert "acme/b-short is one, but its context" in error["message"]
        await world.http.delete("/api/v1/endpoints/acme/b-short")
        status, error = await _refused(world, "acme/pool", overflow={"to": "dedicated_serverless", "above_queue_ms": 1})
        assert "none of that mode serves this model" in error["message"]


@on_loop
async def test_circles_are_refused_with_the_way(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.http.post("/api/v1/tenants", json={"id": "acme"})
        await world.apply("acme/c")
        await world.apply("acme/b", fallback={"to": "acme/c"})
        await world.apply("acme/a", overflow={"to": "acme/b", "above_concurrency": 4})
        _, error = await _refused(world, "acme/c", fallback={"to": "acme/a"})
        assert error["param"] == "fallback.to"
        assert "acme/c → acme/a → acme/b → acme/c" in error["message"]


@on_loop
async def test_residency_is_refused_counted_and_audited(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.http.post("/api/v1/tenants", json={"id": "acme"})
        await world.node()
        await world.apply("acme/wide", regions=["local", "far"])
        status, error = await _refused(
            world, "acme/base", overflow={"to": "acme/wide", "above_concurrency": 1}, regions=["local"]
        )
        assert (status, error["code"], error["param"]) == (403, "residency_denied", "overflow.to")
        assert "may run in far" in error["message"]
        await world.apply("acme/base", fallback={"to": "acme/wide"}, regions=["local", "far"])
        status, error = await _refused(world, "acme/wide", regions=["local", "mars"])
        assert (status, error["code"]) == (409, "conflict"), "changed later, it would break the promise of acme/base"
        metrics = (await world.http.get("/metrics")).text
        assert 'tidegate_residency_configurations_refused_total{endpoint="acme/base"} 1.0' in metrics
        lines = (await world.http.get("/api/v1/activity?subject=acme/base")).json()["data"]
        assert "residency_denied" in {line["kind"] for line in lines}


@on_loop
async def test_a_serverless_endpoint_of_another_tenant_may_be_the_target(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        for tenant in ("acme", "house"):
            await world.http.post("/api/v1/tenants", json={"id": tenant})
        await world.apply("house/common", mode="serverless")
        shown = await world.apply("acme/base", overflow={"to": "house/common", "above_ttft_ms": 900})
        assert shown["overflow"]["to"] == "house/common"


@on_loop
async def test_declared_endpoints_may_name_one_that_is_declared_after_them(tmp_path: Path) -> None:
    wanted = [
        EndpointConfig(name="acme/a", model="/models/tides", fallback="acme/b"),
        EndpointConfig(name="acme/wrong", model="/models/tides", fallback="acme/nobody"),
        EndpointConfig(
            name="acme/b", model="/models/tides", overflow=OverflowConfig(to="acme/c", above_queue_ms=9)
        ),
        EndpointConfig(name="acme/c", model="/models/tides"),
    ]  # fmt: skip
    async with running(tmp_path) as world:
        await world.control.tenancy.create_tenant("acme", "test")
        refused = await apply_endpoints(world.control, wanted)
        assert [name for name, _ in refused] == ["acme/wrong"]
        assert "acme/nobody" in refused[0][1]
        assert (await world.endpoint("acme/a"))["fallback"] == {"to": "acme/b"}
        assert (await world.endpoint("acme/b"))["overflow"]["above_queue_ms"] == 9
