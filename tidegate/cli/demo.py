"""`tidegate demo`: a guided minute of private endpoints on fewer accelerators, live swaps, and the bills."""

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from tidegate.cli.demo_story import Asked, Story, summary
from tidegate.cli.output import Format, Output, Problem, show

# endpoint -> the demo model behind it; one tenant each, so that every bill is somebody's own
ENDPOINTS = {"harbour/tides": "tides", "observatory/stars": "stars", "bakery/bread": "bread", "apiary/bees": "bees"}
ACCELERATOR_MEMORY, REPLICA_MEMORY = "64MiB", "40MiB"  # one fits, two do not
TRAFFIC_S = 40.0
BURST_REQUESTS_MAX = 4
PAUSE_S_MAX = 1.2
SETTLE_S_MAX = 10.0
LOAD_S_MAX = 30.0
LATE_S_MAX = 15.0
TRAFFIC_S_MIN = 8.0
DRAIN_S_MAX = 15.0


def demo(
    seconds: float = typer.Option(TRAFFIC_S, min=5, max=600, help="how long the traffic lasts"),
    seed: int = typer.Option(7, help="seed of the traffic"),
    output: Output = Format.TABLE,
) -> None:
    """A guided minute: spiky traffic on private endpoints, live swaps, then each tenant's bill. Ends by itself."""
    import uvloop

    from tidegate.assemble.sockets import StartError
    from tidegate.assemble.start import run_platform
    from tidegate.config import load
    from tidegate.domain.errors import Fault

    story = Story()
    with tempfile.TemporaryDirectory(prefix="tidegate-demo-") as folder:
        nothing = Path(folder) / "empty.toml"  # so that a tidegate.toml lying here does not change the story
        nothing.touch()
        config = load(nothing, _overrides(Path(folder)))

        async def main() -> None:
            stop = asyncio.Event()
            ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            telling = asyncio.create_task(_tell(story, ready, stop, seconds, seed, output))
            try:
                await run_platform(config, None, ready.set_result, stop)
            finally:
                telling.cancel()
                await asyncio.wait({telling})
            if not telling.cancelled():
                telling.result()

        try:
            uvloop.run(main())
        except (StartError, Fault) as error:
            raise Problem(str(error)) from None
    if not story.over:
        raise Problem("the demo was interrupted")
    _finish(story, output)


def _overrides(folder: Path) -> dict[str, Any]:
    from tidegate import demo_models

    return {
        "port": 0,
        "data_dir": folder,
        "demo": False,
        "accelerators": {"kind": "cpu", "count": 2, "memory": ACCELERATOR_MEMORY},
        "tenants": [{"id": name.split("/")[0]} for name in ENDPOINTS],
        "endpoints": [
            {"name": name, "model": str(demo_models.path(model)), "accelerator_memory": REPLICA_MEMORY}
            for name, model in ENDPOINTS.items()
        ],
    }


async def _tell(
    story: Story, ready: asyncio.Future[dict[str, Any]], stop: asyncio.Event, seconds: float, seed: int, output: Format
) -> None:
    """The minute itself: waits for the platform, makes traffic, watches it, fetches the bills, ends the platform."""
    import httpx

    from tidegate.cli.demo_view import shown

    if output is Format.TABLE:
        typer.echo("starting a platform of two accelerators, each with room for one of four private endpoints ...")
    try:
        started = await ready
        headers = {"authorization": f"Bearer {started['admin_key']}"}
        async with httpx.AsyncClient(base_url=started["base_url"], headers=headers, timeout=60) as admin:
            await _loaded_once(admin)
            # A slow machine gets a shorter story, not a longer minute.
            seconds = max(min(seconds, story.began + seconds + LATE_S_MAX - time.monotonic()), TRAFFIC_S_MIN)
            story.began = time.monotonic()
            keys = {endpoint: await _key(admin, endpoint) for endpoint in ENDPOINTS}
            async with shown(story, seconds, quiet=output is Format.JSON):
                watching = asyncio.create_task(_watch(admin, story))
                try:
                    await _traffic(started["base_url"], keys, story, seconds, random.Random(seed))
                finally:
                    watching.cancel()
                await _look(admin, story)
            story.invoices = await _bills(admin, story)
        story.over = True
    finally:
        stop.set()


