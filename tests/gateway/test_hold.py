"""Holding, and the link to control: nothing ready, too many, draining, control away."""

import asyncio
import json
from pathlib import Path

from tests.gateway.engine import event, hang
from tests.gateway.rig import ENDPOINTS, MemoryJournal, SteadyClock, chat, endpoint, rig, run
from tests.loop import until
from tidegate.assemble.sockets import listen_tcp
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.usage import Outcome
from tidegate.gateway import Gateway, GatewayLimits
from tidegate.gateway.server import Server
from tidegate.transports.local import LocalListener
from tidegate.wire.internal import GatewayHello


def test_a_request_to_a_sleeping_endpoint_is_held_and_demand_is_told_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False, demand_ms=60_000) as r:
            await r.control.route(state=EndpointState.ASLEEP)
            asking = asyncio.create_task(r.ask(chat()))
            demand = await until(r.control.demand, "demand, although the timer is far away")
            assert (demand[-1].queued, demand[-1].in_flight, demand[-1].arrivals_total) == (1, 0, 1)
            await asyncio.sleep(0.05)
            await r.control.route(r.target())
            reply = await asking
            assert reply.status == 200
            record = await r.record()
            assert record.queue_ms >= 50
            assert record.activation_ms >= 50
            assert int(reply.headers["x-tidegate-queue-ms"]) == record.queue_ms
            assert int(reply.headers["x-tidegate-activation-ms"]) == record.activation_ms

    run(main())


def test_demand_of_a_ready_endpoint_is_gathered_and_absolute(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, demand_ms=30) as r:
            for _ in range(5):
                await r.ask(chat())
            demand = await until(lambda: [d for d in r.control.demand() if d.arrivals_total == 5], "the last demand")
            assert demand[-1].in_flight in (0, 1)
            last = await until(lambda: [d for d in r.control.demand() if d.in_flight == 0][-1:], "rest")
            assert last[0].queued == 0
            assert len(r.control.demand()) <= 10

    run(main())


