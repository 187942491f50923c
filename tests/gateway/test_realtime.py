"""Text sessions over WebSocket, by the official SDK: pinned to a replica, limited and metered a response at a time."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import websockets

from tests.gateway.engine import Exchange, die, event, refuse
from tests.gateway.rig import ENDPOINTS, KEY, KEYS, Client, Rig, key, rig, run
from tests.loop import until
from tidegate.domain.limits import Limits, Scope
from tidegate.domain.usage import Outcome
from tidegate.gateway.relay import Relay
from tidegate.wire.internal import Catalog

HELLO: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}


@contextlib.asynccontextmanager
async def session(r: Rig, model: str = "chat", secret: str = KEY, **options: Any) -> AsyncIterator[Any]:
    base = f"http://127.0.0.1:{r.port}/v1"
    async with (
        openai.AsyncOpenAI(base_url=base, api_key=secret, max_retries=0) as sdk,
        sdk.realtime.connect(model=model, **options) as connection,
    ):
        assert (await connection.recv()).type == "session.created"
        yield connection


async def respond(connection: Any, **options: Any) -> list[Any]:
    await connection.response.create(response=options)
    return await done(connection)


async def done(connection: Any) -> list[Any]:
    events = [await connection.recv()]
    while events[-1].type not in ("response.done", "error"):
        events.append(await connection.recv())
    return events


async def refused(r: Rig, query: str = "?model=chat", secret: str = KEY, wait: str = "1") -> tuple[int, dict[str, Any]]:
    headers = {"authorization": f"Bearer {secret}", "x-scale-up-timeout": wait}
    with pytest.raises(websockets.InvalidStatus) as answer:
        await websockets.connect(f"ws://127.0.0.1:{r.port}/v1/realtime{query}", additional_headers=headers)
    response = answer.value.response
    assert response.headers["x-request-id"]
    return response.status_code, json.loads(response.body)["error"]


def test_a_conversation_with_every_event_in_its_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            await connection.session.update(session={"type": "realtime", "instructions": "be brief"})
            assert (await connection.recv()).session.instructions == "be brief"
            await connection.conversation.item.create(item=HELLO)
            assert [(await connection.recv()).type for _ in range(2)] == [
                "conversation.item.added",
                "conversation.item.done",
            ]
            events = await respond(connection, max_output_tokens=3)
            assert [e.type for e in events] == [
                "response.created",
                "response.output_item.added",
                "conversation.item.added",
                "response.content_part.added",
                *["response.output_text.delta"] * 3,
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "conversation.item.done",
                "response.done",
            ]
            assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "t1 t2 t3 "
            response = events[-1].response
            assert (response.status, response.output[0].content[0].text) == ("completed", "t1 t2 t3 ")
            record = await r.record()
            assert (record.outcome, record.input_tokens, record.output_tokens) == (Outcome.COMPLETED, 7, 3)
            usage = response.usage
            assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 3, 10)
            assert usage.input_token_details.cached_tokens == record.cached_tokens == 2
            assert response.id.removeprefix("resp_") == record.id.removeprefix("req-")
            await respond(connection)
            asked = r.engine.exchanges[-1].json
            assert [(m["role"], m["content"]) for m in asked["messages"]] == [
                ("system", "be brief"),
                ("user", "hello"),
                ("assistant", "t1 t2 t3 "),
            ], "the second response is asked with all that was said"

    run(main())


def test_items_are_placed_retrieved_and_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            items = connection.conversation.item
            for name, after in (("b", None), ("a", "root"), ("c", "b")):
                await items.create(item=HELLO | {"id": name}, **({"previous_item_id": after} if after else {}))
                added, _ = await connection.recv(), await connection.recv()
                assert added.item.id == name
            await items.retrieve(item_id="a")
            assert (await connection.recv()).item.content[0].text == "hello"
            await items.delete(item_id="b")
            assert (await connection.recv()).item_id == "b"
            call = {"type": "function_call", "id": "d", "call_id": "call_1", "name": "tide", "arguments": "{}"}
            output = {"type": "function_call_output", "id": "e", "call_id": "call_1", "output": "high"}
            for item in (call, output):
                await items.create(item=item)
                assert (await connection.recv()).item.id == item["id"]
                await connection.recv()
            await respond(connection, conversation="none", instructions="aside")
            roles = [m["role"] for m in r.engine.exchanges[-1].json["messages"]]
            assert roles == ["system", "user", "user", "assistant", "tool"]
            await respond(connection, input=[HELLO], conversation="none")
            assert len(r.engine.exchanges[-1].json["messages"]) == 1
            await items.retrieve(item_id="b")
            assert (await connection.recv()).error.code == "not_found"

    run(main())


@pytest.mark.parametrize(
    ("said", "code", "param"),
    [
        ("{", "invalid_json", None),
        ("[]", "invalid_request", "type"),
        ({"type": "input_audio_buffer.append", "audio": ""}, "unsupported_parameter", "type"),
        ({"type": "session.update", "session": {"audio": {"output": {}}}}, "unsupported_parameter", "session.audio"),
        ({"type": "session.update", "session": {"output_modalities": ["audio"]}}, "invalid_request", None),
        ({"type": "session.update"}, "invalid_request", "session"),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "user"}}, "invalid_request", None),
        ({"type": "conversation.item.create", "item": HELLO, "previous_item_id": "no"}, "not_found", "item_id"),
        ({"type": "response.create", "response": {"prompt": {"id": "x"}}}, "unsupported_parameter", "response.prompt"),
        ({"type": "response.create"}, "invalid_request", "response.input"),
        ({"type": "response.cancel"}, "not_found", "response_id"),
    ],
)
def test_bad_events_are_refused_by_name_and_the_session_goes_on(
    said: Any, code: str, param: str | None, tmp_path: Path
) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            if isinstance(said, dict):
                said["event_id"] = "mine"
            await connection.send_raw(said if isinstance(said, str) else json.dumps(said))
            answer = await connection.recv()
            assert (answer.type, answer.error.code) == ("error", code)
            assert param is None or answer.error.param == param
            assert answer.error.event_id == ("mine" if isinstance(said, dict) else None)
            assert "hello" not in answer.error.message
            events = await respond(connection, input=[HELLO], max_output_tokens=1)
            assert events[-1].response.status == "completed"

    run(main())


def test_who_may_not_have_a_session_gets_an_http_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, sessions_max=1) as r:
            assert (await refused(r, secret="nobody"))[0] == 401
            status, error = await refused(r, "?model=other/secret")
            assert (status, error["code"]) == (404, "model_not_found")
            assert (await refused(r, "?model=embed"))[1]["code"] == "wrong_endpoint_kind"
            assert (await refused(r, ""))[1]["param"] == "model"
            assert (await refused(r, wait="soon"))[1]["param"] == "X-Scale-Up-Timeout"
            assert (await refused(r, "?model=chat&intent=transcription"))[1]["param"] == "intent"
            async with session(r):
                status, error = await refused(r)
                assert (status, error["limit"]["kind"], error["limit"]["full"]) == (429, "concurrency", 1)
            async with session(r):
                pass
            plain = await r.get("/v1/realtime?model=chat")
            assert plain.status == 404, "without an upgrade there is no such path"

    run(main())


def test_a_session_is_in_flight_on_its_replica_and_a_drain_waits_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            async with session(r) as connection:
                await until(lambda: r.control.demand() and r.control.demand()[-1].in_flight == 1, "the demand")
                assert r.gateway.parts.room.in_flight_at("acme/chat") == 1
                assert b'tidegate_realtime_sessions{endpoint="acme/chat"} 1' in (await r.get("/metrics")).body
                await r.control.drain("r0")
                await r.control.route(r.target(0), r.target(1))
                assert (await r.ask({"model": "chat", "messages": []})).headers["x-tidegate-replica"] == "r1"
                events = await respond(connection, input=[HELLO])
                assert events[-1].response.status == "completed"
                assert len(r.engines[0].exchanges) == 1, "its own replica serves it, draining or not"
                assert r.control.fences() == []
            await until(lambda: r.control.fences() == ["r0"], "the fence, once the session has ended")
            await until(lambda: r.control.demand()[-1].in_flight == 0, "no demand")

    run(main())


def test_a_session_takes_one_slot_however_much_it_asks(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            await r.control.route(r.target(slots=1))
            async with session(r) as connection:
                for _ in range(3):
                    assert (await respond(connection, input=[HELLO]))[-1].response.status == "completed"
                full = await r.ask({"model": "chat", "messages": []}, x_scale_up_timeout="0")
                assert (full.status, full.error["code"]) == (503, "capacity")
            assert (await r.ask({"model": "chat", "messages": []})).status == 200

    run(main())


def test_a_session_waits_for_capacity_and_says_when_there_is_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, routed=False) as r:
            async with session(r) as connection:
                await until(lambda: r.gateway.parts.room.held == 1, "it wants a replica before anybody asks")
                await connection.response.create(response={"input": [HELLO], "max_output_tokens": 2})
                assert (await connection.recv()).type == "response.created"
                await r.control.route(r.target())
                assert (await done(connection))[-1].response.status == "completed"
                assert (await r.record()).queue_ms > 0
                await respond(connection, input=[HELLO])
                assert r.journal.final[-1].queue_ms == 0, "only the first waited for the place"
            await r.control.route()
            async with session(r, extra_headers={"X-Scale-Up-Timeout": "0.05"}) as connection:
                assert (await connection.recv()).error.code == "hold_expired"
                events = await respond(connection, input=[HELLO])
                assert events[-1].response.status == "failed"
                assert events[-1].response.status_details.error.code == "hold_expired"
                await r.control.route(r.target())
                assert (await respond(connection, input=[HELLO]))[-1].response.status == "completed"

    run(main())


def test_a_lost_replica_is_replaced_and_a_second_loss_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r, session(r) as connection:
            await until(lambda: r.gateway.parts.room.in_flight == 1, "its place")
            await r.control.route(r.target(0), r.target(1))
            r.engine.script.append(die)
            assert (await respond(connection, input=[HELLO]))[-1].response.status == "completed"
            assert [len(e.exchanges) for e in r.engines] == [1, 1]
            r.engines[1].script += [die, die]  # the first may have been a kept connection gone stale, which is no loss
            r.engines[0].script += [die]
            failed = (await respond(connection, input=[HELLO]))[-1].response
            assert (failed.status, failed.status_details.error.code) == ("failed", "engine_error")
            assert (await respond(connection, input=[HELLO]))[-1].response.status == "completed", (
                "it asks for a new place"
            )

    run(main())


def test_an_old_session_waits_for_a_new_replica_as_a_new_request_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r, session(r, extra_headers={"X-Scale-Up-Timeout": "0.3"}) as connection:
            await until(lambda: r.gateway.parts.room.in_flight == 1, "its place")
            await asyncio.sleep(0.4)  # longer than the place itself might have waited
            await r.engines[0].kill()
            await connection.response.create(response={"input": [HELLO], "max_output_tokens": 2})
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            await r.control.route(r.target(1))
            assert (await done(connection))[-1].response.status == "completed"
            assert (await r.record()).replica == "r1"

    run(main())


def test_cancelled_and_broken_responses_say_so_and_are_billed_to_what_was_sent(tmp_path: Path) -> None:
    async def two_then_wait(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a") + event(2, "b"))
        await exchange.gone.wait()

    async def one_then_die(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await die(exchange)

    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            r.engine.script += [two_then_wait, one_then_die, refuse(400, "context_length_exceeded")]
            await connection.response.create(response={"input": [HELLO]})
            while (await connection.recv()).type != "response.output_text.delta":
                pass
            await connection.response.create(response={})
            await until(lambda: r.engine.exchanges, "the engine")
            await connection.response.cancel()
            events = await done(connection)
            while events[-1].type == "error":  # the response that was asked for beside it
                assert events[-1].error.code == "conflict"
                events = await done(connection)
            response = events[-1].response
            assert (response.status, response.status_details.reason) == ("cancelled", "client_cancelled")
            assert (response.usage.output_tokens, response.output[0].content[0].text) == (2, "ab")
            assert (await r.record()).outcome is Outcome.CLIENT_ABORTED
            broken = (await respond(connection, input=[HELLO]))[-1].response
            assert (broken.status, broken.status_details.error.code) == ("failed", "engine_error")
            assert (r.journal.final[-1].outcome, r.journal.final[-1].output_tokens) == (Outcome.ENGINE_LOST, 1)
            long = (await respond(connection, input=[HELLO]))[-1].response
            assert long.status_details.error.code == "context_length_exceeded"
            assert r.journal.final[-1].outcome is Outcome.REFUSED

    run(main())


def test_a_client_that_leaves_ends_its_response_and_its_place(tmp_path: Path) -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await exchange.gone.wait()

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(slow)
            async with session(r) as connection:
                await connection.response.create(response={"input": [HELLO]})
                while (await connection.recv()).type != "response.output_text.delta":
                    pass
            assert (await r.record()).outcome is Outcome.CLIENT_ABORTED
            await r.at_rest()

    run(main())


def test_idle_and_old_sessions_are_closed_with_their_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, session_idle_ms_max=150, checkpoint_ms=20) as r, session(r) as connection:
            await respond(connection, input=[HELLO])
            assert (await connection.recv()).error.code == "session_idle"
            with pytest.raises(websockets.ConnectionClosedOK) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1000, "session_idle")
            await r.at_rest()
        async with rig(tmp_path / "old", session_ms_max=150, checkpoint_ms=20) as r, session(r) as connection:
            events = [e async for e in connection]
            assert [e.error.code for e in events] == ["session_expired"]

    (tmp_path / "old").mkdir()
    run(main())


def test_a_session_ends_with_its_key_and_with_its_endpoint(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, checkpoint_ms=20) as r:
            link = r.control.links[-1]
            async with session(r) as connection:
                keys = tuple(replace(k, revoked=True) if k == key(KEY, "acme") else k for k in KEYS)
                await link.send(Catalog(1_000, keys, ENDPOINTS))
                assert (await connection.recv()).error.code == "revoked_api_key"
            await link.send(Catalog(1_001, KEYS, ENDPOINTS))
            await until(lambda: r.gateway._loop.key(KEYS[0].digest).revoked is False, "the keys")
            async with session(r) as connection:
                await link.send(Catalog(1_002, KEYS, ENDPOINTS[1:]))
                assert (await connection.recv()).error.code == "model_not_found"

    run(main())


def test_limits_are_those_of_a_request_for_each_response(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            limits = (Limits(Scope.TENANT, "acme", requests_per_minute=2),)
            await r.control.links[-1].send(Catalog(1_000, KEYS, ENDPOINTS, limits=limits))
            await until(lambda: r.gateway._loop.limiter.gate.active, "the limits")
            seen = [(await respond(connection, input=[HELLO]))[-1].response for _ in range(3)]
            assert [one.status for one in seen] == ["completed", "completed", "failed"]
            assert seen[2].status_details.error.code == "rate_limit_exceeded"
            assert len(r.journal.final) == 2, "what was refused at the door leaves no record, as everywhere"

    run(main())


def test_a_message_over_the_bound_ends_the_session_and_a_full_conversation_is_refused(tmp_path: Path) -> None:
    def text(count: int) -> Any:
        return HELLO | {"content": [{"type": "input_text", "text": "x" * count}]}

    async def main() -> None:
        async with rig(tmp_path, session_event_bytes_max=4_000, session_bytes_max=5_000) as r, session(r) as connection:
            for _ in range(2):
                await connection.conversation.item.create(item=text(3_000))
                answer = await connection.recv()
            assert answer.type == "conversation.item.done"
            assert (await connection.recv()).error.code == "body_too_large"
            await connection.conversation.item.create(item=text(5_000))
            with pytest.raises(websockets.ConnectionClosedError) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009

    run(main())


@pytest.mark.parametrize(
    ("method", "lines", "status"),
    [
        ("POST", ["sec-websocket-version: 13"], 404),
        ("GET", ["sec-websocket-version: 13"], 400),
        ("GET", ["sec-websocket-version: 7", "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="], 400),
        ("GET", ["sec-websocket-version: 13", "sec-websocket-key: short"], 400),
    ],
)
def test_a_handshake_that_is_none_is_answered_and_ends(
    method: str, lines: list[str], status: int, tmp_path: Path
) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            head = [f"{method} /v1/realtime?model=chat HTTP/1.1", "host: x", f"authorization: Bearer {KEY}"]
            head += ["connection: Upgrade", "upgrade: websocket", *lines]
            await client.send(("\r\n".join(head) + "\r\n\r\n").encode())
            assert (await client.head())[0] == status
            assert r.gateway.parts.room.in_flight == 0

    run(main())


async def raw_session(r: Rig) -> Client:
    """Open, and nothing of it read but the handshake."""
    client = await r.client()
    head = f"GET /v1/realtime?model=chat HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    head += "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    head += "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-protocol: realtime\r\n\r\n"
    await client.send(head.encode())
    status, headers = await client.head()
    assert (status, headers["Sec-WebSocket-Protocol"]) == (101, "realtime")
    return client


def frame(text: bytes) -> bytes:
    """A client's text message, masked with zeros (RFC 6455 5.2)."""
    return b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text


