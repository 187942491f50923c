"""The billing REST API in process: who sees what, and every bad input answered by name."""

from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.billing.world import CHAT, GOLD, World
from tests.loop import on_loop
from tests.money import HOUR_MS, NOVEMBER_MS, usage
from tidegate.billing.api import routes
from tidegate.domain.errors import Fault, Refusal
from tidegate.wire.admin import Identity

KEYS = {"admin": Identity("root", None), "acme": Identity("key-1", "acme"), "birch": Identity("key-2", "birch")}
PRICE = {"input_usd_per_million": "0.20", "output_usd_per_million": "0.80", "accelerator_hour_usd": "3.99"}


def _authorize(request: Request, admin: bool) -> Identity:
    identity = KEYS.get(request.headers.get("authorization", "").removeprefix("Bearer "))
    if identity is None:
        raise Refusal("invalid_api_key", "no such key")
    if admin and not identity.admin:
        raise Refusal("permission_denied", "an administrator's key is needed")
    return identity


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        body = {"code": error.code, "param": error.param, "message": error.message}
        return JSONResponse(body, error.status)
    assert isinstance(error, Fault)
    return JSONResponse({"code": "fault", "message": error.reason}, 503)


class Client:
    """Asks as the holder of a key."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._app = Starlette(routes=routes(world.billing, _authorize))
        for kind in (Refusal, Fault):
            self._app.add_exception_handler(kind, _answer)

    async def get(self, path: str, key: str = "admin", **params: str) -> httpx.Response:
        return await self._ask("GET", path, key, params=params)

    async def post(self, path: str, body: object, key: str = "admin") -> httpx.Response:
        return await self._ask("POST", path, key, json=body)

    async def _ask(self, method: str, path: str, key: str, **rest: object) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://tidegate", headers=headers) as client:
            return await client.request(method, f"/api/v1/{path}", **rest)  # type: ignore[arg-type]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    world = World(tmp_path)
    world.facts = {"acme/chat": CHAT, "birch/x": GOLD}
    return Client(world)


@on_loop
async def test_usage_is_fresh_the_moment_it_is_asked_for(client: Client) -> None:
    gateway = client.world.gateway()
    await gateway.append(usage("a"))
    body = (await client.get("usage")).json()
    assert body["total"] == body["rows"][0] | {"group": "total"}
    assert (body["by"], body["total"]["requests"], body["total"]["usd"]) == ("endpoint", 1, "0.000006000")
    await gateway.append(usage("b", key="key-9"))
    assert [row["group"] for row in (await client.get("usage", by="key")).json()["rows"]] == ["key-1", "key-9"]
    gateway.close()


@on_loop
async def test_a_tenants_key_sees_that_tenant_only(client: Client) -> None:
    await client.world.write(usage("a"), usage("b", tenant="birch", endpoint="birch/x"))
    assert [r["group"] for r in (await client.get("usage", "birch", by="tenant")).json()["rows"]] == ["birch"]
    assert [r["group"] for r in (await client.get("usage", tenant="acme", by="tenant")).json()["rows"]] == ["acme"]
    assert (await client.get("usage", "birch", tenant="acme")).status_code == 403
    assert [i["tenant"] for i in (await client.get("invoices", "birch")).json()["data"]] == ["birch"]
    assert [i["tenant"] for i in (await client.get("invoices")).json()["data"]] == ["acme", "birch"]
    assert (await client.get("invoices/birch", "birch")).json()["tenant"] == "birch"
    assert (await client.get("invoices/acme", "birch")).status_code == 404
    assert "acme" not in (await client.get("usage/export", "birch")).text
    assert (await client.get("balances", "birch")).status_code == 403
    assert (await client.post("prices", PRICE, "birch")).status_code == 403
    assert (await client.get("prices", "birch")).status_code == 200
    for path in ("usage", "usage/export", "prices", "invoices", "invoices/acme", "balances"):
        assert (await client.get(path, "nobody")).status_code == 401, path


@on_loop
async def test_export_is_a_trace(client: Client) -> None:
    await client.world.write(
        usage("b", arrived_ms=NOVEMBER_MS + 61_250), usage("a"), usage("c", endpoint='acme/"odd", one')
    )
    answer = await client.get("usage/export", period="2026-11")
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.text == (
        "t_s,endpoint,input_tokens,output_tokens\n"
        "0.000,acme/chat,10,5\n"
        '0.000,"acme/""odd"", one",10,5\n'
        "61.250,acme/chat,10,5\n"
    )


@on_loop
async def test_a_new_price_counts_from_its_instant(client: Client) -> None:
    now_ms = client.world.clock.at_ms
    added = await client.post("prices", PRICE | {"effective": str(now_ms + HOUR_MS), "plan": "default"})
    assert added.status_code == 201
    assert added.json() | {"id": 2} == {
        "id": 2, "plan": "default", "tenant": "", "endpoint": "", "model": "", "mode": "", "ends": False,
        "currency": "USD", "accelerator_hours_usd": {}, "minimum_usd": "0.000000000",
        "effective_ms": now_ms + HOUR_MS, "effective": "2026-11-01T11:00:00.000Z",
        "input_usd_per_million": "0.200000000", "cached_input_usd_per_million": "0.200000000",
        "output_usd_per_million": "0.800000000", "accelerator_hour_usd": "3.990000000", "batch_percent": 50,
        "created_ms": now_ms,
    }  # fmt: skip
    assert [p["id"] for p in (await client.get("prices", plan="default")).json()["data"]] == [1, added.json()["id"]]
    again = await client.post("prices", PRICE | {"effective": str(now_ms + HOUR_MS)})
    assert (again.status_code, again.json()["param"]) == (409, "effective")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_usd_per_million": "-0.1"}, "input_usd_per_million"),
        ({"input_usd_per_million": "NaN"}, "input_usd_per_million"),
        ({"output_usd_per_million": "Infinity"}, "output_usd_per_million"),
        ({"output_usd_per_million": "1e400"}, "output_usd_per_million"),
        ({"output_usd_per_million": "1e999999999999"}, "output_usd_per_million"),
        ({"output_usd_per_million": "0.00001"}, "output_usd_per_million"),
        ({"output_usd_per_million": "one"}, "output_usd_per_million"),
        ({"output_usd_per_million": ""}, "output_usd_per_million"),
        ({"output_usd_per_million": 0.2}, "output_usd_per_million"),
        ({"output_usd_per_million": None}, "output_usd_per_million"),
        ({"cached_input_usd_per_million": "-1"}, "cached_input_usd_per_million"),
        ({"accelerator_hour_usd": "1000001"}, "accelerator_hour_usd"),
        ({"accelerator_hour_usd": "9" * 41}, "accelerator_hour_usd"),
        ({"batch_percent": 101}, "batch_percent"),
        ({"batch_percent": -1}, "batch_percent"),
        ({"batch_percent": 0.5}, "batch_percent"),
        ({"plan": "No Spaces"}, "plan"),
        ({"plan": "gold", "tenant": "acme"}, "plan"),
        ({"mode": "gratis"}, "mode"),
        ({"currency": "EUR"}, "currency"),
        ({"minimum_usd": "-1"}, "minimum_usd"),
        ({"accelerator_hours_usd": {"h200": "NaN"}}, "accelerator_hours_usd.h200"),
        ({"ends": True}, "input_usd_per_million"),
        ({"effective": "2020-01-01"}, "effective"),
        ({"effective": "soon"}, "effective"),
    ],
)
def test_bad_prices_are_refused_by_field_and_change_nothing(
    client: Client, change: dict[str, object], param: str
) -> None:
    @on_loop
    async def ask() -> None:
        refused = await client.post("prices", PRICE | change)
        assert (refused.status_code, refused.json()["param"]) == (400, param), refused.text
        assert len((await client.get("prices")).json()["data"]) == 1

    ask()


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("usage", {"by": "colour"}, "by"),
        ("usage", {"by": ""}, "by"),
        ("usage", {"period": "2026-99"}, "period"),
        ("usage", {"from": "x"}, "from"),
        ("usage", {"from": "2026-11-01", "to": "2026-10-01"}, "from"),
        ("usage", {"until": "2026-11-01"}, "until"),
        ("usage/export", {"format": "xlsx"}, "format"),
        ("usage/export", {"period": "x"}, "period"),
        ("invoices", {"period": "x"}, "period"),
        ("invoices", {"as_of": "x"}, "as_of"),
        ("invoices/acme", {"period": "2026-11", "from": "2026-11-01"}, "period"),
        ("prices", {"name": "x"}, "name"),
    ],
)
def test_bad_questions_are_refused_by_parameter(client: Client, path: str, params: dict[str, str], param: str) -> None:
    @on_loop
    async def ask() -> None:
        refused = await client.get(path, **params)
        assert (refused.status_code, refused.json()["param"]) == (400, param), refused.text

    ask()


@on_loop
async def test_a_tenant_nobody_knows_is_refused_and_one_who_left_keeps_its_invoices(client: Client) -> None:
    assert (await client.get("invoices/nobody")).json()["code"] == "not_found"
    for path in ("usage", "usage/time", "usage/export", "contracts"):
        refused = await client.get(path, tenant="nobody")
        assert (refused.status_code, refused.json()["param"]) == (404, "tenant"), path
    for terms in ({"tenant": "nobody"}, {"endpoint": "nobody/chat"}):
        assert (await client.post("prices", PRICE | terms)).json()["param"] == "tenant"
    for known in ("acme", "birch"):
        assert (await client.get(f"invoices/{known}")).json()["total_usd"] == "0.000000000"
    await client.world.write(usage("a", tenant="gone", endpoint="gone/chat"))
    assert (await client.get("invoices/gone")).json()["total_usd"] != "0.000000000"
    assert (await client.get("usage", tenant="gone")).json()["total"]["requests"] == 1


@on_loop
async def test_a_body_that_is_too_large_or_not_json(client: Client) -> None:
    assert (await client.post("prices", {"plan": "x" * 70_000})).status_code == 413
    assert (await client.post("prices", ["not", "a", "price"])).status_code == 400


@on_loop
async def test_prices_have_terms_and_end(client: Client) -> None:
    async def charged(record: str) -> int:
        at = client.world.clock.at_ms
        await client.world.write(usage(record, arrived_ms=at, ended_ms=at + 9), boot=f"boot-{record}")
        return (await client.get("usage", period="2026-11")).json()["total"]["nano_usd"]

    assert await charged("a") == 6_000
    agreed = {"tenant": "acme", "input_usd_per_million": "0", "output_usd_per_million": "1", "minimum_usd": "0.00001"}
    added = await client.post("prices", agreed | {"accelerator_hour_usd": "1", "accelerator_hours_usd": {"h200": "9"}})
    assert (added.status_code, added.json()["accelerator_hours_usd"]) == (201, {"h200": "9.000000000"})
    assert await charged("b") == 6_000 + 10_000, "5,000 for the tokens, and what is missing to the minimum"
    client.world.clock.at_ms += 1
    assert (await client.post("prices", {"tenant": "acme", "ends": True})).status_code == 201
    assert (await client.post("prices", {"plan": "nope", "ends": True})).json()["param"] == "ends"
    assert await charged("c") == 16_000 + 6_000
    assert [p["tenant"] for p in (await client.get("prices", "birch")).json()["data"]] == [""]
    assert len((await client.get("prices", "acme")).json()["data"]) == 3


@on_loop
async def test_a_price_in_the_past_is_said_to_be_one(client: Client) -> None:
    past = PRICE | {"effective": str(NOVEMBER_MS)}
    assert (await client.post("prices", past)).json()["param"] == "effective"
    assert (await client.post("prices", past | {"retroactive": True})).status_code == 201
