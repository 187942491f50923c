"""Files and batches on a whole platform, asked by the official OpenAI SDK, unmodified."""

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.assemble.live import Live, Story, until

URL = "/v1/chat/completions"


def line(number: int, model: str = "tides", **changes: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": f"secret-{number}"}], "max_tokens": 3}
    return {"custom_id": f"id-{number}", "method": "POST", "url": URL, "body": body} | changes


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def sdk(live: Live, key: str = "api_key") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=live.ready["base_url"] + "/v1", api_key=live.ready[key], max_retries=0)


async def upload(client: openai.AsyncOpenAI, data: bytes, name: str = "in.jsonl", **more: Any) -> Any:
    return await client.files.create(file=(name, io.BytesIO(data)), purpose="batch", **more)


async def ended(client: openai.AsyncOpenAI, batch_id: str, *statuses: str) -> Any:
    found: list[Any] = []

    async def check() -> bool:
        found.append(await client.batches.retrieve(batch_id))
        return found[-1].status in (statuses or ("completed", "failed", "expired", "cancelled"))

    await until(check)
    return found[-1]


def test_a_batch_from_upload_to_results(run: Callable[[Story], None]) -> None:
    async def story(live: Live) -> None:
        async with sdk(live) as client, live.client("admin_key") as admin:
            lines = [line(number) for number in range(40)]
            lines[7]["body"]["max_tokens"] = "many"
            file = await upload(client, jsonl(*lines), expires_after={"anchor": "created_at", "seconds": 3600})
            assert (file.purpose, file.filename, file.status) == ("batch", "in.jsonl", "processed")
            assert file.expires_at == file.created_at + 3600
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"job": "nightly"}
            )
            assert (batch.status, batch.object, batch.expires_at) == ("validating", "batch", batch.created_at + 86_400)
            done = await ended(client, batch.id)
            assert done.status == "completed", done
            assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 39, 1)
            assert done.metadata == {"job": "nightly"}
            assert done.model == "acme/tides"
            results = [json.loads(each) for each in (await client.files.content(done.output_file_id)).text.splitlines()]
            assert sorted(r["custom_id"] for r in results) == sorted(f"id-{n}" for n in range(40) if n != 7)
            assert all(r["response"]["status_code"] == 200 and r["error"] is None for r in results)
            assert {r["response"]["body"]["usage"]["completion_tokens"] for r in results} == {3}
            refused = json.loads((await client.files.content(done.error_file_id)).text)
            assert (refused["custom_id"], refused["response"]["status_code"]) == ("id-7", 400)
            assert done.usage.output_tokens == 39 * 3
            assert [b.id async for b in client.batches.list()] == [batch.id]
            assert {f.id async for f in client.files.list()} == {file.id, done.output_file_id, done.error_file_id}
            assert [f.id async for f in client.files.list(purpose="batch")] == [file.id]

            async def billed() -> bool:
                usage = (await admin.get("/api/v1/usage", params={"by": "mode"})).json()
                rows = {row["group"]: row for row in usage["rows"]}
                return "batch" in rows and rows["batch"]["billed_requests"] == 39

            await until(billed)
            usage = (await admin.get("/api/v1/usage", params={"by": "endpoint"})).json()
            assert [row["group"] for row in usage["rows"]] == ["acme/tides"]  # never the lane's own name
            scrape = (await admin.get("/metrics")).text
            assert 'tidegate_batch_lines_total{endpoint="acme/tides",outcome="answered"} 39.0' in scrape
            with pytest.raises(openai.ConflictError, match="'completed'"):
                await client.batches.cancel(batch.id)
            for each in (file.id, done.output_file_id):
                assert (await client.files.delete(each)).deleted
                with pytest.raises(openai.NotFoundError):
                    await client.files.content(each)
            assert [m.id async for m in client.models.list()] == ["acme/bread", "acme/stars", "acme/tides"]
        for path in (live.data).rglob("*"):
            assert path.is_dir() or path.is_socket() or b"secret-" not in path.read_bytes(), path

    run(story)


