"""Batch beside a real-time endpoint on one accelerator, with real engines: it stands still while the other streams,
keeps what it began, and ends with the platform even so.
"""

import contextlib
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("torch")
from bench import batch
from tests.e2e.platform import Platform, running, wait_until

pytestmark = pytest.mark.e2e

BOTH_FIT = "120MiB"
LINES = 150


def still(platform: Platform) -> set[int]:
    """Engines that stand still now."""
    found = set()
    for engine in platform.engines():
        with contextlib.suppress(psutil.NoSuchProcess):
            if engine.status() == psutil.STATUS_STOPPED:
                found.add(engine.pid)
    return found


def stream(platform: Platform, client: httpx.Client, tokens: int) -> set[int]:
    """Engines seen standing still during one answer of `acme/live`."""
    seen: set[int] = set()
    body = {"model": "live", "prompt": "the water", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with client.stream("POST", batch.URL, json=body) as response:
        assert response.status_code == 200, response.read()
        for _ in response.iter_lines():
            seen |= still(platform)
    return seen


def test_batch_stands_still_while_a_neighbour_streams(tmp_path: Path) -> None:
    with running(tmp_path, config=batch._config(1, BOTH_FIT)) as platform:
        key = batch._apply(platform, "live", "bulk")
        with batch._client(platform, key) as client:
            stream(platform, client, 4)
            batch_id = batch._submit(client, batch._lines(LINES, 24, 1))
            batch._until_batch_runs(platform, client, batch_id)
            engines = {engine.pid for engine in platform.engines()}
            seen = stream(platform, client, 150)
            assert len(seen) == 1, "the lane's engine, and no other"
            wait_until(lambda: not still(platform), "it goes on", 10)
            assert {engine.pid for engine in platform.engines()} == engines, "it kept its place"
            ended = batch._ended(client, batch_id)
            assert (ended["request_counts"]["completed"], ended["request_counts"]["failed"]) == (LINES, 0)
            assert ended["usage"]["output_tokens"] == LINES * 24


def test_who_stands_still_when_the_platform_dies_does_not_stay(tmp_path: Path) -> None:
    with (
        contextlib.suppress(ProcessLookupError),
        running(tmp_path, config=batch._config(1, BOTH_FIT)) as platform,
    ):
        key = batch._apply(platform, "live", "bulk")
        with batch._client(platform, key) as client:
            stream(platform, client, 4)
            batch_id = batch._submit(client, batch._lines(5_000, 24, 1))
            batch._until_batch_runs(platform, client, batch_id)
            body = {"model": "live", "prompt": "the water", "max_tokens": 200, "ignore_eos": True, "stream": True}
            with contextlib.suppress(httpx.TransportError), client.stream("POST", batch.URL, json=body) as response:
                for _ in response.iter_lines():
                    if found := still(platform):
                        break
                else:
                    pytest.fail("it never stood still")
                (engine,) = found
                process = psutil.Process(engine)
                platform.process.kill()
                platform.process.wait(10)
            wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "its end", 20)
