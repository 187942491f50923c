"""Paths that are not the data plane go to the admin socket, streaming both ways."""

import asyncio
from pathlib import Path

import pytest

from tests.gateway.engine import Exchange, die
from tests.gateway.rig import ADMIN_KEY, KEY, rig, run
from tests.loop import until
from tidegate.gateway.intake import from_here


async def _echo(exchange: Exchange) -> None:
    body = exchange.body or b"nothing"
    await exchange.head(201, "application/x-echo", len(body))
    await exchange.write(body)


def test_requests_and_answers_pass_through(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.admin.script.append(_echo)
            client = await r.client()
            await client.send(
                b"PUT /api/v1/endpoints/acme/a?x=%20y HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n"
                b"te: trailers\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello"
            )
            reply = await client.reply()
            assert (reply.status, reply.body, reply.headers["content-type"]) == (201, b"hello", "application/x-echo")
            seen = r.admin.exchanges[0]
            assert seen.path == "/api/v1/endpoints/acme/a?x=%20y"
            assert seen.headers["authorization"] == "bearer k"
            assert "te" not in seen.headers
            assert seen.headers["x-request-id"].startswith("req-")

    run(main())


def test_a_live_event_stream_arrives_as_it_comes_and_ends_with_its_client(tmp_path: Path) -> None:
    more = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.head()
        await more.wait()
        await exchange.chunk(b"data: 1\n\n")
        await exchange.gone.wait()

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.admin.script.append(stream)
            client = await r.client()
            await client.get("/console/events")
            status, _ = await asyncio.wait_for(client.head(), 5)
            assert status == 200, "the head does not wait for the first event"
            more.set()
            assert await client.chunk() == b"data: 1\n\n"
            client.hang_up()
            await asyncio.wait_for(r.admin.exchanges[0].gone.wait(), 5)

    run(main())


def test_head_has_no_body(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.admin.script.append(_echo)
            client = await r.client()
            await client.send(b"HEAD /console HTTP/1.1\r\nhost: x\r\n\r\n")
            status, headers = await client.head()
            assert (status, headers["content-length"]) == (201, "7")
            await client.get("/healthz")
            assert (await client.reply()).json == {"status": "ok"}

    run(main())


def test_without_control_the_answer_is_a_refusal(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.admin.script.append(die)
            reply = await r.get("/api/v1/tenants")
            assert (reply.status, reply.error["code"]) == (503, "not_ready")
            await r.admin.kill()
            assert (await r.get("/api/v1/tenants")).error["code"] == "not_ready"
            assert "tidegate_held_requests" in (await r.get("/metrics")).body.decode()

    run(main())


def test_half_an_answer_breaks_the_connection(tmp_path: Path) -> None:
    async def half(exchange: Exchange) -> None:
        await exchange.head(200, "text/plain", 100)
        await exchange.write(b"only this")
        await asyncio.sleep(0.02)
        exchange.writer.transport.abort()

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.admin.script.append(half)
            client = await r.client()
            await client.get("/console")
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.reply()

    run(main())


@pytest.mark.parametrize("header", ["forwarded: for=10.0.0.8", "x-forwarded-for: 10.0.0.8", "x-real-ip: 10.0.0.8"])
def test_whoever_asks_for_metrics_through_a_proxy_must_be_the_operator(tmp_path: Path, header: str) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            statuses = []
            for key in ("", f"authorization: Bearer {KEY}\r\n", f"authorization: Bearer {ADMIN_KEY}\r\n"):
                client = await r.client()
                await client.send(f"GET /metrics HTTP/1.1\r\nhost: x\r\n{header}\r\n{key}\r\n".encode())
                statuses.append((await client.reply()).status)
            assert statuses == [401, 403, 200]

    run(main())


@pytest.mark.parametrize(
    ("client", "near"),
    [(None, True), (("127.0.0.1", 5), True), (("::1", 5), True), (("10.0.0.8", 5), False), (("2001:db8::1", 5), False)],
)
def test_a_client_of_this_machine_is_told_by_its_address(client: tuple[str, int] | None, near: bool) -> None:
    assert from_here({"type": "http", "client": client, "headers": []}) is near


def test_metrics_are_the_gateways_and_controls(tmp_path: Path) -> None:
    async def admin_metrics(exchange: Exchange) -> None:
        body = b"tidegate_swap_seconds_count 3\n"
        await exchange.head(200, "text/plain", len(body))
        await exchange.write(body)

    async def main() -> None:
        async with rig(tmp_path) as r:
            await r.ask({"model": "acme/chat", "messages": [], "max_tokens": 4})
            await r.ask({"model": "nope", "messages": []})
            r.admin.script.append(admin_metrics)
            text = (await r.get("/metrics", key=None)).body.decode()
            lines = text.splitlines()
            for line in (
                'tidegate_requests_total{endpoint="acme/chat",outcome="completed"} 1',
                'tidegate_tokens_total{endpoint="acme/chat",kind="output"} 4',
                'tidegate_refusals_total{code="model_not_found"} 1',
                'tidegate_hold_seconds_count{endpoint="acme/chat"} 1',
                'tidegate_ttft_seconds_count{endpoint="acme/chat"} 1',
                'tidegate_held_requests{endpoint="acme/chat"} 0',
                "tidegate_control_link 1",
                "tidegate_swap_seconds_count 3",
            ):
                assert line in lines
            buckets = [float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("tidegate_ttft_seconds_bucket")]
            assert buckets == sorted(buckets)
            assert buckets[-1] == 1
            r.control.endpoints = ()
            await r.control.publish()
            await until(lambda: not r.gateway.parts.room.endpoints, "the catalog")
            assert b"acme/chat" not in (await r.get("/metrics")).body

    run(main())


def test_unknown_data_plane_paths_are_not_passed_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            for path in ("/v1", "/v1/nothing", "/v1/chat/completions/x", "/v1/../control/sleep"):
                reply = await r.get(path)
                assert (reply.status, reply.error["code"]) == (404, "not_found")
            wrong = await r.get("/v1/chat/completions")
            assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
            assert (await r.ask({}, "/v1/models")).status == 405
            assert not r.admin.exchanges
            assert not r.engine.exchanges

    run(main())
