"""Bad input: each a documented status in OpenAI's shape, nothing kept of the text, nothing left behind."""

import asyncio
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.engine import hang
from tests.gateway.rig import ADMIN_KEY, KEY, OLD_KEY, REVOKED_KEY, Reply, chat, rig, run
from tests.loop import until
from tidegate.domain.errors import REFUSALS

SECRET = "the-planted-secret"


def check(reply: Reply, status: int, code: str) -> dict[str, Any]:
    error = reply.error
    assert (reply.status, error["code"]) == (status, code)
    assert (reply.status, error["type"]) == REFUSALS[code]
    assert set(error) >= {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"].startswith("req-")
    assert SECRET not in json.dumps(error)
    return error


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        (None, 401, "invalid_api_key"),
        ("tg-nobody", 401, "invalid_api_key"),
        ("", 401, "invalid_api_key"),
        (OLD_KEY, 401, "expired_api_key"),
        (REVOKED_KEY, 401, "revoked_api_key"),
        (ADMIN_KEY, 403, "permission_denied"),
    ],
)
def test_keys(tmp_path: Path, key: str | None, status: int, code: str) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            check(await r.ask(chat(), key=key), status, code)
            if status == 401:
                check(await r.get("/v1/models", key=key), status, code)
            assert not r.engine.exchanges
            assert not r.journal.records

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"\xff\xfe", 400, "invalid_json", None),
        (b"[" * 100_000, 400, "invalid_request", None),
        (b'{"model": "acme/chat", "x": ' + b"[" * 100_000, 400, "invalid_json", None),
        (b"[]", 400, "invalid_request", None),
        (b"{}", 400, "invalid_request", "model"),
        (b'{"model": 3}', 400, "invalid_request", "model"),
        (b'{"model": ""}', 400, "invalid_request", "model"),
        (b'{"model": "acme/chat", "stream": "%b"}' % SECRET.encode(), 400, "invalid_request", "stream"),
        (b'{"model": "acme/chat", "stream_options": 7}', 400, "invalid_request", "stream_options"),
        (b'{"model": "acme/unknown"}', 404, "model_not_found", "model"),
        (b'{"model": "other/secret"}', 404, "model_not_found", "model"),
        (b'{"model": "secret"}', 404, "model_not_found", "model"),
        (b'{"model": "acme/embed"}', 400, "wrong_endpoint_kind", "model"),
    ],
)
def test_bodies(tmp_path: Path, body: bytes, status: int, code: str, param: str | None) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            error = check(await r.ask(body), status, code)
            assert error["param"] == param
            assert not r.engine.exchanges

    run(main())


