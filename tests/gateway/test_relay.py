"""The relay over real sockets: what the client gets, what the engine sees, and the one record that remains."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.gateway.engine import DONE, Exchange, die, event, hang, refuse
from tests.gateway.rig import Rig, chat, rig, run
from tests.loop import until
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.usage import CountSource, Outcome


def test_a_unary_answer_is_the_engines_and_its_usage_is_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            body = json.dumps(chat(max_tokens=5), indent=3).encode()
            reply = await r.ask(body)
            assert (reply.status, reply.json["usage"]["completion_tokens"]) == (200, 5)
            assert r.engine.exchanges[0].body == body, "the body is forwarded untouched"
            assert r.engine.exchanges[0].path == "/v1/chat/completions"
            assert "authorization" not in r.engine.exchanges[0].headers
            record = await r.record()
            assert record.outcome is Outcome.COMPLETED
            assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (7, 2, 5)
            assert record.count_source is CountSource.ENGINE_USAGE
            assert (record.tenant, record.key, record.endpoint) == ("acme", "key-tg-acme", "acme/chat")
            assert (record.replica, record.region, record.gateway) == ("r0", "local", "g1")
            assert record.api == "chat/completions"
            assert reply.headers["x-request-id"] == record.id
            assert reply.headers["x-tidegate-mode"] == "dedicated_serverless"
            assert reply.headers["x-tidegate-region"] == "local"
            assert reply.headers["x-tidegate-replica"] == "r0"
            assert reply.headers["x-tidegate-queue-ms"] == "0"
            assert reply.headers["x-tidegate-activation-ms"] == "0"

    run(main())


def test_a_stream_passes_through_and_is_counted_by_its_last_event(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            reply = await r.ask(chat(stream=True, max_tokens=9))
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert reply.body == b"".join(event(i, f"t{i} ") for i in range(1, 10)) + DONE
            record = await r.record()
            assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (7, 2, 9)
            assert record.count_source is CountSource.DELIVERED_EVENT
            assert record.arrived_ms <= record.first_token_ms <= record.ended_ms

    run(main())


def test_bare_names_are_of_the_callers_tenant_and_shared_endpoints_are_everybodys(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await r.control.route(r.target(), name="house/common")
            assert (await r.ask(chat(model="chat"))).status == 200
            assert (await r.ask(chat(model="house/common"))).status == 200
            assert [x.endpoint for x in r.journal.final] == ["acme/chat", "house/common"]
            assert [x.tenant for x in r.journal.final] == ["acme", "acme"]

    run(main())


def test_the_record_is_durable_before_the_client_sees_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.journal.gate = asyncio.Event()
            stream, unary = await r.client(), await r.client()
            await stream.post("/v1/chat/completions", chat(stream=True, max_tokens=2))
            await unary.post("/v1/chat/completions", chat())
            await stream.head()
            got = b""
            while not got.endswith(event(2, "t2 ")):
                got += await stream.chunk()
            await until(lambda: len(r.journal.final) == 2, "both records")
            for client in (stream, unary):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.reader.read(1), 0.05)
            r.journal.gate.set()
            assert await stream.chunk() == DONE
            assert (await unary.reply()).status == 200

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_journal_that_fails_is_never_hidden(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.journal.broken = True
            reply = await r.ask(chat(stream=stream))
            if stream:
                assert json.loads(reply.events[-1])["error"]["code"] == "journal_unavailable"
                assert b"[DONE]" not in reply.body
            else:
                assert (reply.status, reply.error["code"]) == (503, "journal_unavailable")
            r.journal.healthy = False
            refused = await r.ask(chat())
            assert (refused.status, refused.error["code"]) == (503, "journal_unavailable")
            assert len(r.engine.exchanges) == 1, "an unhealthy journal lets nothing reach an engine"
            assert (await r.get("/readyz")).status == 503

    run(main())


# --- engines that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_dead_before_the_first_byte_is_retried_elsewhere(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await r.control.route(r.target(0), r.target(1))
            r.engines[0].script.append(die)
            reply = await r.ask(chat(stream=stream, max_tokens=3))
            assert reply.status == 200
            record = await r.record()
            assert (record.outcome, record.replica, record.output_tokens) == (Outcome.COMPLETED, "r1", 3)

    run(main())


def test_dead_twice_before_the_first_byte_is_an_engine_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await r.control.route(r.target(0), r.target(1))
            for engine in r.engines:
                engine.script.append(die)
            reply = await r.ask(chat())
            assert (reply.status, reply.error["code"], reply.error["type"]) == (502, "engine_error", "server_error")
            record = await r.record()
            assert (record.outcome, record.output_tokens, record.refusal) == (Outcome.ENGINE_LOST, 0, "engine_error")
            assert not record.billable

    run(main())


def test_a_killed_engine_holds_its_request_for_the_next_replica(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await r.engine.kill()
            asking = asyncio.create_task(r.ask(chat(max_tokens=4)))
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            await r.control.route(state=EndpointState.WAKING)
            await r.control.route(r.target(1))
            assert (await asking).status == 200
            assert (await r.record()).replica == "r1"

    run(main())


def test_dead_after_the_first_byte_is_an_error_event_and_what_came_is_counted(tmp_path: Path) -> None:
    async def two_then_die(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await exchange.chunk(event(2, "b"))
        await exchange.chunk(b'id: 3\ndata: {"half')
        await asyncio.sleep(0.02)
        exchange.writer.transport.abort()

    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await r.control.route(r.target(0), r.target(1))
            r.engines[0].script.append(two_then_die)
            reply = await r.ask(chat(stream=True))
            assert reply.body.startswith(event(1, "a") + event(2, "b") + b"data: ")
            assert json.loads(reply.events[-1])["error"]["code"] == "engine_error"
            record = await r.record()
            assert (record.outcome, record.output_tokens, record.billable) == (Outcome.ENGINE_LOST, 2, True)
            assert not r.engines[1].exchanges, "never sent again once a byte was delivered"

    run(main())


def test_a_stream_without_its_end_marker_is_lost_not_complete(tmp_path: Path) -> None:
    async def no_done(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await exchange.end()

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(no_done)
            reply = await r.ask(chat(stream=True))
            assert json.loads(reply.events[-1])["error"]["code"] == "engine_error"
            assert (await r.record()).outcome is Outcome.ENGINE_LOST

    run(main())


@pytest.mark.parametrize("nonsense", [b"not http at all\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: zz\r\n\r\n"])
def test_nonsense_is_an_engine_error(tmp_path: Path, nonsense: bytes) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(nonsense)
        await exchange.gone.wait()

    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await r.control.route(r.target(0), r.target(1))
            for engine in r.engines:
                engine.script.append(behave)
            reply = await r.ask(chat())
            assert (reply.status, reply.error["code"]) == (502, "engine_error")
            assert (await r.record()).outcome is Outcome.ENGINE_LOST

    run(main())


def test_nonsense_chunks_in_a_stream_end_it_with_an_error_event(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await exchange.write(b"zz\r\nnot a chunk\r\n")
        await exchange.gone.wait()

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(behave)
            reply = await r.ask(chat(stream=True))
            assert json.loads(reply.events[-1])["error"]["code"] == "engine_error"
            record = await r.record()
            assert (record.outcome, record.output_tokens) == (Outcome.ENGINE_LOST, 1)

    run(main())


def test_an_answer_that_is_not_json_is_an_engine_error(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.head(kind="application/json", length=5)
        await exchange.write(b"hello")

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(behave)
            assert (await r.ask(chat())).error["code"] == "engine_error"
            assert (await r.record()).outcome is Outcome.ENGINE_LOST

    run(main())


def test_an_event_without_end_is_bounded(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        while not exchange.gone.is_set():
            await exchange.chunk(b"x" * 4096)

    async def main() -> None:
        async with rig(tmp_path, event_bytes_max=50_000) as r:
            r.engine.script.append(behave)
            reply = await r.ask(chat(stream=True))
            assert json.loads(reply.events[-1])["error"]["code"] == "engine_error"
            assert (await r.record()).output_tokens == 1

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_hangs_is_given_up(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2, engine_first_byte_ms_max=30, checkpoint_ms=10) as r:
            await r.control.route(r.target(0), r.target(1))
            r.engines[0].script.append(hang)
            assert (await r.ask(chat(stream=stream))).status == 200
            assert (await r.record()).replica == "r1"

    run(main())


def test_an_engine_that_stops_in_the_middle_is_given_up(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(event(1, "a"))
        await exchange.gone.wait()

    async def main() -> None:
        async with rig(tmp_path, engine_silence_ms_max=30, checkpoint_ms=10) as r:
            r.engine.script.append(behave)
            reply = await r.ask(chat(stream=True))
            assert json.loads(reply.events[-1])["error"]["code"] == "engine_error"
            assert (await r.record()).output_tokens == 1

    run(main())


def test_an_engine_that_is_asleep_is_never_shown(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            r.engine.script.append(refuse(503, "asleep"))
            asking = asyncio.create_task(r.ask(chat()))
            await until(lambda: r.gateway.parts.room.held == 1, "the hold")
            await r.control.route(r.target(0), r.target(1))
            assert (await asking).status == 200
            assert (await r.record()).replica == "r1"

    run(main())


def test_what_the_engine_refuses_is_passed_on_and_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(refuse(400, "context_length_exceeded", "too long"))
            reply = await r.ask(chat(stream=True))
            assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
            assert reply.error["message"] == "too long"
            assert "x-request-id" in reply.headers
            record = await r.record()
            assert (record.outcome, record.refusal) == (Outcome.REFUSED, "context_length_exceeded")
            assert not record.billable

    run(main())


def test_an_engines_500_is_an_engine_error_without_its_text(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(refuse(500, "x", "Traceback secret"))
            reply = await r.ask(chat())
            assert (reply.status, reply.error["code"]) == (502, "engine_error")
            assert b"secret" not in reply.body

    run(main())


def test_a_kept_connection_that_the_engine_closed_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            assert (await r.ask(chat())).status == 200
            assert r.engine.opened == 1
            r.engine.script.append(die)  # the kept connection breaks under the next request
            assert (await r.ask(chat())).status == 200
            assert r.engine.opened == 2
            assert [x.outcome for x in r.journal.final] == [Outcome.COMPLETED] * 2

    run(main())


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("position", range(6))
def test_an_abort_is_counted_to_the_token_at_every_position(tmp_path: Path, position: int, half_closed: bool) -> None:
    """The engine says one event at a time, when the test lets it: what was sent is known exactly."""
    more = asyncio.Semaphore(0)

    async def stepwise(exchange: Exchange) -> None:
        await exchange.head()
        for number in range(1, 7):
            await more.acquire()
            await exchange.chunk(event(number, f"t{number}"))
        await exchange.gone.wait()

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(stepwise)
            client = await r.client()
            await client.post("/v1/chat/completions", chat(stream=True))
            await until(lambda: r.engine.exchanges, "the request")
            for number in range(1, position + 1):
                more.release()
                if number == 1:
                    await client.head()
                assert await client.chunk() == event(number, f"t{number}")
            if half_closed:
                client.half_close()
            else:
                client.hang_up()
            await asyncio.wait_for(r.engine.exchanges[0].gone.wait(), 5)
            record = await r.record()
            assert (record.outcome, record.output_tokens) == (Outcome.CLIENT_ABORTED, position)
            assert record.billable is (position > 0)

    run(main())


def test_a_client_that_leaves_a_unary_request_frees_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(hang)
            client = await r.client()
            await client.post("/v1/chat/completions", chat())
            await until(lambda: r.engine.exchanges, "the request")
            client.hang_up()
            await asyncio.wait_for(r.engine.exchanges[0].gone.wait(), 5)
            record = await r.record()
            assert (record.outcome, record.output_tokens, record.replica) == (Outcome.CLIENT_ABORTED, 0, "r0")

    run(main())


def test_ids_split_over_segments_are_counted(tmp_path: Path) -> None:
    stream = b"".join(event(i, 'say "id: 99\\n"') for i in (1, 2, 13)) + DONE

    async def main() -> None:
        async with rig(tmp_path) as r:
            for cut in range(1, len(stream) - 1, 7):

                async def split(exchange: Exchange, cut: int = cut) -> None:
                    await exchange.head()
                    await exchange.chunk(stream[:cut])
                    await asyncio.sleep(0.001)
                    await exchange.chunk(stream[cut:])
                    await exchange.end()

                r.engine.script.append(split)
                reply = await r.ask(chat(stream=True))
                assert reply.body == stream
                assert r.journal.final[-1].output_tokens == 13

    run(main())


def test_a_slow_client_stops_the_engine_instead_of_filling_memory(tmp_path: Path) -> None:
    big = b"id: %d\ndata: " + b"x" * 60_000 + b"\n\n"

    async def flood(exchange: Exchange) -> None:
        await exchange.head()
        for number in range(1, 10_000):
            await exchange.chunk(big % number)

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.engine.script.append(flood)
            client = await r.client()
            await client.post("/v1/chat/completions", chat(stream=True))
            await until(lambda: r.engine.exchanges, "the request")
            exchange = r.engine.exchanges[0]
            before = -1
            while before != len(exchange.written):
                before = len(exchange.written)
                await asyncio.sleep(0.1)
            assert 0 < before < 400, f"{before * 60_000} bytes were taken from the engine"
            client.hang_up()
            await asyncio.wait_for(exchange.gone.wait(), 5)
            record = await r.record()
            assert record.outcome is Outcome.CLIENT_ABORTED
            assert 0 < record.output_tokens <= before

    run(main())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_running_streams_leave_checkpoints_that_grow(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, checkpoint_ms=20) as r:
            reply = await r.ask(chat(stream=True, max_tokens=10, pause=0.02))
            assert reply.status == 200
            opened = [x for x in r.journal.records if x.outcome is Outcome.OPEN]
            counts = [x.output_tokens for x in opened]
            assert counts == sorted(set(counts))
            assert counts
            assert {x.id for x in opened} == {(await r.record()).id}
            assert r.journal.records[-1].outcome is Outcome.COMPLETED, "nothing after the final record"

    run(main())


def test_a_gateway_that_stops_records_what_it_cut_off(tmp_path: Path) -> None:
    async def main() -> Rig:
        async with rig(tmp_path, shutdown_ms_max=1_000) as r:
            client = await r.client()
            await client.post("/v1/chat/completions", chat(stream=True, max_tokens=5_000, pause=0.01))
            await client.head()
            await client.chunk()
            r.stop()
            got = b""
            while data := await client.chunk():
                got += data
            assert json.loads(got.split(b"data: ")[-1])["error"]["code"] == "not_ready"
            record = await r.record()
            assert record.outcome is Outcome.GATEWAY_LOST
            assert record.output_tokens == got.count(b"id: ") + 1
            return r

    run(main())
