"""What the guided minute looks like: a live picture on a terminal, a line now and then where there is none."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tidegate.cli.demo_story import Story
from tidegate.cli.output import size

FRAME_S = 0.2
LINE_S = 5.0
FEED_LINES = 7
STYLES = {"ready": "bold green", "idle": "green", "waking": "yellow", "loading": "yellow", "failed": "bold red"}
KINDS = {"wake": "yellow", "start": "yellow", "drain": "magenta", "sleep": "blue"}


@asynccontextmanager
async def shown(story: Story, seconds: float, *, quiet: bool) -> AsyncIterator[None]:
    """Draws `story` until the block ends."""
    console = Console()
    if quiet:
        yield
        return
    draw = _live if console.is_terminal else _lines
    drawing = asyncio.create_task(draw(console, story, seconds))
    try:
        yield
    finally:
        drawing.cancel()
        await asyncio.wait({drawing})


async def _live(console: Console, story: Story, seconds: float) -> None:
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            live.update(_picture(story, seconds), refresh=True)
            await asyncio.sleep(FRAME_S)


async def _lines(console: Console, story: Story, seconds: float) -> None:
    while True:
        await asyncio.sleep(LINE_S)
        spent = time.monotonic() - story.began
        where = "; ".join(_residents(a) for node in story.nodes for a in node["accelerators"])
        console.print(
            f"{spent:3.0f} s of {seconds:.0f}: {len(story.asked)} answered, {story.swaps} swaps | {where}",
            markup=False,
            soft_wrap=True,
        )


def _residents(accelerator: dict[str, Any]) -> str:
    inside = [f"{r['endpoint']} {r['state']}" for r in accelerator["residents"]]
    return f"{accelerator['id']}: {', '.join(inside) or 'free'}"


def _picture(story: Story, seconds: float) -> Group:
    spent = min(time.monotonic() - story.began, seconds)
    head = Text(f"{spent:3.0f} of {seconds:.0f} s   {len(story.asked)} questions answered, {story.in_flight} running, ")
    head.append(f"{story.swaps} swaps", style="bold yellow")
    return Group(head, _accelerators(story), _endpoints(story), _feed(story))


def _accelerators(story: Story) -> Panel:
    table = Table(box=None, pad_edge=False)
    for column in ("accelerator", "memory", "reserved", "resident now"):
        table.add_column(column)
    for node in story.nodes:
        for accelerator in node["accelerators"]:
            inside = Text()
            for resident in accelerator["residents"]:
                inside.append(f"{resident['endpoint']} ({resident['state']})  ", STYLES.get(resident["state"], "dim"))
            reserved = size(accelerator["reserved_bytes"])
            table.add_row(accelerator["id"], size(accelerator["memory_bytes"]), reserved, inside or Text("free", "dim"))
    return Panel(table, title="two accelerators", title_align="left", border_style="dim")


def _endpoints(story: Story) -> Panel:
    table = Table(box=None, pad_edge=False)
    for column in ("endpoint", "state", "weights on"):
        table.add_column(column, min_width=10)
    for column in ("asked", "right", "last TTFT", "of it waiting"):
        table.add_column(column, justify="right")
    for endpoint in story.endpoints:
        mine = [asked for asked in story.asked if asked.endpoint == endpoint["name"]]
        last = mine[-1] if mine else None
        table.add_row(
            endpoint["name"],
            Text(endpoint["state"], STYLES.get(endpoint["state"], "dim")),
            endpoint["tier"],
            str(len(mine)),
            str(sum(asked.right for asked in mine)),
            f"{last.ttft_ms:.0f} ms" if last else "-",
            f"{last.held_ms} ms" if last and last.held_ms else "-",
        )
    return Panel(table, title="four private endpoints, four tenants", title_align="left", border_style="dim")


def _feed(story: Story) -> Panel:
    lines = [line for line in story.activity if line["actor"] == "core" and line["kind"] in KINDS][:FEED_LINES]
    feed = Text(no_wrap=True, overflow="ellipsis")
    for line in lines:
        feed.append(f"{line['kind']:<6}", KINDS[line["kind"]])
        feed.append(f"{line['subject']:<20}", "bold")
        feed.append(f"{line['reason']}\n", "dim")
    feed.append("\n" * (FEED_LINES - len(lines)))
    return Panel(feed, title="what the capacity core decided, and why", title_align="left", border_style="dim")


def closing(result: dict[str, Any]) -> None:
    """The sum of it: who answered, how fast, and each tenant's bill beside what dedicated would have cost."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"\n{result['answered']} of {result['requests']} questions answered, "
        f"{result['by_the_right_model']} by the right model, {result['swaps']} swaps."
    )
    waits = {
        "ready": "the endpoint was ready",
        "held": "the endpoint had to be woken first, or its slots were all taken",
    }
    for how, where in waits.items():
        if (median := result[f"ttft_ms_{how}_p50"]) is not None:
            console.print(f"time to first token, median: {median} ms where {where}.")
    table = Table(title="\nthe bills for this minute", title_justify="left", box=None, pad_edge=False)
    table.add_column("tenant")
    for column in ("tokens", "per token, USD", "dedicated would have cost, USD"):
        table.add_column(column, justify="right")
    for bill in result["bills"]:
        table.add_row(bill["tenant"], str(bill["tokens"]), bill["usd"], bill["dedicated_usd"])
    console.print(table)
    console.print("\n`make up` serves the same endpoints until Ctrl-C.", style="dim")