def test_a_foreign_endpoint_looks_exactly_like_an_unknown_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            foreign, unknown = await r.ask(chat(model="other/secret")), await r.ask(chat(model="other/nothing"))
            assert foreign.body.replace(b"secret", b"nothing") == unknown.body
            assert {k for k in foreign.headers if k != "date"} == {k for k in unknown.headers if k != "date"}
            listed = [m["id"] for m in (await r.get("/v1/models")).json["data"]]
            assert listed == ["acme/chat", "acme/embed", "house/common"]
            one = await r.get("/v1/models/acme/chat")
            assert (one.json["id"], one.json["object"], one.json["owned_by"]) == ("acme/chat", "model", "acme")
            assert (await r.get("/v1/models/chat")).json["id"] == "acme/chat"
            assert (await r.get("/v1/models/other/secret")).error["code"] == "model_not_found"
            everything = [m["id"] for m in (await r.get("/v1/models", key=ADMIN_KEY)).json["data"]]
            assert "other/secret" in everything

    run(main())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_while_it_comes(tmp_path: Path, chunked: bool) -> None:
    async def main() -> None:
        async with rig(tmp_path, body_bytes_max=100_000) as r:
            client = await r.client()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
            if chunked:
                await client.send(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
                for _ in range(30):
                    await client.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            else:
                await client.send(f"{head}content-length: 100001\r\n\r\n".encode())
            check(await client.reply(), 413, "body_too_large")
            assert not r.engine.exchanges

    run(main())


def test_a_chunked_body_under_the_limit_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            body = json.dumps(chat()).encode()
            client = await r.client()
            await client.send(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
                "transfer-encoding: chunked\r\n\r\n".encode()
            )
            for at in range(0, len(body), 7):
                piece = body[at : at + 7]
                await client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await client.send(b"0\r\n\r\n")
            assert (await client.reply()).status == 200
            assert r.engine.exchanges[0].body == body

    run(main())


def test_a_slow_body_and_a_slow_head_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.gateway.server.SWEEP_MS", 10)

    async def main() -> None:
        async with rig(tmp_path, body_ms_max=50, head_ms_max=50) as r:
            slow = await r.client()
            await slow.send(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
                'content-length: 90\r\n\r\n{"model"'.encode()
            )
            check(await slow.reply(), 408, "request_timeout")
            trickle = await r.client()
            await trickle.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
            refused = await trickle.reply()
            assert (refused.status, refused.error["code"]) == (408, "request_timeout")
            assert await trickle.reader.read() == b""
            silent = await r.client()
            assert await silent.reader.read() == b""
            endless = await r.client()
            await endless.send(b"PUT /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{")
            assert b"200" not in await endless.reader.read()

    run(main())


def test_of_too_many_connections_those_go_that_ask_nothing(tmp_path: Path) -> None:
    """A slow head, a silent one, one kept alive, each for one that came; nobody who works."""

    async def main() -> None:
        async with rig(tmp_path, connections_max=4) as r:
            r.engine.script.extend([hang] * 4)
            slow, silent, kept = await r.client(), await r.client(), await r.client()
            await slow.send(b"POST /v1/chat/completions HTTP/1.1\r\n")
            await kept.get("/healthz")
            assert (await kept.reply()).status == 200
            working = [await r.client()]
            for _ in (slow, silent, kept):
                await working[-1].post("/v1/chat/completions", chat(stream=True))
                await until(lambda: len(r.engine.exchanges) == len(working), "its stream")
                working.append(await r.client())
            assert [await one.reader.read() for one in (slow, silent, kept)] == [b""] * 3, "closed for them"
            await working[-1].post("/v1/chat/completions", chat(stream=True))
            await until(lambda: len(r.engine.exchanges) == 4, "the last stream")
            refused = await (await r.client()).reply()
            assert (refused.status, refused.error["code"]) == (503, "not_ready")
            for client in working:
                client.hang_up()

    run(main())


def test_clients_that_leave_in_the_middle_of_a_body_leave_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            for leave in ("hang_up", "half_close"):
                client = await r.client()
                await client.send(
                    f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
                    'content-length: 900\r\n\r\n{"model"'.encode()
                )
                await asyncio.sleep(0.02)
                getattr(client, leave)()
                await asyncio.sleep(0.02)
            assert not r.engine.exchanges
            assert not r.journal.records

    run(main())


SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer tg-acme\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"content-length: 5, 5\r\n\r\nhello",
        b"content-length: -1\r\n\r\n",
        b"content-length: 0x5\r\n\r\nhello",
        b"content-length: +5\r\n\r\nhello",
        b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        b"x: y\r\n folded: line\r\n\r\n",
        b"x\x00y: z\r\n\r\n",
        b"content-length: 2\nx: y\r\n\r\n{}",
    ],
)
def test_ambiguous_framing_is_refused_and_the_connection_closed(tmp_path: Path, head: bytes) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            await client.send(SMUGGLED + head)
            reply = await client.reply()
            assert reply.status == 400
            assert reply.error["code"] in ("invalid_request", "invalid_json")
            rest = await asyncio.wait_for(client.reader.read(), 5)
            assert b"HTTP/1.1 200" not in rest
            assert not r.engine.exchanges

    run(main())


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(200)) + b"\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000,
        b"\r\n" * 50_000,
    ],
)
def test_request_heads_are_bounded(tmp_path: Path, head: bytes) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            await client.send(head)
            reply = await asyncio.wait_for(client.reply(), 5)
            assert (reply.status, reply.error["code"]) == (400, "invalid_request")
            assert not r.admin.exchanges

    run(main())


