"""The order in which the core is fed, seen by a stand-in that only writes down what it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tests.control.world import Clock, running
from tests.loop import on_loop, until
from tidegate.control.activity import ActivityLog
from tidegate.control.loop import FleetLoop
from tidegate.control.meters import Meters
from tidegate.domain import plan
from tidegate.wire.internal import GatewayHello


class Scribe:
    """Wants a tick at `tick_ms`; notes (event, instant)."""

    def __init__(self) -> None:
        self.told: list[tuple[plan.Event, int]] = []
        self.tick_ms: int | None = None

    def handle(self, event: plan.Event, now_ms: int) -> list[plan.Command]:
        self.told.append((event, now_ms))
        if isinstance(event, plan.Tick):
            self.tick_ms = None
        return []

    def next_tick_ms(self) -> int | None:
        return self.tick_ms

    @property
    def ticks(self) -> list[int]:
        return [i for i, (event, _) in enumerate(self.told) if isinstance(event, plan.Tick)]


@contextlib.asynccontextmanager
async def fed(directory: Path) -> AsyncIterator[tuple[FleetLoop, Scribe, Clock]]:
    """A fleet loop that is not running yet; whatever runs it is ended with the test."""
    async with running(directory) as world:
        scribe, clock = Scribe(), Clock()
        yield FleetLoop(scribe, ActivityLog(world.store, clock), Meters(1_000), clock), scribe, clock  # type: ignore[arg-type]


@on_loop
async def test_a_tick_comes_when_the_core_asked_for_it_and_only_then(tmp_path: Path) -> None:
    async with fed(tmp_path) as (loop, scribe, clock):
        task = asyncio.create_task(loop.run())
        scribe.tick_ms = clock.now_ms() + 30
        asked_ms = scribe.tick_ms
        await loop.tell(plan.EndpointRemoved("a/b"))
        await until(lambda: scribe.ticks, "tick")
        assert scribe.told[scribe.ticks[0]][1] >= asked_ms
        await loop.settled()
        assert len(scribe.ticks) == 1
        task.cancel()


@on_loop
async def test_a_flood_of_events_does_not_starve_a_tick_that_is_due(tmp_path: Path) -> None:
    async with fed(tmp_path) as (loop, scribe, clock):
        scribe.tick_ms = clock.now_ms() - 1
        for _ in range(100):
            await loop.tell(plan.DemandReported("g1", "a/b", 0, 0, 0))
        task = asyncio.create_task(loop.run())
        await until(lambda: len(scribe.told) >= 101, "everything told")
        assert scribe.ticks
        assert scribe.ticks[0] <= 1
        task.cancel()


@on_loop
async def test_time_never_goes_back_for_the_core(tmp_path: Path) -> None:
    async with fed(tmp_path) as (loop, scribe, clock):
        task = asyncio.create_task(loop.run())
        for step_ms in (0, 5_000, -3_600_000, 0, 60_000):
            clock.ahead_ms += step_ms
            await loop.tell(plan.EndpointRemoved("a/b"))
            await loop.settled()
        instants = [now_ms for _, now_ms in scribe.told]
        assert len(instants) == 5
        assert instants == sorted(instants)
        task.cancel()


@on_loop
async def test_a_gateway_that_is_back_before_its_old_link_is_known_dead_stays_joined(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        first = await world.gateway("g1")
        again = await world.listener.connect()
        await again.send(GatewayHello("g1", "local"))
        await until(lambda: first.link._peer._closed, "the old session is replaced")  # type: ignore[attr-defined]
        await world.lose(first)
        for _ in range(5):  # the old reader's end goes through the inbox too
            await asyncio.sleep(0.01)
            await world.control.loop.settled()
        assert world.control.loop.gateways == ("g1",)
        assert world.control.loop.view().gateways == ("g1",)
        kinds = [line.kind for line in reversed(await world.control.activity.newest(100, "g1"))]
        assert kinds == ["joined", "lost", "joined"]
