"""Overflow and fallback on real sockets: who served what, what it is called, counted and billed as, nothing lost."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.engine import Behaviour, die, refuse
from tests.gateway.rig import Rig, chat, endpoint, rig, run
from tests.loop import until
from tidegate.domain.endpoint import EndpointState, Mode, Overflow
from tidegate.domain.usage import Outcome

POOL = endpoint("acme/pool", mode=Mode.SERVERLESS, model="pool-model")


async def hybrid(r: Rig, *, slots: int = 1, overflow: Overflow | None = None, **more: Any) -> None:
    """acme/chat on the first engine, dedicated; acme/pool on the second."""
    base = endpoint(mode=Mode.DEDICATED, resident=True, overflow=overflow, fallback="acme/pool", **more)
    r.control.endpoints = (base, POOL)
    await r.control.publish()
    await r.control.route(r.target(0, slots))
    await r.control.route(r.target(1, 8), name="acme/pool")
    await until(lambda: "acme/pool" in r.gateway.parts.room.endpoints, "the catalog")
    await asyncio.sleep(0.01)


def test_above_the_threshold_another_endpoint_serves_and_says_so_everywhere(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await hybrid(r, slots=4, overflow=Overflow("acme/pool", above_concurrency=1))
            first = await r.client()
            await first.post("/v1/chat/completions", chat(stream=True, max_tokens=3, pause=0.2))
            await first.head()
            second = await r.ask(chat())
            assert second.status == 200
            assert second.headers["x-tidegate-overflow"] == "acme/pool; reason=concurrency"
            assert (second.headers["x-tidegate-mode"], second.headers["x-tidegate-replica"]) == ("serverless", "r1")
            while await first.chunk():
                continue
            await until(lambda: len(r.journal.final) == 2, "both records")
            away, home = r.journal.final
            assert (away.endpoint, away.model, away.mode) == ("acme/pool", "pool-model", "serverless")
            assert (away.tenant, away.overflow_from, away.overflow_reason) == ("acme", "acme/chat", "concurrency")
            assert (home.endpoint, home.mode, home.overflow_from) == ("acme/chat", "dedicated", "")
            metrics = (await r.get("/metrics")).body.decode()
            line = 'tidegate_overflow_requests_total{endpoint="acme/chat",to="acme/pool",reason="concurrency"} 1'
            assert line in metrics

    run(main())


def test_a_dead_base_falls_back_at_once_and_returns_when_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await hybrid(r)
            await r.control.route(state=EndpointState.LOADING)
            await until(lambda: not r.gateway.parts.room.in_flight, "the route")
            replies = [await r.ask(chat()) for _ in range(3)]
            assert [reply.headers["x-tidegate-overflow"] for reply in replies] == ["acme/pool; reason=no_replica"] * 3
            await r.control.route(r.target())
            await until(lambda: r.control.demand(), "the route")
            back = await r.ask(chat())
            assert (back.status, back.headers["x-tidegate-replica"]) == (200, "r0")
            assert "x-tidegate-overflow" not in back.headers

    run(main())


@pytest.mark.parametrize("trouble", [die, refuse(429, "rate_limit_exceeded"), refuse(401, "bad_key"), refuse(500, "x")])
def test_what_the_target_does_not_serve_comes_home(tmp_path: Path, trouble: Behaviour) -> None:
    """A remote that answers 429, has another key, or is dead: the tenant never sees it."""

    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await hybrid(r, overflow=Overflow("acme/pool", above_concurrency=1))
            first = await r.client()
            await first.post("/v1/chat/completions", chat(stream=True, max_tokens=2, pause=0.2))
            await first.head()
            r.engines[1].script.append(trouble)
            second = await r.ask(chat())
            assert (second.status, second.headers["x-tidegate-replica"]) == (200, "r0"), "served at home after its turn"
            assert "x-tidegate-overflow" not in second.headers
            while await first.chunk():
                continue
            await until(lambda: len(r.journal.final) == 2, "both records")
            assert [record.endpoint for record in r.journal.final] == ["acme/chat", "acme/chat"]
            assert {record.outcome for record in r.journal.final} == {Outcome.COMPLETED}
            assert len(r.engines[1].exchanges) == 1

    run(main())


def test_an_engine_that_dies_twice_before_the_first_byte_is_replaced_by_the_fallback(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await hybrid(r, slots=4, hold_ms_max=5_000)
            r.engine.script.extend([die, die])
            reply = await r.ask(chat())
            assert reply.status == 200
            assert reply.headers["x-tidegate-overflow"] == "acme/pool; reason=engine_error"
            assert (await r.record()).overflow_reason == "engine_error"

    run(main())


def test_a_clients_own_mistake_is_not_tried_elsewhere(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2) as r:
            await hybrid(r, overflow=Overflow("acme/pool", above_concurrency=1))
            r.engine.script.append(refuse(400, "invalid_request"))
            reply = await r.ask(chat())
            assert (reply.status, reply.error["code"]) == (400, "invalid_request")
            assert not r.engines[1].exchanges

    run(main())


def test_a_canary_gets_its_share_is_recorded_as_the_endpoint_and_loses_nothing_when_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2, queued_max=64) as r:
            own = endpoint(canary="acme/chat:canary", canary_permille=400)
            lane = endpoint(
                "acme/chat:canary", serves="acme/chat", fallback="acme/chat", resident=True, model="newer"
            )  # fmt: skip
            r.control.endpoints = (own, lane)
            await r.control.publish()
            await r.control.route(r.target(0, 8))
            await r.control.route(name="acme/chat:canary", state=EndpointState.LOADING)
            await until(lambda: "acme/chat:canary" in r.gateway.parts.room.endpoints, "the catalog")
            early = [await r.ask(chat()) for _ in range(12)]
            assert {reply.headers["x-tidegate-replica"] for reply in early} == {"r0"}, "the canary is not ready yet"
            assert all("x-tidegate-overflow" not in reply.headers for reply in early)

            await r.control.route(r.target(1, 8), name="acme/chat:canary")
            replies = [await r.ask(chat()) for _ in range(60)]
            share = sum(reply.headers["x-tidegate-replica"] == "r1" for reply in replies) / len(replies)
            assert 0.1 < share < 0.75, "two in five, by the digits of random ids"
            directly = await r.ask(chat(model="acme/chat:canary"))
            assert directly.headers["x-tidegate-replica"] == "r1"
            models = (await r.get("/v1/models")).json["data"]
            assert [model["id"] for model in models] == ["acme/chat"]

            r.control.endpoints = (endpoint(),)
            await r.control.publish()
            assert {(await r.ask(chat())).status for _ in range(10)} == {200}
            assert {record.endpoint for record in r.journal.final} == {"acme/chat"}
            assert {record.model for record in r.journal.final} == {"model-digest", "newer"}
            assert {record.overflow_from for record in r.journal.final} == {""}
            assert {record.outcome for record in r.journal.final} == {Outcome.COMPLETED}

    run(main())


def test_a_head_sent_while_it_waits_at_home_again_does_not_speak_of_the_other_endpoint(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, engines=2, hold_quiet_ms_max=50) as r:
            await hybrid(r, overflow=Overflow("acme/pool", above_concurrency=1))
            first = await r.client()
            await first.post("/v1/chat/completions", chat(stream=True, max_tokens=2, pause=0.4))
            await first.head()
            r.engines[1].script.append(refuse(429, "rate_limit_exceeded"))
            second = await r.client()
            await second.post("/v1/chat/completions", chat(stream=True, max_tokens=2))
            _, headers = await second.head()
            assert "x-tidegate-overflow" not in headers
            assert headers["x-tidegate-mode"] == "dedicated"
            while await second.chunk():
                continue
            while await first.chunk():
                continue
            await until(lambda: len(r.journal.final) == 2, "both records")
            assert {record.overflow_from for record in r.journal.final} == {""}

    run(main())
