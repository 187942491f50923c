"""One replica's whole life, in one task: the only writer of its state, through `domain.replica.step`.

Commands wait in a bounded mailbox and are carried out one after another; Stop and the engine's own end interrupt
whatever is under way. Every step is bounded in time: an engine that hangs is killed and reported STOPPED, and why.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar, assert_never

from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import EngineFault, WeightFault
from tidegate.domain.plan import NodeCommand, Pause, ReplicaStatus, Sleep, Start, Stop, Wake
from tidegate.domain.ports import Clock, Engine, EngineDriver, HeldWeights, Memory, StartOrder, Weights
from tidegate.domain.replica import ReplicaEvent, ReplicaState, step
from tidegate.node.limits import NodeLimits

log = logging.getLogger(__name__)

T = TypeVar("T")
PROGRESS_PERCENT = 10  # each report of a download is a line of the audit log
Report = Callable[[ReplicaStatus], None]


class _StopAsked(Exception):
    """The core said Stop."""


class _Exited(Exception):
    """The engine process ended by itself; the argument says how."""


class Replica:
    """Runs from Start until STOPPED. `status` is the last thing reported; the first report is STARTING."""

    def __init__(
        self,
        start: Start,
        order: StartOrder,
        driver: EngineDriver,
        *,
        clock: Clock,
        limits: NodeLimits,
        report: Report,
        weights: Weights | None = None,
    ) -> None:
        self._weights = weights
        self._held: HeldWeights | None = None
        self._order, self._driver, self._clock, self._limits, self._report = order, driver, clock, limits, report
        self._reserved_bytes = start.accelerator_bytes
        self._mailbox: deque[Wake | Sleep] = deque()
        self._posted = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._stop_reason = ""
        self._engine: Engine | None = None
        self._exited: asyncio.Task[str] | None = None
        self._canary = ""
        self.status = ReplicaStatus(
            replica=start.replica,
            endpoint=start.deployment.endpoint,
            node=start.node,
            generation=start.deployment.generation,
            state=ReplicaState.STOPPED,
            accelerators=start.accelerators,
        )

    def post(self, command: NodeCommand) -> None:
        """Takes a command; its answer is a report. A repeated one is answered with the state as it is."""
        match command:
            case Start():
                self._report(self.status)
            case Stop(reason=reason):
                self.stop(str(reason))
            case Pause(on=on):
                self._pause(on)
            case Wake() | Sleep():
                if len(self._mailbox) >= self._limits.commands_max:
                    self._report(self.status)  # the answers to what is queued will say more
                    return
                self._mailbox.append(command)
                self._posted.set()
            case _:
                assert_never(command)

    def stop(self, reason: str) -> None:
        """Ends the life, whatever is under way. Idempotent: the first reason stays."""
        if self._stop_asked.is_set():
            self._report(self.status)
            return
        self._stop_reason = reason
        self._stop_asked.set()

    def _pause(self, on: bool) -> None:
        """At once, whatever waits in the mailbox: who it stands still for computes already."""
        if self.status.state is not ReplicaState.READY:
            self._report(self.status)
            return
        self._living_engine().pause(on)
        self._publish(replace(self.status, paused=on, took_ms=0))

    async def run(self) -> None:
        """The life. Returns with `status` STOPPED and the engine process gone, whatever happened in between."""
        reason = ""
        try:
            await self._start()
            while True:
                await self._carry_out(await self._next_command())
        except _StopAsked:
            reason = self._stop_reason
        except _Exited as exited:
            reason = str(exited)
        except (EngineFault, WeightFault) as fault:
            reason = fault.reason
            self._step(ReplicaEvent.FAIL, reason=reason, address="")
        finally:
            await self._end(reason or "the node's supervisor of this replica failed")

    # --- the steps ------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._step(ReplicaEvent.START)
        if self._weights is not None:
            await self._fetch(self._weights)
        began_ms = self._clock.now_ms()
        limits = self._limits
        await self._bounded(self._launch(), limits.start_ms_max, "start")
        engine = self._living_engine()
        left_ms = limits.start_ms_max - (self._clock.now_ms() - began_ms)
        await self._bounded(engine.ready(), max(left_ms, 1), "become ready")
        self._canary = await self._bounded(engine.canary(), limits.canary_ms_max, "answer the canary")
        await self._admit(began_ms)

    async def _fetch(self, weights: Weights) -> None:
        """The engine's weights are here and held before it starts; its driver is told where, never where from."""
        deployment = self._order.deployment
        held = await self._bounded(
            self._hold(weights, deployment.model), self._limits.fetch_ms_max, "fetch its weights"
        )
        local = replace(deployment, model=replace(deployment.model, source=held.path))
        self._order = replace(self._order, deployment=local)
        if self.status.reason:
            self._publish(replace(self.status, reason=""))

    async def _hold(self, weights: Weights, model: ModelProfile) -> HeldWeights:
        """Kept in the same step that got it, so that a Stop arriving right then does not leave it held."""
        self._held = await weights.hold(model, self._fetching)
        return self._held

    def _fetching(self, percent: int) -> None:
        if self.status.state is ReplicaState.STARTING and percent % PROGRESS_PERCENT == 0:
            self._publish(replace(self.status, reason=f"downloading {percent} %"))

    async def _launch(self) -> None:
        """Keeps the engine in the same step that got it: a Stop arriving right then must not lose a running process."""
        self._engine = await self._driver.start(self._order)
        self._exited = asyncio.create_task(self._engine.exited())

    async def _wake(self, command: Wake) -> None:
        if self.status.state is not ReplicaState.ASLEEP:
            self._report(self.status)
            return
        engine = self._living_engine()
        self._step(ReplicaEvent.WAKE, reason="")
        if command.accelerators != self.status.accelerators and not self._order.deployment.movable:
            raise EngineFault("told to wake on other accelerators than it slept on; this engine cannot move")
        self._reserved_bytes = command.accelerator_bytes
        self.status = replace(self.status, accelerators=command.accelerators)
        began_ms = self._clock.now_ms()
        await self._bounded(engine.wake(), self._limits.wake_ms_max, "wake")
        canary = await self._bounded(engine.canary(), self._limits.canary_ms_max, "answer the canary")
        if canary != self._canary:
            raise EngineFault("canary mismatch: after waking it answered otherwise than after its first load")
        await self._admit(began_ms)

    async def _admit(self, began_ms: int) -> None:
        """STARTING or WAKING → READY, once the memory it holds is seen to be within its reservation."""
        engine = self._living_engine()
        memory = await self._bounded(engine.memory(), self._limits.measure_ms_max, "be measured")
        if memory.accelerator_bytes > self._reserved_bytes:
            raise EngineFault(
                f"uses {memory.accelerator_bytes} accelerator bytes, reserved are {self._reserved_bytes}: "
                "raise accelerator_bytes of the endpoint or lower its slots"
            )
        took_ms = self._clock.now_ms() - began_ms
        self._step(ReplicaEvent.READY, memory=memory, took_ms=took_ms, address=engine.address)

    async def _sleep(self) -> None:
        """Drain, sleep, verify: what is reported was measured after the engine said it was done."""
        if self.status.state is not ReplicaState.READY:
            self._report(self.status)
            return
        if not self._driver.sleeps:
            why = self._driver.why_not
            self._stop_reason = f"this engine cannot give memory back here, so it stops instead of sleeping ({why})"
            raise _StopAsked
        engine = self._living_engine()
        limits = self._limits
        if self.status.paused:
            engine.pause(False)
        self._step(ReplicaEvent.DRAIN, address="")
        await self._bounded(engine.drain(), limits.drain_ms_max, "drain")
        self._step(ReplicaEvent.DRAINED)
        began_ms = self._clock.now_ms()
        claimed = await self._bounded(engine.sleep(), limits.sleep_ms_max, "sleep")
        took_ms = self._clock.now_ms() - began_ms
        found = await self._bounded(engine.memory(), limits.measure_ms_max, "be measured")
        measured = Memory(
            max(claimed.accelerator_bytes, found.accelerator_bytes),
            max(claimed.host_bytes, found.host_bytes),
            max(claimed.copy_bytes, found.copy_bytes),
        )
        self._step(ReplicaEvent.ASLEEP, memory=measured, took_ms=took_ms)

    async def _end(self, reason: str) -> None:
        """Any state → STOPPED: the process is made to end, then the memory is free."""
        if self.status.state is ReplicaState.READY:
            self._step(ReplicaEvent.DRAIN, address="")
        if self.status.state in (ReplicaState.DRAINING, ReplicaState.ASLEEP, ReplicaState.FAILED):
            self._step(ReplicaEvent.STOP, reason=reason)
        if self._engine is not None and self._exited is not None:
            try:
                async with asyncio.timeout(self._limits.stop_ms_max / 1000):
                    await self._engine.stop()
            except (TimeoutError, EngineFault) as error:
                # Its memory is not free, so it is not STOPPED: the core must keep the reservation until it ends.
                log.error("replica %s does not end: %s", self.status.replica, error)
                self._publish(replace(self.status, reason=f"{reason}; its process does not end"))
                await self._exited
            self._exited.cancel()
        if self._held is not None:
            self._held.release()
        self._step(ReplicaEvent.EXITED, memory=Memory(0, 0), reason=reason, address="")

    # --- means ----------------------------------------------------------------------------------------------------

    async def _carry_out(self, command: Wake | Sleep) -> None:
        match command:
            case Wake():
                await self._wake(command)
            case Sleep():
                await self._sleep()
            case _:
                assert_never(command)

    async def _next_command(self) -> Wake | Sleep:
        while not self._mailbox:
            self._posted.clear()
            await self._until(self._posted.wait())
        return self._mailbox.popleft()

    async def _bounded(self, call: Awaitable[T], ms_max: int, what: str) -> T:
        """`call`'s result. EngineFault when it takes longer than `ms_max`; _Exited or _StopAsked may come first."""
        try:
            async with asyncio.timeout(ms_max / 1000):
                return await self._until(call)
        except TimeoutError as error:
            raise EngineFault(f"did not {what} within {ms_max} ms") from error

    async def _until(self, call: Awaitable[T]) -> T:
        async def as_coroutine() -> T:
            return await call

        work: asyncio.Task[T] = asyncio.create_task(as_coroutine())
        stop = asyncio.create_task(self._stop_asked.wait())
        waits: set[asyncio.Task[object]] = {work, stop}
        if self._exited is not None:
            waits.add(self._exited)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._stop_asked.is_set():
                raise _StopAsked
            if self._exited is not None and self._exited.done():
                raise _Exited(self._exited.result())
            return work.result()
        finally:
            stop.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})  # a driver half-way through a start cleans up before we go on

    def _living_engine(self) -> Engine:
        assert self._engine is not None, "a step before the start was through"
        return self._engine

    def _step(
        self,
        event: ReplicaEvent,
        *,
        memory: Memory | None = None,
        took_ms: int = 0,
        address: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Moves the state along one arrow and reports it."""
        state, now_ms = step(self.status.state, event), self._clock.now_ms()
        status = replace(self.status, state=state, took_ms=took_ms, since_ms=now_ms, paused=False)
        if memory is not None:
            status = replace(
                status,
                accelerator_bytes=memory.accelerator_bytes,
                host_bytes=memory.host_bytes,
                copy_bytes=memory.copy_bytes,
            )
        if address is not None:
            status = replace(status, address=address)
        if reason is not None:
            status = replace(status, reason=reason)
        self._publish(status)

    def _publish(self, status: ReplicaStatus) -> None:
        self.status = status
        self._report(status)
