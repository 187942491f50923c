"""The OpenAPI document: complete against the routes, consistent in itself, and true of real answers."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.control.world import World, running
from tests.loop import on_loop, until
from tidegate.control.api import build_app

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "number": (int, float),
    "null": type(None),
}  # fmt: skip


async def usage(_request: Request) -> Response:
    """What was used."""
    return Response()


def conforms(value: Any, schema: dict[str, Any], document: dict[str, Any], where: str = "$") -> None:
    """The part of JSON Schema 2020-12 that msgspec writes."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/")
        return conforms(value, document["components"]["schemas"][name], document, where)
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return conforms(value, option, document, where)
            except AssertionError:
                continue
        raise AssertionError(f"{where}: {value!r} is none of {schema['anyOf']}")
    if "enum" in schema:
        assert value in schema["enum"], f"{where}: {value!r}"
        return None
    kind = schema.get("type")
    if kind is not None:
        assert isinstance(value, TYPES[kind]), f"{where}: {value!r} is not {kind}"
        assert not (kind == "integer" and isinstance(value, bool)), where
    if kind == "object" and "properties" in schema:
        assert set(schema.get("required", ())) <= set(value), f"{where}: {set(schema['required']) - set(value)} missing"
        undocumented = set(value) - set(schema["properties"])
        assert not undocumented, f"{where}: {undocumented} undocumented"
        for name, inner in value.items():
            conforms(inner, schema["properties"][name], document, f"{where}.{name}")
    if kind == "array":
        for index, inner in enumerate(value):
            conforms(inner, schema.get("items", {}), document, f"{where}[{index}]")
    return None


async def _document(world: World) -> dict[str, Any]:
    response = await world.http.get("/api/openapi.json")
    assert response.headers["content-type"] == "application/json"
    return dict(response.json())


@on_loop
async def test_every_route_is_described_and_every_description_is_a_route(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        extra = Route("/api/v1/usage/{tenant:str}", usage, methods=["GET"])
        app = build_app(world.control, [extra])
        served = {
            (method.lower(), re.sub(r":\w+}", "}", route.path))
            for route in app.routes
            if isinstance(route, Route) and not re.match(r"/$|/console|/api/openapi", route.path)
            for method in (route.methods or set()) - {"HEAD"}
        }
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            document = (await http.get("/api/openapi.json")).json()
        described = {(method, path) for path, methods in document["paths"].items() for method in methods}
        assert described == served
        assert document["paths"]["/api/v1/usage/{tenant}"]["get"]["summary"] == "What was used"


@on_loop
async def test_it_is_well_formed(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        document = await _document(world)
        assert document["openapi"].startswith("3.1.")
        operations = [(p, o) for p, methods in document["paths"].items() for o in methods.values()]
        ids = [operation["operationId"] for _, operation in operations]
        assert len(ids) == len(set(ids))
        for path, operation in operations:
            parameters = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert parameters == re.findall(r"{(\w+)}", path)
            assert operation["summary"]
            assert operation["responses"]
            assert all("description" in response for response in operation["responses"].values())
        references = set(re.findall(r'"#/components/schemas/(\w+)"', (await world.http.get("/api/openapi.json")).text))
        assert references <= set(document["components"]["schemas"])
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in document["components"]["schemas"])


@on_loop
async def test_real_answers_are_as_described(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        document = await _document(world)
        await world.node()

        async def check(method: str, path: str, template: str, body: Any = None) -> None:
            response = await world.http.request(method, f"/api/v1/{path}", json=body)
            responses = document["paths"][f"/api/v1/{template}"][method.lower()]["responses"]
            described = responses.get(str(response.status_code), responses["default"])
            conforms(response.json(), described["content"]["application/json"]["schema"], document)

        await check("POST", "tenants", "tenants", {"id": "acme"})
        await check("POST", "tenants", "tenants", {"id": 5})
        await check("GET", "tenants", "tenants")
        await check("POST", "keys", "keys", {"tenant": "acme", "expires_in_s": 5})
        await check("GET", "keys", "keys")
        body = {"model": "/models/tides", "min_replicas": 1, "slo": {"ttft_ms": 900}}
        await check("PUT", "endpoints/acme/tides", "endpoints/{tenant}/{name}", body)
        await until(lambda: "acme/tides" in world.control.meters.activation_ms_last, "ready")
        await check("GET", "endpoints/acme/tides", "endpoints/{tenant}/{name}")
        await check("GET", "endpoints", "endpoints")
        await check("GET", "nodes", "nodes")
        await check("GET", "activity", "activity")
        await check("GET", "endpoints/acme/tides/logs", "endpoints/{tenant}/{name}/logs")
        await check("POST", "endpoints/acme/tides/wake", "endpoints/{tenant}/{name}/wake")
        await check("DELETE", "endpoints/acme/tides", "endpoints/{tenant}/{name}")
        await check("GET", "endpoints/acme/tides", "endpoints/{tenant}/{name}")


def test_the_checker_finds_what_is_wrong() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    conforms({"n": 1}, schema, {})
    wrongs: list[Any] = [{}, {"n": "1"}, {"n": True}, {"n": 1, "more": 2}, []]
    for wrong in wrongs:
        with pytest.raises(AssertionError):
            conforms(wrong, schema, {})
