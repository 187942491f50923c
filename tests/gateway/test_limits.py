"""Limits at a real gateway's door: what passes, what a client is told, what control is told."""

import json
from pathlib import Path

from tests.gateway.engine import hang
from tests.gateway.rig import ENDPOINTS, KEY, KEYS, Rig, chat, endpoint, rig, run
from tests.loop import until
from tests.money import price, usage
from tidegate.domain.endpoint import Mode, Overflow
from tidegate.domain.limits import Budget, Lease, Limits, Scope, Spending, Window
from tidegate.gateway.intake import Call
from tidegate.gateway.limiting import Limiter
from tidegate.quota.windows import bounds
from tidegate.wire.internal import BudgetLeases, BudgetUse, Catalog, Gateways, PriceList
from tidegate.wire.openai import parse_head

MINE = f"key-{KEY}"


async def limited(made: Rig, *limits: Limits) -> None:
    made.control.version += 1
    await made.control.links[-1].send(Catalog(made.control.version, KEYS, ENDPOINTS, limits=limits))
    await until(lambda: made.gateway.parts.room.limiter.gate.active, "the limits")


def test_a_rate_is_kept_and_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as made:
            assert not [name for name in (await made.ask(chat())).headers if name.startswith("x-ratelimit")]
            rates = Limits(Scope.KEY, MINE, requests_per_minute=2, tokens_per_minute=10_000)
            await limited(made, rates)
            first = await made.ask(chat(max_tokens=100))
            assert (first.status, first.headers["x-ratelimit-limit-requests"]) == (200, "2")
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            assert int(first.headers["x-ratelimit-remaining-tokens"]) < 10_000 - 100
            await made.ask(chat())
            no = await made.ask(chat())
            assert (no.status, no.error["code"], no.error["limit"]) == (
                429, "rate_limit_exceeded", {"kind": "rpm", "current": 2, "full": 2},
            )  # fmt: skip
            assert 1 <= int(no.headers["retry-after"]) <= 30
            assert no.headers["x-ratelimit-remaining-requests"] == "0"

    run(main())


def test_concurrency_is_free_again_when_a_stream_ends_however_it_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as made:
            await limited(made, Limits(Scope.ENDPOINT, "acme/chat", concurrency=1))
            made.engine.script.append(hang)
            client = await made.client()
            await client.post("/v1/chat/completions", chat(stream=True))
            await until(lambda: made.gateway.parts.relays, "the stream to run")
            no = await made.ask(chat())
            assert (no.status, no.error["limit"]["kind"]) == (429, "concurrency")
            client.hang_up()
            await until(lambda: not made.gateway.parts.relays, "the stream to end")
            assert (await made.ask(chat())).status == 200

    run(main())


def test_a_budget_is_reserved_settled_and_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as made:
            now_ms = made.gateway.parts.clock.now_ms()
            of = Spending(Scope.TENANT, "acme", Window.MONTH, 5, bounds(Window.MONTH, now_ms)[0])
            full = 1_500_000
            await limited(made, Limits(Scope.TENANT, "acme", budgets=(Budget(Window.MONTH, full, 5),)))
            unknown = await made.ask(chat(max_tokens=4))
            assert (unknown.status, unknown.error["code"]) == (503, "budget_unavailable")
            link = made.control.links[-1]
            await link.send(PriceList((price(input_nano_usd=200, output_nano_usd=800),)))
            await link.send(BudgetLeases(1, 60_000, (Lease(of, full),)))

            def used() -> list[BudgetUse]:
                return [m for m in made.control.messages if isinstance(m, BudgetUse) and m.number == 1]

            await until(lambda: used(), "control to be told")
            assert (await made.ask(chat(max_tokens=4))).status == 200
            record = made.journal.final[-1]
            cost = (record.input_tokens - record.cached_tokens) * 200 + record.cached_tokens * 20
            cost += record.output_tokens * 800
            await until(lambda: used()[-1].leases == (Lease(of, full, cost),), "what it really cost")
            no = await made.ask(chat())
            assert (no.status, no.error["code"], no.error["limit"]) == (
                429, "insufficient_quota", {"kind": "budget", "current": cost, "full": full},
            )  # fmt: skip
            assert no.headers["x-should-retry"] == "false", "2,048 tokens of context could cost more than is left"
            assert (await made.ask(chat(max_tokens=4))).status == 200

    run(main())


def test_gateways_share_a_rate(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as made:
            await limited(made, Limits(Scope.TENANT, "acme", requests_per_minute=6))
            await made.control.links[-1].send(Gateways(3))
            await until(lambda: made.gateway.parts.room.limiter.gate.gateways == 3, "the number of gateways")
            assert (await made.ask(chat())).headers["x-ratelimit-limit-requests"] == "2"

    run(main())


def test_where_a_request_may_overflow_the_dearest_place_is_reserved() -> None:
    now_ms = 1_800_000_000_000
    to = endpoint("house/common", shared=True, mode=Mode.SERVERLESS, price_plan="dear")
    called = endpoint(overflow=Overflow("house/common", above_concurrency=1))
    limiter = Limiter("g")
    limiter.prices([price(), price(id=2, plan="dear", input_nano_usd=0, output_nano_usd=5_000)])
    limiter.rules((Limits(Scope.KEY, "k", budgets=(Budget(Window.TOTAL, 10**12),)),), {"house/common": to}, now_ms)
    of = Spending(Scope.KEY, "k", Window.TOTAL, 0, 0)
    limiter.leased(BudgetLeases(1, 1_000, (Lease(of, 10**12),)), now_ms)
    body = json.dumps(chat(max_tokens=1_000)).encode()
    call = Call("r", "chat/completions", "k", "acme", called, body, False, False, now_ms, 0)
    hold = limiter.admit(call, parse_head(body))
    assert hold is not None
    assert hold.cost_nano_usd == 1_000 * 5_000 + (len(body) + 256) * 20, "cached input, at its own price"
    limiter.settle(hold, usage("r", key="k", endpoint="house/common", input_tokens=0, output_tokens=10))
    assert limiter.use().leases == (Lease(of, 10**12, 50_000),)