async def _loaded_once(admin: Any) -> None:
    """Until every model has been on an accelerator once: from then on they only sleep and wake."""
    deadline = time.monotonic() + LOAD_S_MAX
    while time.monotonic() < deadline:
        states = [endpoint["state"] for endpoint in (await admin.get("/api/v1/endpoints")).json()["data"]]
        if not {"creating", "loading"} & set(states):
            return
        await asyncio.sleep(0.1)


async def _key(admin: Any, endpoint: str) -> str:
    answer = await admin.post("/api/v1/keys", json={"tenant": endpoint.split("/")[0]})
    answer.raise_for_status()
    return str(answer.json()["secret"])


async def _traffic(url: str, keys: dict[str, str], story: Story, seconds: float, dice: random.Random) -> None:
    """Bursts: one endpoint is suddenly asked several things at once, then another; two at a time now and then."""
    import httpx

    running: set[asyncio.Task[None]] = set()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while time.monotonic() - story.began < seconds:
            for endpoint in dice.sample(sorted(keys), dice.choice((1, 1, 2))):
                for _ in range(dice.randint(1, BURST_REQUESTS_MAX)):
                    running.add(asyncio.create_task(_ask(client, keys[endpoint], endpoint, story, dice)))
            await asyncio.sleep(dice.uniform(0.2, PAUSE_S_MAX))
            running = {task for task in running if not task.done()}
        if running:
            await asyncio.wait(running, timeout=DRAIN_S_MAX)


async def _ask(client: Any, key: str, endpoint: str, story: Story, dice: random.Random) -> None:
    """One streamed question; who answered is told by the answer itself."""
    import json

    import httpx

    from tidegate import demo_models

    asked = Asked(endpoint, question=dice.choice(demo_models.QUESTIONS[ENDPOINTS[endpoint]]))
    body = {
        "model": endpoint,
        "messages": [{"role": "user", "content": asked.question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 100,
    }
    story.in_flight += 1
    began = time.monotonic()
    try:
        headers = {"authorization": f"Bearer {key}"}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                asked.failed = str(response.status_code)
                return
            asked.held_ms = int(response.headers.get("x-tidegate-queue-ms", "0"))
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    asked.ttft_ms = asked.ttft_ms or (time.monotonic() - began) * 1000
                    event = json.loads(line[6:])
                    if "error" in event:
                        asked.failed = str(event["error"].get("code"))
                    for choice in event.get("choices", ()):
                        asked.answer += choice["delta"].get("content") or ""
        asked.right = demo_models.recognise(asked.answer) == ENDPOINTS[endpoint]
    except httpx.TransportError as error:
        asked.failed = type(error).__name__
    finally:
        story.in_flight -= 1
        story.asked.append(asked)


async def _watch(admin: Any, story: Story) -> None:
    while True:
        await _look(admin, story)
        await asyncio.sleep(0.3)


async def _look(admin: Any, story: Story) -> None:
    answers = [await admin.get(f"/api/v1/{what}") for what in ("nodes", "endpoints", "activity?limit=200")]
    story.nodes, story.endpoints, lines = (answer.json()["data"] for answer in answers)
    known = {(line["at_ms"], line["kind"], line["subject"]) for line in story.activity}
    fresh = [line for line in lines if (line["at_ms"], line["kind"], line["subject"]) not in known]
    story.activity = (fresh + story.activity)[:400]
    story.swaps += sum(line["actor"] == "core" and line["kind"] == "wake" for line in fresh)


async def _bills(admin: Any, story: Story) -> list[dict[str, Any]]:
    """Each tenant's invoice, once the ledger has every answered request (it follows within a second)."""
    deadline = time.monotonic() + SETTLE_S_MAX
    answered = sum(not asked.failed for asked in story.asked)
    while time.monotonic() < deadline:
        report = (await admin.get("/api/v1/usage", params={"by": "tenant"})).json()
        if report["total"]["billed_requests"] >= answered:
            break
        await asyncio.sleep(0.2)
    invoices: list[dict[str, Any]] = (await admin.get("/api/v1/invoices")).json()["data"]
    return invoices


def _finish(story: Story, output: Format) -> None:
    result = summary(story)
    if output is Format.JSON:
        show(result, output)
    else:
        from tidegate.cli.demo_view import closing

        closing(result)
    if result["failed"] or result["by_the_right_model"] != result["answered"] or not result["answered"]:
        raise Problem("not every question was answered by the right model")