def test_what_is_wrong_with_lines_is_said_with_their_numbers(run: Callable[[Story], None]) -> None:
    async def story(live: Live) -> None:
        async with sdk(live) as client:
            bad = [line(1), line(1), line(3, url="/v1/embeddings"), line(4, "other/secret"), line(5, body=None)]
            file = await upload(client, jsonl(*bad) + b"not json\n")
            failed = await ended(
                client,
                (await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")).id,
            )
            assert failed.status == "failed"
            assert failed.failed_at
            assert [(e.line, e.code, e.param) for e in failed.errors.data] == [
                (2, "duplicate_custom_id", "custom_id"),
                (3, "invalid_url", "url"),
                (4, "model_not_found", "body.model"),
                (5, "missing_required_parameter", "body"),
                (6, "invalid_json_line", None),
            ]
            assert "secret-" not in failed.model_dump_json()
            create = client.batches.create
            for wrong, field in (
                ({"endpoint": "/v1/rerank"}, "endpoint"),
                ({"completion_window": "1h"}, "completion_window"),
                ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
            ):
                with pytest.raises(openai.BadRequestError) as refused:
                    await create(**({"input_file_id": file.id, "endpoint": URL, "completion_window": "24h"} | wrong))  # type: ignore[arg-type]
                assert refused.value.param == field
            with pytest.raises(openai.NotFoundError):
                await create(input_file_id="file-none", endpoint=URL, completion_window="24h")
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve("batch_none")

    run(story)


def test_uploads_that_are_none(run: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(live: Live) -> None:
        async with sdk(live) as client, sdk(live, "admin_key") as admin, live.client() as http:
            with pytest.raises(openai.BadRequestError, match="Must be"):
                await upload(client, b"a,b", "table.csv")
            with pytest.raises(openai.BadRequestError, match="purpose"):
                await client.files.create(file=("x.jsonl", b"{}"), purpose="fine-tune")
            with pytest.raises(openai.PermissionDeniedError):
                await upload(admin, b"{}")
            with pytest.raises(openai.AuthenticationError):
                await upload(client.with_options(api_key="nobody"), b"{}")
            form = {"content-type": "multipart/form-data; boundary=b"}
            half = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n{}'
            for body, kind in ((half, form), (b"plain", {}), (b"--b--\r\n", form)):
                answer = await http.post("/v1/files", content=body, headers=kind)
                assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
            reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(live.ready["base_url"]).port)
            head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {live.ready['api_key']}\r\n"
            writer.write(f"{head}content-length: {201 << 20}\r\n\r\n".encode())
            assert b" 413 " in await reader.readline()  # before a byte of it was sent
            writer.close()
            monkeypatch.setattr("tidegate.batch.upload.FILE_BYTES_MAX", 100_000)
            with pytest.raises(openai.APIStatusError) as too_large:
                await upload(client, b"x" * 300_000)
            assert (too_large.value.status_code, too_large.value.code) == (413, "body_too_large")
            assert [f async for f in client.files.list()] == []
            assert list((live.data / "batch").iterdir()) == []

    run(story)


def test_a_cancelled_batch_keeps_what_is_finished(run: Callable[[Story], None]) -> None:
    async def story(live: Live) -> None:
        async with sdk(live) as client:
            file = await upload(client, jsonl(*(line(n) for n in range(2_000))))
            batch = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")

            async def some() -> bool:
                counts = (await client.batches.retrieve(batch.id)).request_counts
                return counts is not None and counts.completed > 5

            await until(some)
            with pytest.raises(openai.ConflictError):
                await client.files.delete(file.id)
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            done = await ended(client, batch.id)
            assert done.status == "cancelled"
            with pytest.raises(openai.ConflictError, match="'cancelled'"):
                await client.batches.cancel(batch.id)
            texts = [(await client.files.content(i)).text for i in (done.output_file_id, done.error_file_id)]
            answered, cancelled = ([json.loads(each) for each in text.splitlines()] for text in texts)
            assert len(answered) == done.request_counts.completed > 5
            assert sorted(r["custom_id"] for r in answered + cancelled) == sorted(f"id-{n}" for n in range(2_000))
            assert {r["error"]["code"] for r in cancelled} == {"batch_cancelled"}

    run(story)
