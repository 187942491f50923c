"""Advice from a running platform: its own traffic, its own prices, its own bill to the cent."""

import asyncio
import json
from typing import Any

import pytest

from tests.assemble.live import Live, billed, chat, until
from tests.assemble.test_verbs import as_json, tidegate
from tidegate.domain.units import nano_usd

pytestmark = pytest.mark.e2e


async def use(live: Live, requests: int = 6) -> None:
    async with live.client() as api, live.client("admin_key") as admin:
        for k in range(requests):
            answer = await api.post("/v1/chat/completions", json=chat(f"acme/{('tides', 'stars')[k % 2]}", 3 + k))
            assert answer.status_code == 200, answer.text
            await asyncio.sleep(0.02)
        await until(lambda: billed(admin, requests))


def test_advice_agrees_with_the_invoice_to_the_cent(run: Any) -> None:
    async def story(live: Live) -> None:
        await use(live)
        answer = await as_json(live, "advise")
        assert answer["shape"]["requests"] == 6
        assert answer["measured"]["requests"] == 6
        bill = answer["bill"]
        [invoice] = [i for i in await as_json(live, "invoices") if i["tenant"] == "acme"]
        charged = [line for line in invoice["lines"] if line["item"].endswith("_tokens")]
        assert charged
        assert bill["agrees"]
        # Not only to the cent: to the nano-dollar, from the requests and the price book alone.
        assert bill["advised_nano_usd"] == sum(line["nano_usd"] for line in charged)
        assert sum(nano_usd(line["usd"]) for line in charged) == bill["token_lines_nano_usd"]
        # The replay at the live price says the same of the span it saw, in dollars.
        row = next(o for o in answer["offers"] if o["offer"] == "tidegate/dedicated-serverless")
        months = answer["shape"]["span_hours"] / 730
        assert row["monthly_usd"] * months == pytest.approx(bill["token_lines_nano_usd"] / 1e9, abs=0.005)
        assert answer["recommended"] in {m["mode"] for m in answer["modes"] if m["feasible"]}

    run(story)


def test_a_tenant_sees_its_own_and_bad_questions_are_refused(run: Any) -> None:
    async def story(live: Live) -> None:
        async with live.client() as api, live.client("admin_key") as admin:
            few = await admin.get("/api/v1/advice")
            assert few.status_code == 400
            assert "at least 2 are needed" in few.json()["error"]["message"]
            await use(live, 4)
            own = await api.get("/api/v1/advice", params={"endpoint": "acme/tides", "provider": "tidegate"})
            assert own.status_code == 200, own.text
            assert own.json()["shape"]["requests"] == 2
            assert {o["provider"] for o in own.json()["offers"]} == {"tidegate"}
            wrong = (
                "colour=red",
                "private=maybe",
                "slo_ttft_ms=soon",
                "model=gpt",
                "provider=nobody",
                "endpoint=acme/none",
            )
            for query in wrong:
                word = query.partition("=")[0]
                refused = await admin.get(f"/api/v1/advice?{query}")
                assert refused.status_code == 400, (query, refused.text)
                assert word in refused.json()["error"]["message"]

    run(story)


def test_advice_for_a_described_shape_and_for_a_sent_trace(run: Any) -> None:
    async def story(live: Live) -> None:
        async with live.client("admin_key") as admin:
            body: dict[str, Any] = {"shape": "business-hours", "requests_per_day": 500, "provider": ["tidegate"]}
            answer = await admin.post("/api/v1/advice", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["shape"]["kind"] == "business-hours"
            rows = "\n".join(f"{k},acme/tides,100,10" for k in range(50))
            sent = {"csv": f"t_s,endpoint,input_tokens,output_tokens\n{rows}", "provider": ["tidegate"]}
            answer = await admin.post("/api/v1/advice", json=sent)
            assert answer.json()["shape"]["requests"] == 50
            for wrong, word in (
                ({}, "shape"),
                ({"shape": "flat"}, "shape"),
                ({"csv": "t_s\n1"}, "input"),
                ({"x": 1}, "x"),
                ({"shape": "steady", "requests_per_day": "many"}, "requests_per_day"),
                ({"shape": "steady", "provider": "tidegate"}, "provider"),
                ({"shape": "steady", "private": 1}, "private"),
                ({"shape": ["steady"]}, "shape"),
                ({"shape": "steady", "models": 0}, "models"),
                ({"shape": "steady", "input_tokens": -4}, "input_tokens"),
                ({"shape": "steady", "async_share": 7}, "async_share"),
                ({"shape": "steady", "slo_ttft_ms": -1}, "slo_ttft_ms"),
                ({"shape": "steady", "requests_per_day": 1e18}, "requests_per_day"),
            ):
                refused = await admin.post("/api/v1/advice", json=wrong)
                assert refused.status_code == 400, (wrong, refused.text)
                assert word.replace("_", "-") in refused.json()["error"]["message"].replace("_", "-")
            assert (await admin.post("/api/v1/advice", content=b"[")).status_code == 400

    run(story)


def test_watch_measures_what_the_articles_ask_for(run: Any) -> None:
    async def story(live: Live) -> None:
        await use(live)
        out, _ = await tidegate(live, "advise", "--watch", "--every-s", "0.2", "--days", "0.00015", "-o", "json")
        lines = [json.loads(line) for line in out.splitlines()]
        assert len(lines) >= 2
        assert lines[0]["requests"] == 6
        assert lines[0]["accelerator_ms_per_request"] > 0
        assert 0 <= lines[0]["cold_share"] <= 1
        assert lines[1]["changed_from"] is None

    run(story)