def test_a_client_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    async def flood(exchange: Exchange) -> None:
        await exchange.head()
        number = 0
        while not exchange.gone.is_set():
            number += 1
            await exchange.chunk(event(number, "x" * 50_000))

    async def main() -> None:
        async with rig(tmp_path, client_stall_ms_max=200) as r:
            r.engine.script.append(flood)
            client = await raw_session(r)
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            asked = {"type": "response.create", "response": {"input": [HELLO], "metadata": {"pad": "x" * 200}}}
            await client.send(frame(json.dumps(asked).encode()))
            assert (await r.record()).outcome is Outcome.CLIENT_ABORTED
            await r.at_rest()

    run(main())


def test_noise_after_the_handshake_ends_the_session_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as other:
            client = await raw_session(r)
            await until(lambda: r.gateway.parts.room.in_flight == 2, "its place")
            await client.send(b"\xff" * 64)
            await until(lambda: r.gateway.parts.room.in_flight == 1, "its end")
            assert (await respond(other, input=[HELLO]))[-1].response.status == "completed"

    run(main())


def test_a_gateway_that_stops_says_so_to_its_sessions(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            r.stop()
            with pytest.raises(websockets.ConnectionClosedError) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012

    run(main())


def test_a_bug_ends_the_session_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(relay: Relay) -> None:
        raise RuntimeError("a bug")

    async def main() -> None:
        async with rig(tmp_path) as r, session(r) as connection:
            monkeypatch.setattr(Relay, "run", fail)
            await connection.response.create(response={"input": [HELLO]})
            assert (await connection.recv()).type == "response.created"
            answer = await connection.recv()
            assert (answer.error.code, "bug" in answer.error.message) == ("internal_error", False)
            with pytest.raises(websockets.ConnectionClosedError) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1011

    run(main())


def test_nothing_a_client_says_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await refused(r, "?model=chat&api_key=hunter2")
            async with session(r) as connection:
                await respond(connection, input=[HELLO])

    caplog.set_level(logging.DEBUG)
    run(main())
    said = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("uvicorn", "tidegate"))
    )
    assert not any(word in said for word in ("hunter2", KEY, "hello", "t1 t2"))