def test_broken_requests_never_break_the_gateway(tmp_path: Path) -> None:
    """Whole requests with a few bytes changed, cut out or doubled, at a fixed seed."""
    dice = random.Random(7)
    body = json.dumps(chat(max_tokens=1)).encode()
    good = SMUGGLED + b"content-length: %d\r\n\r\n" % len(body) + body

    def broken() -> bytes:
        data = bytearray(good)
        for _ in range(dice.randint(1, 6)):
            at = dice.randrange(len(data))
            match dice.randrange(3):
                case 0:
                    data[at] = dice.randrange(256)
                case 1:
                    del data[at : at + dice.randint(1, 9)]
                case 2:
                    data[at:at] = data[at : at + dice.randint(1, 40)]
        return bytes(data)

    async def main() -> None:
        async with rig(tmp_path) as r:
            for _ in range(300):
                client = await r.client()
                await client.send(broken())
                client.half_close()
                answered = await asyncio.wait_for(client.reader.read(), 5)
                assert answered == b"" or answered.startswith(b"HTTP/1.1 ")
                assert b"HTTP/1.1 500" not in answered
            assert (await r.ask(body)).status == 200
            assert all(x.path == "/v1/chat/completions" for x in r.engine.exchanges)

    run(main())


def test_a_bug_is_a_500_in_openais_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError(SECRET)

    async def main() -> None:
        async with rig(tmp_path) as r:
            monkeypatch.setattr("tidegate.gateway.relay.Relay._place", fail)
            reply = await r.ask(chat())
            assert (reply.status, reply.error["code"]) == (500, "internal_error")
            assert SECRET not in reply.body.decode()
            assert [x.outcome for x in r.journal.records] == ["gateway_lost"]

    run(main())


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            requests = b""
            for tokens in (5, 1, 3):
                body = json.dumps(chat(max_tokens=tokens)).encode()
                requests += SMUGGLED + b"content-length: %d\r\n\r\n" % len(body) + body
            await client.send(requests + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert [(await client.reply()).json["usage"]["completion_tokens"] for _ in range(3)] == [5, 1, 3]
            assert (await client.reply()).json == {"status": "ok"}

    run(main())


def test_a_pipelining_client_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(hang)
            client = await r.client()
            body = json.dumps(chat()).encode()
            await client.send((SMUGGLED + b"content-length: %d\r\n\r\n" % len(body) + body) * 3)
            await until(lambda: r.engine.exchanges, "the first request")
            client.hang_up()
            await asyncio.wait_for(r.engine.exchanges[0].gone.wait(), 5)

    run(main())


def test_nothing_of_a_prompt_is_logged_or_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        async with rig(tmp_path) as r:
            prompt = chat(messages=[{"role": "user", "content": SECRET}])
            await r.ask(prompt)
            await r.ask({**prompt, "stream": True})
            await r.ask({**prompt, "stream": SECRET})
            await r.ask({**prompt, "model": "nope"})
            await r.ask(json.dumps(prompt).encode()[:-3])
            await r.engine.kill()
            await r.ask(prompt, x_scale_up_timeout="0")
            assert len(r.journal.records) == 3
            assert SECRET not in repr(r.journal.records)

    run(main())
    assert SECRET not in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("split", [False, True])
def test_an_offer_of_http_2_is_not_taken_and_costs_no_body(split: bool, tmp_path: Path) -> None:
    """What Java's client sends with every request in the clear."""
    body = json.dumps(chat(max_tokens=2)).encode()
    offer = "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n"
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{offer}Host: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"

    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            for _ in range(2):
                await client.send(head.encode() + (b"" if split else body))
                if split:
                    await asyncio.sleep(0.01)
                    await client.send(body)
                assert (await client.reply()).status == 200
            assert [e.json["max_tokens"] for e in r.engine.exchanges] == [2, 2]
            await client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            assert (await client.reply()).status == 401

    run(main())


def test_another_upgrade_with_a_body_is_refused_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            answer = await r.ask(chat(), connection="upgrade", upgrade="websocket")
            assert (answer.status, "upgrade" in answer.error["message"]) == (400, True)

    run(main())