def test_the_wait_a_client_asks_for_is_kept_and_refused_honestly(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            await r.control.route(state=EndpointState.LOADING, eta_ms=4_200, reason="loading from disk")
            now = await r.ask(chat(), x_scale_up_timeout="0")
            assert (now.status, now.error["code"], now.headers["retry-after"]) == (503, "capacity", "5")
            assert now.error["limit"] == {"kind": "capacity", "current": 0, "full": 0}
            assert "loading from disk" in now.error["message"]
            late = await r.ask(chat(stream=True), x_scale_up_timeout="0.05")
            assert (late.status, late.error["code"], late.headers["retry-after"]) == (503, "hold_expired", "5")
            assert [x.refusal for x in r.journal.final] == ["capacity", "hold_expired"]
            assert {x.outcome for x in r.journal.final} == {Outcome.REFUSED}
            for nonsense in ("soon", "-1", "nan", "1e99"):
                refused = await r.ask(chat(), x_scale_up_timeout=nonsense)
                assert (refused.status, refused.error["param"]) == (400, "X-Scale-Up-Timeout")

    run(main())


def test_the_endpoints_own_bound_caps_the_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            r.control.endpoints = (endpoint(hold_ms_max=40),)
            await r.control.publish()
            await until(lambda: r.gateway.parts.room.endpoints["acme/chat"].hold_ms_max == 40, "the catalog")
            reply = await r.ask(chat(), x_scale_up_timeout="3600")
            assert reply.error["code"] == "hold_expired"

    run(main())


def test_a_full_queue_says_which_limit_and_how_full(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, queued_max=2) as r:
            await r.control.route(r.target(slots=1))
            r.engine.script.append(hang)
            clients = [await r.client() for _ in range(3)]
            for client in clients:
                await client.post("/v1/chat/completions", chat())
            await until(lambda: r.gateway.parts.room.held == 2, "a full queue")
            reply = await r.ask(chat())
            assert (reply.status, reply.error["code"]) == (429, "queue_full")
            assert reply.error["limit"] == {"kind": "queue", "current": 2, "full": 2}
            assert reply.headers["retry-after"] == "1"
            for client in clients:
                client.hang_up()
            await until(lambda: len(r.journal.final) == 4, "four records")
            assert sorted(x.outcome for x in r.journal.final) == ["client_aborted"] * 3 + ["refused"]

    run(main())


def test_a_held_stream_is_kept_open_by_comments(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False, hold_quiet_ms_max=20, hold_comment_ms=20) as r:
            client = await r.client()
            await client.post("/v1/chat/completions", chat(stream=True, max_tokens=2))
            status, headers = await client.head()
            assert (status, headers["x-tidegate-mode"]) == (200, "dedicated_serverless")
            assert "x-request-id" in headers
            assert [await client.chunk() for _ in range(3)] == [b": waiting\n\n"] * 3
            await r.control.route(r.target())
            got = b""
            while data := await client.chunk():
                got += data
            assert got.replace(b": waiting\n\n", b"").startswith(event(1, "t1 ") + event(2, "t2 "))
            assert (await r.record()).output_tokens == 2

    run(main())


def test_a_held_stream_that_gets_nothing_ends_with_an_error_event(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False, hold_quiet_ms_max=10) as r:
            reply = await r.ask(chat(stream=True), x_scale_up_timeout="0.1")
            assert reply.status == 200
            assert json.loads(reply.events[-1])["error"]["code"] == "hold_expired"
            assert (await r.record()).refusal == "hold_expired"

    run(main())


def test_a_client_that_leaves_while_held_leaves_the_queue(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            for stream in (False, True):
                client = await r.client()
                await client.post("/v1/chat/completions", chat(stream=stream))
                await until(lambda: r.gateway.parts.room.held == 1, "the hold")
                client.hang_up()
                await until(lambda: not r.gateway.parts.room.held, "the queue to empty")
            await until(lambda: len(r.journal.final) == 2, "records")
            assert {(x.outcome, x.replica) for x in r.journal.final} == {(Outcome.CLIENT_ABORTED, "")}
            assert not r.engine.exchanges

    run(main())


def test_failed_and_paused_endpoints_are_refused_with_their_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            asking = asyncio.create_task(r.ask(chat()))
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            await r.control.route(state=EndpointState.FAILED, reason="weights are truncated")
            for reply in (await asking, await r.ask(chat())):
                assert (reply.status, reply.error["code"]) == (503, "endpoint_failed")
                assert "weights are truncated" in reply.error["message"]
            await r.control.route(state=EndpointState.PAUSED)
            assert (await r.ask(chat())).error["code"] == "endpoint_paused"

    run(main())


def test_a_drain_lets_what_runs_finish_and_confirms_the_fence_only_then(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            await client.post("/v1/chat/completions", chat(stream=True, max_tokens=10, pause=0.02))
            await client.head()
            await r.control.drain("r0")
            await r.control.route()
            held = asyncio.create_task(r.ask(chat()))
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            assert not r.control.fences()
            while await client.chunk():
                continue
            await until(lambda: r.control.fences() == ["r0"], "the fence")
            assert len(r.engine.exchanges) == 1
            await r.control.drain("unknown")
            await until(lambda: r.control.fences() == ["r0", "unknown"], "the fence of what it never had")
            await r.control.route(r.target())
            assert (await held).status == 200

    run(main())


def test_a_resume_gives_the_replica_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await r.control.drain("r0")
            await until(r.control.fences, "the fence")
            held = asyncio.create_task(r.ask(chat()))
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            await r.control.resume("r0")
            assert (await held).status == 200

    run(main())


def test_an_endpoint_that_is_removed_refuses_what_waits(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            asking = asyncio.create_task(r.ask(chat()))
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            r.control.endpoints = ENDPOINTS[1:]
            await r.control.publish()
            assert (await asking).error["code"] == "model_not_found"
            assert (await r.ask(chat())).error["code"] == "model_not_found"

    run(main())


def test_control_away_ready_replicas_are_served_and_the_link_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, reconnect_ms_min=5, reconnect_ms_max=10) as r:
            await r.ask(chat())
            await r.control.links[-1].close()
            await until(lambda: not r.gateway.parts.room.connected, "the loss to be seen")
            assert (await r.ask(chat())).status == 200
            assert (await r.get("/readyz")).json == {"status": "ready", "control": False}
            r.control.messages.clear()
            r.control.routes.clear()
            r.control.version = 0  # a control that was restarted counts from the beginning
            await r.control.accept()
            await until(lambda: r.gateway.parts.room.connected, "the link")
            await until(
                lambda: r.control.demand()[-1:] and r.control.demand()[-1].arrivals_total == 2, "demand told anew"
            )
            await r.control.route()
            held = asyncio.create_task(r.ask(chat()))
            await until(lambda: r.gateway.parts.room.held == 1, "the new route to be believed")
            await r.control.route(r.target())
            assert (await held).status == 200

    run(main())


def test_before_control_has_spoken_nothing_is_guessed(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            loop = r.gateway.parts.room
            loop._told.clear()
            for reply in (await r.ask(chat()), await r.get("/v1/models"), await r.get("/readyz")):
                assert (reply.status, reply.error["code"]) == (503, "not_ready")
                assert "retry-after" in reply.headers
            assert (await r.get("/healthz")).status == 200

    run(main())


def test_without_a_word_from_control_a_gateway_waits_only_so_long(tmp_path: Path) -> None:
    async def main() -> None:
        silent, ready = LocalListener(), asyncio.Event()
        gateway = Gateway(
            gateway="g1", region="local", connect=silent.connect, journal=MemoryJournal(), clock=SteadyClock(),
            admin_address="unix:nowhere", limits=GatewayLimits(first_word_ms_max=30),
        )  # fmt: skip
        server = Server(gateway)
        serving = asyncio.create_task(server.serve(listen_tcp("127.0.0.1", 0), ready.set))
        await ready.wait()
        assert not gateway.ready
        server.stop()
        await serving
        await silent.close()

    run(main())


def test_the_link_begins_with_a_hello(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await r.control.links[-1].close()
            link = await r.control.listener.accept()
            assert await link.receive() == GatewayHello("g1", "local")
            await link.close()

    run(main())
