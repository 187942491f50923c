"""The admin API in process on real SQLite: what it does, and what it refuses."""

from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import text

from tests.control.world import ADMIN_SECRET, MODELS, World, running
from tests.loop import on_loop, until
from tidegate.control import keys
from tidegate.control.settings import ControlSettings
from tidegate.stores.database import write
from tidegate.wire.admin import ErrorBody


def _written_anywhere(directory: Path, text: str) -> bool:
    files = [path.read_bytes() for path in directory.iterdir()]
    assert sum(map(len, files)) > 0
    return any(text.encode() in content for content in files)


@on_loop
async def test_a_key_is_shown_once_kept_as_a_digest_and_works_until_revoked(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.http.post("/api/v1/tenants", json={"id": "acme"})
        made = await world.http.post("/api/v1/keys", json={"tenant": "acme"})
        assert made.status_code == 201
        secret, key_id = made.json()["secret"], made.json()["id"]
        assert secret.startswith("tg-")
        listed = (await world.http.get("/api/v1/keys?tenant=acme")).json()["data"]
        assert [(key["id"], key["state"], key["hint"]) for key in listed] == [(key_id, "active", secret[-4:])]
        assert secret not in (await world.http.get("/api/v1/keys")).text
        assert keys.digest(secret) in [key.digest for key in world.store.load().keys]
        assert not _written_anywhere(tmp_path, secret)

        mine = {"authorization": f"Bearer {secret}"}
        assert (await world.http.get("/api/v1/endpoints", headers=mine)).status_code == 200
        assert (await world.http.delete(f"/api/v1/keys/{key_id}")).json()["state"] == "revoked"
        assert (await world.http.delete(f"/api/v1/keys/{key_id}")).json()["state"] == "revoked"
        refused = await world.http.get("/api/v1/endpoints", headers=mine)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "revoked_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"


@on_loop
async def test_an_expired_key_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.http.post("/api/v1/tenants", json={"id": "acme"})
        made = (await world.http.post("/api/v1/keys", json={"tenant": "acme", "expires_in_s": 60})).json()
        mine = {"authorization": f"Bearer {made['secret']}"}
        assert (await world.http.get("/api/v1/endpoints", headers=mine)).status_code == 200
        world.clock.ahead_ms = 60_000
        refused = await world.http.get("/api/v1/endpoints", headers=mine)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "expired_api_key")


