"""Jobs in RunPod's and Replicate's shapes on a whole platform (stand-in engine)."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.assemble.live import Live, Story, until
from tidegate.domain.errors import Refusal
from tidegate.wire.batch import LineFault, LineResponse, Status, StoredBatch
from tidegate.wire.jobs import Line, prediction_call, prediction_view, run_call, run_view

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "sampling_params": {"max_tokens": 3}}


def test_runpods_jobs(run: Callable[[Story], None]) -> None:
    async def story(live: Live) -> None:
        async with live.client() as http, live.client("admin_key") as admin:
            waited = (await http.post("/v2/tides/runsync", json={"input": CHAT})).json()
            assert waited["status"] == "COMPLETED"
            assert waited["output"]["usage"]["completion_tokens"] == 3
            started = (await http.post("/v2/tides/run", json={"input": CHAT})).json()
            assert started["status"] == "IN_QUEUE"

            async def completed() -> bool:
                said = (await http.get(f"/v2/tides/status/{started['id']}")).json()
                return said["status"] == "COMPLETED" and "executionTime" in said and bool(said["output"])

            await until(completed)
            wrong = CHAT | {"sampling_params": {"max_tokens": "many"}}
            refused = await http.post("/v2/tides/run", json={"input": wrong})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
            health = (await http.get("/v2/tides/health")).json()
            assert health["jobs"] == {"inQueue": 0, "inProgress": 0, "completed": 2, "failed": 0}
            assert (await http.post(f"/v2/tides/cancel/{started['id']}")).status_code == 409
            assert (await http.get("/v2/tides/status/batch_none")).status_code == 404
            assert (await http.post("/v2/unknown/run", json={"input": CHAT})).json()["error"][
                "code"
            ] == "model_not_found"
            hooked = await http.post("/v2/tides/run", json={"input": CHAT, "webhook": "http://169.254.169.254/"})
            assert (hooked.status_code, hooked.json()["error"]["param"]) == (400, "webhook")
            assert (await admin.post("/v2/tides/run", json={"input": CHAT})).status_code == 403
            assert (await http.post("/v2/tides/runsync?wait=soon", json={"input": CHAT})).status_code == 400

    run(story)


def test_replicates_predictions(run: Callable[[Story], None]) -> None:
    async def story(live: Live) -> None:
        async with live.client() as http:
            asked = {"model": "acme/tides", "input": {"prompt": "hi", "system_prompt": "be brief", "max_new_tokens": 2}}
            made = await http.post("/v1/predictions", json=asked, headers={"prefer": "wait"})
            assert made.status_code == 201
            said = made.json()
            assert (said["status"], said["error"], said["model"]) == ("succeeded", None, "acme/tides")
            assert said["output"]["usage"]["completion_tokens"] == 2
            assert said["completed_at"] >= said["started_at"] >= said["created_at"]
            again = (await http.get(said["urls"]["get"])).json()
            assert again == said
            later = (await http.post("/v1/predictions", json=asked)).json()
            assert later["status"] == "starting"
            cancelled = await http.post(later["urls"]["cancel"])
            assert cancelled.status_code in (200, 409), "it may have ended before"
            assert (await http.post("/v1/predictions", json={"input": {}})).json()["error"]["param"] == "model"

    run(story)


def test_what_is_asked_in_their_words() -> None:
    url, body = run_call("chat", {"openai_route": "/v1/embeddings", "openai_input": {"model": "x", "input": "text"}})
    assert (url, json.loads(body)) == ("/v1/embeddings", {"model": "chat", "input": "text"})
    url, body = run_call("chat", {"prompt": "hi", "sampling_params": {"temperature": 0}})
    assert (url, json.loads(body)) == ("/v1/completions", {"model": "chat", "prompt": "hi", "temperature": 0})
    url, body = prediction_call("chat", {"prompt": "hi", "stop_sequences": ["x"]})
    turns = [{"role": "user", "content": "hi"}]
    assert (url, json.loads(body)) == ("/v1/chat/completions", {"model": "chat", "stop": ["x"], "messages": turns})
    for wrong in ({}, {"openai_route": "/v1/files", "openai_input": {}}, {"prompt": "x", "sampling_params": 3}):
        with pytest.raises(Refusal) as refused:
            run_call("chat", wrong)
        assert refused.value.code == "invalid_request"


def test_a_job_whose_line_was_refused_has_failed_though_its_batch_has_not() -> None:
    batch = StoredBatch(
        id="batch_1",
        tenant="acme",
        key="k",
        url="/v1/completions",
        input_file_id="file-1",
        completion_window="24h",
        created_ms=1_000,
        expires_ms=2_000,
        status=Status.COMPLETED,
        in_progress_ms=1_200,
        ended_ms=1_500,
    )
    refused = LineResponse(400, "req", msgspec.Raw(b'{"error": {"message": "too long"}}'))
    said = run_view(batch, Line(response=refused))
    assert said == {"id": "batch_1", "status": "FAILED", "delayTime": 200, "executionTime": 300, "error": "too long"}
    late = msgspec.structs.replace(batch, status=Status.EXPIRED)
    expired = Line(error=LineFault("batch_expired", "not within the window"))
    assert (run_view(late, expired)["status"], run_view(late, expired)["error"]) == (
        "TIMED_OUT",
        "not within the window",
    )
    prediction = prediction_view(batch, Line(response=refused))
    assert (prediction["status"], prediction["error"], prediction["output"]) == ("failed", "too long", None)
    assert prediction["started_at"] == "1970-01-01T00:00:01.200000+00:00"
