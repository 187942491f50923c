"""A stand-in engine driver, named as such: no model, scripted delays and faults, for tests of the services around it.

Delays pass on the event loop's clock, so a virtual loop runs them in no time. With a `directory`, fakes answer the
OpenAI routes on a Unix socket (`fake_server`) in the built-in engine's dialect.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import Memory, StartOrder
from tidegate.engines.fake_server import FakeServer

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FakeScript:
    """How a fake engine behaves. Times in ms; `hang` names calls that never return (start, ready, drain, sleep, wake,
    stop, canary, memory); reasons that are not empty make the call fail with them.
    """

    start_ms: int = 0
    drain_ms: int = 0
    sleep_ms: int = 0
    wake_ms: int = 0
    hang: frozenset[str] = frozenset()
    fail_start: str = ""
    fail_ready: str = ""
    fail_sleep: str = ""
    fail_wake: str = ""
    accelerator_bytes: int = 8 * MIB
    asleep_accelerator_bytes: int = 0
    lies_about_sleep: bool = False
    host_bytes: int = 1 * MIB
    canary: str = "canary"
    canary_after_wake: str | None = None
    token_ms: int = 0


Script = FakeScript | Callable[[StartOrder], FakeScript]


class FakeEngine:
    """Implements the `Engine` port. `running` counts requests in flight; tests may raise it, or `die` at will."""

    def __init__(self, order: StartOrder, script: FakeScript, server: FakeServer | None) -> None:
        self.order, self.script, self.server = order, script, server
        self.calls: list[str] = []
        self.running = 0
        self.asleep = False
        self.draining = self.paused = False
        self._woken = False
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def address(self) -> str:
        return self.server.address if self.server is not None else f"unix:fake-{self.order.replica}"

    @property
    def alive(self) -> bool:
        return not self._end.done()

    async def ready(self) -> None:
        await self._act("ready", self.script.start_ms, self.script.fail_ready)

    async def drain(self) -> None:
        self.draining = True
        await self._act("drain", self.script.drain_ms)
        while self._busy and self.alive:  # noqa: ASYNC110 - tests set `running` from outside: there is no event
            await asyncio.sleep(0.01)
        self._check_alive()

    async def sleep(self) -> Memory:
        if self._busy:
            raise EngineFault(f"refused: {self._busy} requests are in flight")
        await self._act("sleep", self.script.sleep_ms, self.script.fail_sleep)
        self.asleep = True
        claimed = 0 if self.script.lies_about_sleep else self.script.asleep_accelerator_bytes
        return Memory(claimed, self.script.host_bytes)

    async def wake(self) -> Memory:
        await self._act("wake", self.script.wake_ms, self.script.fail_wake)
        self.asleep = self.draining = False
        self._woken = True
        return await self.memory()

    async def canary(self) -> str:
        await self._act("canary", 0)
        if self.asleep:
            raise EngineFault("refused: asleep")
        if self._woken and self.script.canary_after_wake is not None:
            return self.script.canary_after_wake
        return self.script.canary

    async def memory(self) -> Memory:
        await self._act("memory", 0)
        held = self.script.asleep_accelerator_bytes if self.asleep else self.script.accelerator_bytes
        return Memory(held, self.script.host_bytes)

    def pause(self, on: bool) -> None:
        self.calls.append("pause" if on else "go on")
        self.paused = on

    async def stop(self) -> None:
        self.calls.append("stop")
        if "stop" in self.script.hang:
            await self.exited()
        self.die("stopped")
        if self.server is not None:
            await self.server.close()

    async def exited(self) -> str:
        return await asyncio.shield(self._end)

    def die(self, reason: str) -> None:
        """The process is gone from one moment to the next."""
        if not self._end.done():
            self._end.set_result(reason)
        if self.server is not None:
            self.server.abort()

    @property
    def _busy(self) -> int:
        return self.running + (self.server.running if self.server is not None else 0)

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineFault("the engine is gone")

    async def _act(self, name: str, ms: int, fail: str = "") -> None:
        self.calls.append(name)
        self._check_alive()
        if name in self.script.hang:
            await asyncio.Event().wait()
        if ms:
            await asyncio.sleep(ms / 1000)
        self._check_alive()
        if fail:
            raise EngineFault(fail)


class FakeDriver:
    """Implements `EngineDriver`. `engines` keeps every engine ever started, for tests to look at."""

    def __init__(self, script: Script = FakeScript(), *, sleeps: bool = True, directory: Path | None = None) -> None:
        self._script, self._sleeps, self._directory = script, sleeps, directory
        self.engines: list[FakeEngine] = []

    @property
    def sleeps(self) -> bool:
        return self._sleeps

    @property
    def why_not(self) -> str:
        return "" if self._sleeps else "told not to"

    async def start(self, order: StartOrder) -> FakeEngine:
        script = self._script if isinstance(self._script, FakeScript) else self._script(order)
        if "start" in script.hang:
            await asyncio.Event().wait()
        if script.fail_start:
            raise EngineFault(script.fail_start)
        server = None
        if self._directory is not None:
            server = FakeServer(self._directory / f"{order.replica}.sock", token_ms=script.token_ms)
            await server.open()
        engine = FakeEngine(order, script, server)
        if server is not None:
            server.refuses = lambda: engine.asleep or engine.draining
        self.engines.append(engine)
        return engine

    def alive(self, replica: str | None = None) -> list[FakeEngine]:
        """Engines running now, of one replica or of all."""
        return [e for e in self.engines if e.alive and replica in (None, e.order.replica)]

    async def close(self) -> None:
        for engine in self.engines:
            if engine.alive:
                await engine.stop()


def scripted(**changes: object) -> FakeScript:
    """A `FakeScript` with some fields changed."""
    return replace(FakeScript(), **changes)  # type: ignore[arg-type]
