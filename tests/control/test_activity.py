"""The audit log: what is noted is stored, streamed and bounded, also while the store is away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest
import uvicorn

from tests.control.world import ADMIN_SECRET, Clock, running
from tests.loop import on_loop, until
from tidegate.control import activity
from tidegate.control.activity import ActivityLog
from tidegate.control.api import build_app
from tidegate.domain.errors import Refusal, StoreFault
from tidegate.domain.ports import Activity, Change, State


class Store:
    """Keeps lines in memory; refuses while `away`."""

    def __init__(self) -> None:
        self.lines: list[Activity] = []
        self.away = False
        self.batches = 0

    def record(self, activity: Sequence[Activity]) -> None:
        if self.away:
            raise StoreFault("the audit log cannot be written")
        self.batches += 1
        self.lines.extend(activity)

    def activity(self, limit: int, subject: str | None = None) -> Sequence[Activity]:
        return [line for line in reversed(self.lines) if subject in (None, line.subject)][:limit]

    def load(self) -> State:
        raise AssertionError("the audit log only records and reads back")

    def commit(self, expected_version: int, change: Change) -> State:
        raise AssertionError("the audit log only records and reads back")


@on_loop
async def test_a_burst_is_written_in_few_batches_and_in_order() -> None:
    store = Store()
    log = ActivityLog(store, Clock())
    task = asyncio.create_task(log.run())
    for i in range(1_200):
        log.note("core", "wake", "a/b", str(i))
    await until(lambda: len(store.lines) == 1_200, "all written")
    assert [line.reason for line in store.lines] == [str(i) for i in range(1_200)]
    assert store.batches <= 4
    task.cancel()


@on_loop
async def test_what_is_read_includes_what_was_just_noted() -> None:
    log = ActivityLog(Store(), Clock())
    log.note("core", "wake", "a/b", "1")
    log.note("core", "wake", "a/c", "2")
    assert [line.reason for line in await log.newest(10)] == ["2", "1"]
    assert [line.reason for line in await log.newest(10, "a/b")] == ["1"]


@on_loop
async def test_while_the_store_is_away_lines_wait_bounded_and_the_oldest_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(activity, "PENDING_LINES_MAX", 10)
    monkeypatch.setattr(activity, "RETRY_MS", 1)
    store = Store()
    store.away = True
    log = ActivityLog(store, Clock())
    task = asyncio.create_task(log.run())
    for i in range(25):
        log.note("core", "wake", "a/b", str(i))
    await until(lambda: "not written" in caplog.text, "first failure")
    log.note("core", "wake", "a/b", "25")
    store.away = False
    await until(lambda: store.lines, "written at last")
    assert [line.reason for line in store.lines] == [str(i) for i in range(16, 26)]
    await until(lambda: "16 activity lines were lost" in caplog.text, "the loss is told")
    task.cancel()


@on_loop
async def test_what_is_pending_at_the_end_is_still_written() -> None:
    store = Store()
    log = ActivityLog(store, Clock())
    task = asyncio.create_task(log.run())
    await asyncio.sleep(0)
    log.note("core", "wake", "a/b", "last words")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert [line.reason for line in store.lines] == ["last words"]


@on_loop
async def test_a_slow_subscriber_is_ended_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "SUBSCRIBER_LINES_MAX", 3)
    log = ActivityLog(Store(), Clock())
    with log.subscribed() as slow, log.subscribed() as quick:
        seen = []
        for i in range(10):
            log.note("core", "wake", "a/b", str(i))
            seen.append((await anext(quick)).reason)
        assert seen == [str(i) for i in range(10)]
        assert [line.reason async for line in slow] == ["0", "1", "2"]


@on_loop
async def test_watchers_are_bounded_and_leave_room_when_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "SUBSCRIBERS_MAX", 1)
    log = ActivityLog(Store(), Clock())
    with log.subscribed(), pytest.raises(Refusal) as refused, log.subscribed():
        pass
    assert (refused.value.code, refused.value.limit and refused.value.limit.full) == ("capacity", 1)
    with log.subscribed():
        log.end_subscriptions()


@on_loop
async def test_one_watcher_too_many_is_refused_before_its_stream_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "SUBSCRIBERS_MAX", 1)
    async with running(tmp_path) as world:
        with world.control.activity.subscribed():
            refused = await world.http.get("/api/v1/activity/stream")
        assert refused.status_code == 503
        assert refused.json()["error"]["limit"] == {"kind": "capacity", "current": 1, "full": 1}
        assert refused.headers["retry-after"] == "5"


@on_loop
async def test_the_event_stream_over_a_socket_ends_with_its_client_and_with_the_platform(tmp_path: Path) -> None:
    """In-process ASGI buffers a stream whole, so this one goes over a real Unix socket."""
    async with running(tmp_path) as world:
        path = str(tmp_path / "a.sock")
        server = uvicorn.Server(uvicorn.Config(build_app(world.control), uds=path, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started, "server")
        subscribers = world.control.activity._subscribers
        transport = httpx.AsyncHTTPTransport(uds=path)
        headers = {"authorization": f"Bearer {ADMIN_SECRET}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://a", headers=headers) as http:
            async with http.stream("GET", "/api/v1/activity/stream") as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith(":")
                world.control.activity.note("core", "wake", "acme/tides", "because")
                told = [line async for line in _until_data(lines)]
                assert json.loads(told[-1][6:])["reason"] == "because"
            await until(lambda: not subscribers, "the client's end is noticed")
            _, mine = await world.tenant_key("acme")
            async with http.stream("GET", "/api/v1/activity/stream", headers=mine) as response:
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith(":")
                world.control.activity.note("core", "state", "zeta/stars", "foreign")
                world.control.activity.note("core", "drain", "acme/tides", "evict for=zeta/stars")
                world.control.activity.note("core", "state", "acme/tides", "mine")
                told = [line async for line in _until_data(lines)]
                assert [json.loads(line[6:])["reason"] for line in told if line.startswith("data")] == ["mine"]
            await until(lambda: not subscribers, "the client's end is noticed")
            async with http.stream("GET", "/api/v1/activity/stream") as response:
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith(":")
                world.control.activity.end_subscriptions()
                async with asyncio.timeout(5):
                    assert [line async for line in lines if line] == []
        server.should_exit = True
        await serving


async def _until_data(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        yield line
        if line.startswith("data: "):
            return
