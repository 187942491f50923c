"""Batch lines at the gateway: only the runner reaches a lane, and what it gets done has the line's name."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.engine import Exchange, hang, refuse, serve_well
from tests.gateway.rig import ENDPOINTS, KEY, KEYS, Rig, key, rig, run
from tests.loop import until
from tidegate.domain.endpoint import Mode
from tidegate.domain.plan import Drain, FenceConfirmed, Reason
from tidegate.domain.usage import Outcome
from tidegate.wire.internal import Catalog, EndpointEntry

RUNNER = "tg-runner"
CHAT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def lane() -> EndpointEntry:
    return replace(ENDPOINTS[0], endpoint="acme/chat:batch", mode=Mode.BATCH, serves="acme/chat")


async def publish(r: Rig, *lanes: EndpointEntry) -> None:
    r.control.version += 1
    runner = key(RUNNER, None, runner=True)
    await r.control.links[-1].send(Catalog(r.control.version, (*KEYS, runner), ENDPOINTS, lanes))


async def ask(r: Rig, secret: str = RUNNER, acting: str = "acme key-1 batch_1-7", **changes: Any) -> Any:
    client = await r.client()
    more = {"x_tidegate_batch": acting} if acting else {}
    await client.post("/v1/chat/completions", CHAT | changes, secret, **more)
    return await client.reply()


def test_a_line_waits_in_its_lane_and_is_recorded_under_its_own_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await publish(r, lane())
            await r.control.route(r.target(), name="acme/chat:batch")
            r.engine.script.append(refuse(400, "context_length_exceeded"))
            assert (await ask(r)).status == 400
            assert (await ask(r)).status == 200
            refused, done = r.journal.final
            assert refused.outcome is Outcome.REFUSED
            assert refused.id != "batch_1-7", "the name is left to the try that is billed"
            assert (done.id, done.outcome, done.output_tokens) == ("batch_1-7", Outcome.COMPLETED, 3)
            assert (done.tenant, done.key, done.endpoint, done.mode) == ("acme", "key-1", "acme/chat", Mode.BATCH)

    run(main())


def test_the_lines_of_an_adapter_wait_in_the_lane_of_its_base_and_are_recorded_as_its_own(tmp_path: Path) -> None:
    tone = replace(ENDPOINTS[0], endpoint="acme/tone", base="acme/chat", adapter="d1 /tone")
    carried = replace(tone, endpoint="acme/tone:batch", base="acme/chat:batch", serves="acme/tone", mode=Mode.BATCH)

    async def main() -> None:
        async with rig(tmp_path) as r:
            r.control.endpoints = (*ENDPOINTS, tone)
            await r.control.links[-1].send(
                Catalog(100, (*KEYS, key(RUNNER, None, runner=True)), r.control.endpoints, (lane(), carried))
            )
            await r.control.route(r.target(), name="acme/chat:batch")
            answer = await ask(r, model="tone")
            assert r.engine.exchanges[0].headers["x-tidegate-adapter"] == "d1 /tone"
            assert answer.error["code"] == "engine_error", "this engine does not say whose adapter answered"
            assert [x.endpoint for x in r.journal.final] == ["acme/tone"]
            r.control.version = 100
            await publish(r)
            assert (await ask(r, model="chat")).error["code"] == "capacity"
            await until(lambda: "acme/chat:batch" not in r.gateway._loop._dispatch.endpoints(), "its lane forgotten")

    run(main())


def test_nobody_else_comes_into_a_lane(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await publish(r, lane())
            await r.control.route(r.target(), name="acme/chat:batch")
            assert (await ask(r, KEY, "", model="acme/chat:batch")).error["code"] == "model_not_found"
            plain = await ask(r, KEY)  # the header of somebody who is not the runner says nothing
            assert plain.status == 200
            assert r.journal.final[-1].mode is not Mode.BATCH
            assert r.journal.final[-1].id != "batch_1-7"
            assert (await ask(r, acting="")).error["param"] == "x-tidegate-batch"
            assert b"batch" not in (await r.get("/v1/models")).body

    run(main())


def test_without_a_lane_it_is_not_now_and_not_never(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await publish(r)
            answer = await ask(r)
            assert (answer.status, answer.error["code"]) == (503, "capacity")
            assert (await ask(r, model="other/secret")).error["code"] == "model_not_found"

    run(main())


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches/x/cancel"])
def test_files_are_for_good_keys_only(path: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            client = await r.client()
            await client.post(path, {}, "nobody")
            assert (await client.reply()).status == 401

    run(main())


def test_a_line_waits_for_an_engine_that_stands_still_longer_than_others_would(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engine_first_byte_ms_max=30, checkpoint_ms=10) as r:
            await publish(r, lane())
            await r.control.route(r.target(), name="acme/chat:batch")
            goes_on = asyncio.Event()

            async def stand_still(exchange: Exchange) -> None:
                await goes_on.wait()
                await serve_well(exchange)

            r.engine.script.append(stand_still)
            asking = asyncio.create_task(ask(r))
            done, _ = await asyncio.wait({asking}, timeout=0.3)
            assert not done
            goes_on.set()
            assert (await asking).status == 200

    run(main())


def test_a_line_is_taken_back_at_once_from_a_replica_whose_memory_is_wanted(tmp_path: Path) -> None:
    """Its engine lives on and can sleep; the line waits again, and nobody counts that as a failure."""

    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await publish(r, lane())
            await r.control.route(r.target(0), name="acme/chat:batch")
            r.engines[0].script.append(hang)
            asking = asyncio.create_task(ask(r))
            await until(lambda: r.engines[0].exchanges, "the line at the engine")
            await r.control.links[-1].send(Drain("r0", "n1", "acme/chat:batch", Reason("evict"), 3, abort=True))
            await until(lambda: r.engines[0].exchanges[0].gone.is_set(), "the hang-up")
            await until(lambda: r.gateway.parts.room.held == 1, "the line waits again")
            await r.control.route(r.target(1), name="acme/chat:batch")
            assert (await asking).status == 200
            assert [(one.outcome, one.replica) for one in r.journal.final] == [(Outcome.COMPLETED, "r1")]
            assert any(isinstance(m, FenceConfirmed) and m.fence == 3 for m in r.control.messages)

    run(main())