@on_loop
async def test_the_last_administrator_cannot_lock_everybody_out(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        refused = await world.http.delete(f"/api/v1/keys/{world.admin_key.id}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert (await world.http.post("/api/v1/keys", json={"admin": True})).status_code == 201
        assert (await world.http.delete(f"/api/v1/keys/{world.admin_key.id}")).status_code == 200
        assert (await world.http.get("/api/v1/keys")).json()["error"]["code"] == "revoked_api_key"


@on_loop
async def test_applying_the_same_twice_is_nothing_and_a_change_is_a_new_generation(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        first = await world.apply("acme/tides", max_replicas=2)
        version = world.store.load().version
        again = await world.apply("acme/tides", max_replicas=2)
        assert (again["generation"], again["created_ms"]) == (1, first["created_ms"])
        assert world.store.load().version == version
        changed = await world.apply("acme/tides", max_replicas=3)
        assert (changed["generation"], changed["created_ms"]) == (2, first["created_ms"])
        applied = [line for line in world.store.activity(100) if line.kind == "apply"]
        assert len(applied) <= 2
        assert (await world.http.get("/api/v1/endpoints")).json()["data"] == [await world.endpoint("acme/tides")]


@on_loop
async def test_defaults_follow_the_mode_the_model_and_the_fleet(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node(memory_bytes=16 << 20)
        shown = await world.apply("acme/tides")
        assert (shown["mode"], shown["min_replicas"], shown["max_replicas"]) == ("dedicated_serverless", 0, 1)
        # 16 MiB hold the weights (4), the workspace (1) and five contexts of 512 tokens (2 each), not the usual eight.
        assert (shown["slots"], shown["concurrency_target"]) == (5, 5)
        assert shown["accelerator_bytes"] == 15 << 20
        assert shown["limits"]["context_tokens_max"] == 512
        dedicated = await world.apply("acme/steady", mode="dedicated", context_tokens=128, slots=2)
        assert (dedicated["min_replicas"], dedicated["max_replicas"]) == (1, 1)
        assert dedicated["accelerator_bytes"] == (5 << 20) + 2 * 128 * 4096
        roomy = await world.apply("acme/roomy", accelerator_memory="9MiB")
        assert (roomy["accelerator_bytes"], roomy["slots"]) == (9 << 20, 2)
        embedding = await world.apply("acme/embed", "/models/embed")
        assert (embedding["model"]["kind"], embedding["slots"]) == ("embedding", 8)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "model", "required"),
    ({"model": 5}, "model", "Expected `str`"),
    ({"model": ""}, "model", "length >= 1"),
    ({"model": "/models/gone"}, "model", "does not exist"),
    ({"model": "/models/huge"}, "model", "25165824 bytes"),
    ({"mode": "dedicated", "min_replicas": 0}, "min_replicas", "at least 1 with mode dedicated"),
    ({"mode": "batch", "min_replicas": 1}, "min_replicas", "0 with mode batch"),
    ({"min_replicas": 3, "max_replicas": 2}, "min_replicas", "at most max_replicas = 2"),
    ({"min_replicas": -1}, "min_replicas", ">= 0"),
    ({"max_replicas": 0}, "max_replicas", ">= 1"),
    ({"max_replicas": 10**30}, "max_replicas", "<= 1024"),
    ({"mode": "turbo"}, "mode", "serverless, dedicated, dedicated_serverless, batch"),
    ({"concurrency_target": 9, "slots": 4}, "concurrency_target", "at most slots = 4"),
    ({"slots": 100}, "slots", "at most 9"),
    ({"context_tokens": 513}, "context_tokens", "at most 512, the model's own"),
    ({"engine": "magic"}, "engine", "one of builtin"),
    ({"engine_args": {"color": "red"}}, "engine_args.color", "arguments adapter_bytes_max"),
    ({"engine_args": {"color": 2}}, "engine_args[...]", "Expected `str`"),
    ({"price_plan": "gold"}, "price_plan", "one of default"),
    ({"regions": ["mars"]}, "regions", "local"),
    ({"regions": []}, "regions", "length >= 1"),
    ({"accelerators_per_replica": 17}, "accelerators_per_replica", "at most 16 with engine builtin"),
    ({"accelerator_memory": "lots"}, "accelerator_memory", "512MiB"),
    ({"accelerator_memory": "1MiB"}, "accelerator_memory", "what was asked"),
    ({"accelerator_memory": "1TiB"}, "accelerator_memory", "the largest accelerator"),
    ({"accelerator_memory": 0}, "accelerator_memory", ">= 1"),
    ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms", ">= 1"),
    ({"slo": {"speed": 1}}, "slo.speed", "unknown field"),
    ({"overflowing": "openai"}, "overflowing", "unknown field"),
    ({"paused": "yes"}, "paused", "Expected `bool`"),
]


@on_loop
async def test_a_wrong_endpoint_is_refused_by_field_value_and_what_is_accepted(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node()
        await world.control.tenancy.create_tenant("acme", "test")
        for body, param, text in REFUSED:
            whole = body if "model" in body or not body else {"model": "/models/tides", **body}
            response = await world.http.put("/api/v1/endpoints/acme/tides", json=whole)
            error = response.json()["error"]
            assert response.status_code == 400, (body, error)
            assert error["code"] in ("invalid_request", "invalid_configuration")
            assert error["param"] == param, (body, error)
            assert text in error["message"], (body, error)
        assert world.store.load().deployments == ()


@on_loop
async def test_a_start_longer_than_its_timeout_is_refused_first_by_estimate_then_by_measurement(tmp_path: Path) -> None:
    async with running(tmp_path, ControlSettings(start_ms_max=1_000, start_ms_base=2_000)) as world:
        await world.control.tenancy.create_tenant("acme", "test")
        refused = (await world.http.put("/api/v1/endpoints/acme/tides", json={"model": "/models/tides"})).json()
        assert "2008 ms (estimated), longer than the setting engine.start_ms_max = 1000" in refused["error"]["message"]
        world.control.meters.start_ms[MODELS["/models/tides"].digest] = 900
        accepted = await world.http.put("/api/v1/endpoints/acme/tides", json={"model": "/models/tides"})
        assert accepted.status_code == 200
    (tmp_path / "hold").mkdir()
    async with running(tmp_path / "hold", ControlSettings(hold_ms_max=500)) as world:
        await world.control.tenancy.create_tenant("acme", "test")
        refused = await world.http.put("/api/v1/endpoints/acme/tides", json={"model": "/models/tides"})
        assert "gateway.hold_ms_max = 500" in refused.json()["error"]["message"]
    (tmp_path / "never").mkdir()
    async with running(tmp_path / "never", ControlSettings(hold_ms_max=0)) as world:  # 0: nobody is ever held
        await world.control.tenancy.create_tenant("acme", "test")
        accepted = await world.http.put("/api/v1/endpoints/acme/tides", json={"model": "/models/tides"})
        assert accepted.status_code == 200


HOSTILE: list[tuple[str, str, bytes, int, str]] = [
    ("PUT", "/api/v1/endpoints/acme/tides", b"{", 400, "invalid_json"),
    ("PUT", "/api/v1/endpoints/acme/tides", b"", 400, "invalid_json"),
    ("PUT", "/api/v1/endpoints/acme/tides", b"\xff\xfe", 400, "invalid_json"),
    ("PUT", "/api/v1/endpoints/acme/tides", b'{"model": "\xff"}', 400, "invalid_json"),
    ("PUT", "/api/v1/endpoints/acme/tides", b"[" * 200_000, 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/acme/tides", b'{"a":' * 100_000, 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/acme/tides", b"[]", 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/acme/tides", b"null", 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/acme/tides", b" " * (2 << 20), 413, "body_too_large"),
    ("PUT", "/api/v1/endpoints/ACME/tides", b"{}", 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/acme/..%2f", b"{}", 404, "not_found"),
    ("PUT", "/api/v1/endpoints/acme/%00", b"{}", 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/acme/tides%0a", b"{}", 400, "invalid_request"),
    ("PUT", f"/api/v1/endpoints/acme/{'a' * 64}", b"{}", 400, "invalid_request"),
    ("PUT", "/api/v1/endpoints/nobody/tides", b'{"model": "/models/tides"}', 400, "invalid_configuration"),
    ("POST", "/api/v1/tenants", b'{"id": "a/b"}', 400, "invalid_request"),
    ("POST", "/api/v1/tenants", b'{"id": "x\\n"}', 400, "invalid_request"),
    ("POST", "/api/v1/tenants", b'{"id": "a", "id2": 1}', 400, "invalid_request"),
    ("POST", "/api/v1/keys", b"{}", 400, "invalid_request"),
    ("POST", "/api/v1/keys", b'{"tenant": "acme", "admin": true}', 400, "invalid_request"),
    ("POST", "/api/v1/keys", b'{"tenant": "nobody"}', 404, "not_found"),
    ("POST", "/api/v1/keys", b'{"tenant": "acme", "expires_in_s": 0}', 400, "invalid_request"),
    ("POST", "/api/v1/keys", b'{"tenant": "acme", "expires_in_s": 1e400}', 400, "invalid_request"),
    ("DELETE", "/api/v1/keys/none", b"", 404, "not_found"),
    ("DELETE", "/api/v1/tenants/none", b"", 404, "not_found"),
    ("GET", "/api/v1/endpoints/acme/none", b"", 404, "not_found"),
    ("DELETE", "/api/v1/endpoints/acme/none", b"", 404, "not_found"),
    ("POST", "/api/v1/endpoints/acme/none/wake", b"", 404, "not_found"),
    ("POST", "/api/v1/endpoints/acme/none/sleep", b"", 404, "not_found"),
    ("GET", "/api/v1/endpoints/acme/none/logs", b"", 404, "not_found"),
    ("GET", "/api/v1/activity?limit=0", b"", 400, "invalid_request"),
    ("GET", "/api/v1/activity?limit=99999999999999999999", b"", 400, "invalid_request"),
    ("GET", "/api/v1/activity?limit=%D9%A1", b"", 400, "invalid_request"),
    ("GET", "/api/v1/activity?limit=1&limit=2", b"", 400, "invalid_request"),
    ("GET", "/api/v1/activity?color=red", b"", 400, "invalid_request"),
    ("PATCH", "/api/v1/tenants", b"", 405, "method_not_allowed"),
    ("GET", "/api/v2/tenants", b"", 404, "not_found"),
    ("GET", "/console/../../etc/passwd", b"", 404, "not_found"),
]


@on_loop
async def test_hostile_input_is_answered_with_its_documented_status_and_openai_shape(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.control.tenancy.create_tenant("acme", "test")
        for method, path, content, status, code in HOSTILE:
            response = await world.http.request(method, path, content=content)
            body = msgspec.json.decode(response.content, type=ErrorBody)
            found = (response.status_code, body.error.code)
            assert found == (status, code), f"{method} {path} {content[:40]!r}: {body}"
            assert "Traceback" not in response.text
        allowed = (await world.http.request("PATCH", "/api/v1/tenants")).headers["allow"]
        assert {"GET", "POST"} <= set(allowed.replace(" ", "").split(","))
        state = world.store.load()
        assert ([t.id for t in state.tenants], len(state.keys), state.deployments) == (["acme"], 1, ())


@on_loop
async def test_what_is_no_name_is_told_what_names_are(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        for body in ({"id": "A B"}, {"id": ""}, {"id": "日本"}):
            error = (await world.http.post("/api/v1/tenants", json=body)).json()["error"]
            assert "`id`: not a name (accepted: 1 to 63 of a-z" in error["message"], error


@on_loop
async def test_every_answer_carries_a_request_id(tmp_path: Path) -> None:
    async with running(tmp_path) as world:

        async def request_id(path: str, **headers: str) -> str:
            return (await world.http.get(path, headers=headers)).headers["x-request-id"]

        made = {await request_id(path) for path in ("/healthz", "/api/v1/tenants", "/nowhere", "/console/")}
        assert len(made) == 4
        assert await request_id("/api/v1/tenants", **{"x-request-id": "mine-1"}) == "mine-1"
        assert await request_id("/api/v1/tenants", **{"x-request-id": "<b>"}) != "<b>"
        await _break_the_database(world)
        assert (await world.http.post("/api/v1/tenants", json={"id": "acme"})).headers["x-request-id"]


@on_loop
async def test_a_bug_is_a_500_without_a_traceback(tmp_path: Path) -> None:
    async with running(tmp_path) as world:

        def broken() -> None:
            raise AssertionError("something about the inside")

        world.control.loop.view = broken  # type: ignore[method-assign,assignment]
        response = await world.http.get("/api/v1/nodes")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "inside" not in response.text
        assert response.headers["x-request-id"].startswith("req-")


BAD_KEYS = ["", "Bearer", "Bearer ", "Basic abc", f"bearer{ADMIN_SECRET}", "Bearer tg-wrong", "Bearer " + "x" * 100_000]


@on_loop
async def test_without_a_good_key_nothing_is_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        document = (await world.http.get("/api/openapi.json")).json()
        described = [(m, p, o) for p, methods in document["paths"].items() for m, o in methods.items()]
        guarded = [(method, path) for method, path, operation in described if operation.get("security") != []]
        assert len(guarded) >= 16
        for method, path in guarded:
            path = path.replace("{tenant}", "acme").replace("{name}", "tides").replace("{key}", "k")
            response = await world.http.request(method, path, headers={"authorization": "Bearer tg-wrong"})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
        for header in BAD_KEYS:
            response = await world.http.get("/api/v1/tenants", headers={"authorization": header})
            assert response.status_code == 401


@on_loop
async def test_a_tenant_sees_its_own_and_cannot_tell_anothers_from_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node(accelerators=2)
        await world.apply("acme/tides")
        await world.apply("zeta/stars", "/models/stars")
        _, mine = await world.tenant_key("acme")

        async def get(path: str) -> tuple[int, Any]:
            response = await world.http.get(f"/api/v1/{path}", headers=mine)
            return response.status_code, response.json()

        assert [e["name"] for e in (await get("endpoints"))[1]["data"]] == ["acme/tides"]
        assert (await get("endpoints?tenant=zeta"))[1]["data"] == []
        assert (await get("endpoints/acme/tides"))[0] == 200
        for path in ("endpoints/{}", "endpoints/{}/logs", "activity?subject={}"):
            foreign, nothing = await get(path.format("zeta/stars")), await get(path.format("zeta/other"))
            assert foreign[0] == nothing[0] == 404
            assert str(foreign[1]).replace("zeta/stars", "X") == str(nothing[1]).replace("zeta/other", "X")
        assert (await get("activity"))[0] == 400
        for path in ("tenants", "keys", "nodes"):
            status, body = await get(path)
            assert (status, body["error"]["code"]) == (403, "permission_denied")
        response = await world.http.put("/api/v1/endpoints/acme/tides", json={"model": "/models/tides"}, headers=mine)
        assert response.status_code == 403


@on_loop
async def test_a_tenants_log_says_what_happened_but_not_for_whom_it_was_moved(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.node()
        gateway = await world.gateway()
        await world.apply("acme/tides", slots=8)
        await world.apply("zeta/stars", "/models/stars", slots=8)
        for endpoint in ("acme/tides", "zeta/stars"):
            await gateway.demand(endpoint, queued=1, arrived=1)
            await until(lambda endpoint=endpoint: gateway.targets(endpoint), "route")  # type: ignore[misc]
            await gateway.demand(endpoint, queued=0)
        _, mine = await world.tenant_key("acme")
        log = await world.http.get("/api/v1/endpoints/acme/tides/logs", headers=mine)
        kinds = {line["kind"] for line in log.json()["data"]}
        assert {"state", "ready", "asleep"} <= kinds
        assert not kinds & {"drain", "sleep", "wake", "start"}
        assert "zeta" not in log.text
        full = (await world.http.get("/api/v1/endpoints/acme/tides/logs")).json()["data"]
        assert {"drain", "sleep", "start"} <= {line["kind"] for line in full}


@on_loop
async def test_wake_and_sleep_by_hand(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        node = await world.node()
        await world.apply("acme/tides")
        woken = await world.http.post("/api/v1/endpoints/acme/tides/wake")
        assert woken.status_code == 202
        await until(lambda: [type(c).__name__ for c in node.commands] == ["Start"], "start")
        await until(lambda: "acme/tides" in world.control.meters.activation_ms_last, "ready")
        assert (await world.http.post("/api/v1/endpoints/acme/tides/sleep")).status_code == 202
        await until(lambda: [type(c).__name__ for c in node.commands] == ["Start", "Sleep"], "sleep")
        await world.apply("acme/tides", min_replicas=1)
        refused = await world.http.post("/api/v1/endpoints/acme/tides/sleep")
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "min_replicas")


@on_loop
async def test_a_tenant_with_endpoints_stays_one_without_goes_with_its_keys(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await world.apply("acme/tides")
        _, mine = await world.tenant_key("acme")
        refused = await world.http.delete("/api/v1/tenants/acme")
        assert refused.status_code == 409
        assert "acme/tides" in refused.json()["error"]["message"]
        await world.http.delete("/api/v1/endpoints/acme/tides")
        assert (await world.http.delete("/api/v1/tenants/acme")).status_code == 200
        assert (await world.http.get("/api/v1/endpoints", headers=mine)).json()["error"]["code"] == "invalid_api_key"


@on_loop
async def test_nodes_show_who_is_resident_and_how_much_is_reserved(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        assert (await world.http.get("/readyz")).status_code == 503
        await world.node()
        assert (await world.http.get("/readyz")).status_code == 200
        applied = await world.apply("acme/tides", min_replicas=1)
        await until(lambda: "acme/tides" in world.control.meters.activation_ms_last, "ready")
        (node,) = (await world.http.get("/api/v1/nodes")).json()["data"]
        (accelerator,) = node["accelerators"]
        (resident,) = accelerator["residents"]
        assert (resident["endpoint"], resident["state"]) == ("acme/tides", "ready")
        assert resident["bytes"] == accelerator["reserved_bytes"] == applied["accelerator_bytes"]
        assert accelerator["memory_bytes"] == 24 << 20


@on_loop
async def test_when_the_database_is_away_the_answer_is_503_and_nothing_else_stops(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        await _break_the_database(world)
        response = await world.http.post("/api/v1/tenants", json={"id": "acme"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
        assert str(tmp_path) not in response.text
        assert (await world.http.get("/api/v1/endpoints")).status_code == 200


async def _break_the_database(world: World) -> None:
    with write(world.store._engine) as connection:
        connection.execute(text("DROP TABLE state_version"))
