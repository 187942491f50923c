"""The real capacity core above the real supervisor, over scripted engines, on a virtual clock.

Eight endpoints share two accelerators that hold two replicas each; demand jumps about at random and engines die. Held
all the time: what engines really occupy fits each accelerator; and who wants capacity gets it within a bound.
"""

import asyncio
import random
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

import pytest

from tests.node.builders import DEPLOYMENT, NODE
from tests.node.loop import LoopClock, run_virtual
from tidegate.domain import plan
from tidegate.domain.plan import Command, Event
from tidegate.engines.fake import MIB, FakeDriver, FakeScript
from tidegate.node.limits import NodeLimits
from tidegate.node.supervisor import Supervisor
from tidegate.policy.reconcile import CoreSettings, FleetCore

ENDPOINTS = [f"acme/e{n}" for n in range(8)]
EACH_BYTES = 30 * MIB  # two fit the 64 MiB of an accelerator, three do not
LIMITS = NodeLimits(start_ms_max=3_000, sleep_ms_max=500, wake_ms_max=500, canary_ms_max=500, drain_ms_max=500)
SETTINGS = CoreSettings(
    wait_ms_max=3_000,
    residency_ms_min=200,
    idle_ms_max=60_000,
    start_ms_max=8_000,
    wake_ms_max=3_000,
    sleep_ms_max=3_000,
    slept_accelerator_bytes_max=MIB,
)


@dataclass
class Loop:
    """The control loop at its barest: events in, commands out, fences confirmed by the one gateway at once."""

    script: Any
    core: FleetCore = field(default_factory=lambda: FleetCore(SETTINGS))
    routes: dict[str, plan.Route] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    arrivals: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = LoopClock()
        self.driver = FakeDriver(self.script)
        self.supervisor = Supervisor(
            node=NODE, drivers={"fake": self.driver}, clock=self.clock, limits=LIMITS, report=self._reported
        )
        self.say(plan.GatewayJoined("g1", "local"))
        self.say(plan.NodeJoined(NODE))
        for name in ENDPOINTS:
            profile = replace(DEPLOYMENT.model, digest=name)
            self.say(
                plan.EndpointApplied(
                    replace(
                        DEPLOYMENT,
                        endpoint=name,
                        model=profile,
                        accelerator_bytes=EACH_BYTES,
                        host_bytes=MIB,
                        movable=True,
                    )
                )
            )

    def say(self, event: Event) -> None:
        for command in self.core.handle(event, self.clock.now_ms()):
            self._carry_out(command)
        self.check_memory()

    def demand(self, name: str, queued: int) -> None:
        self.arrivals[name] = self.arrivals.get(name, 0) + queued
        self.say(plan.DemandReported("g1", name, queued, 0, self.arrivals[name], 0))

    async def pass_time(self, ms: int) -> None:
        """Ticks when the core asked for it."""
        until = self.clock.now_ms() + ms
        while (now := self.clock.now_ms()) < until:
            wanted = self.core.next_tick_ms() or until
            await asyncio.sleep(max(1, min(wanted, until) - now) / 1000)
            self.say(plan.Tick())

    def check_memory(self) -> None:
        for accelerator in NODE.accelerators:
            held = sum(
                engine.script.accelerator_bytes if not engine.asleep else engine.script.asleep_accelerator_bytes
                for engine in self.driver.engines
                if engine.alive and accelerator.id in self._where(engine.order.replica)
            )
            assert held <= accelerator.memory_bytes, f"{held} bytes on {accelerator.id}"

    def _where(self, replica: str) -> tuple[str, ...]:
        return next((s.accelerators for s in self.supervisor.statuses if s.replica == replica), ())

    def _reported(self, status: plan.ReplicaStatus) -> None:
        if status.reason and status.state == "failed":
            self.failures.append(status.reason)
        # As over a link: the report is handled a moment later, not inside the supervisor's own step.
        asyncio.get_running_loop().call_soon(self.say, plan.ReplicaChanged(status))

    def _carry_out(self, command: Command) -> None:
        match command:
            case plan.Start() | plan.Wake() | plan.Sleep() | plan.Stop() | plan.Pause():
                self.supervisor.carry_out(command)
            case plan.Drain():
                self.routes.pop(command.endpoint, None)
                confirmed = plan.FenceConfirmed("g1", command.replica, command.fence)
                asyncio.get_running_loop().call_soon(self.say, confirmed)
            case plan.Route():
                self.routes[command.endpoint] = command
            case plan.Resume():
                pass
            case _:
                assert_never(command)


async def rotate(loop: Loop, rng: random.Random, rounds: int, *, deaths: bool) -> None:
    """Each round somebody else wants capacity, gets it within its bound, and falls quiet."""
    for _ in range(rounds):
        name = rng.choice(ENDPOINTS)
        loop.demand(name, rng.randint(1, 3))
        if deaths and loop.driver.engines and rng.random() < 0.3:
            rng.choice(loop.driver.engines).die("killed by SIGKILL")
        for _ in range(120):
            if (route := loop.routes.get(name)) and route.targets:
                break
            await loop.pass_time(250)
        else:
            raise AssertionError(f"{name} never got a route: {loop.failures[-3:]}")
        loop.demand(name, 0)
        await loop.pass_time(rng.choice([10, 100, 400]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("deaths", [False, True], ids=["calm", "deaths"])
def test_eight_endpoints_share_room_for_four(seed: int, deaths: bool) -> None:
    async def main() -> None:
        script = FakeScript(start_ms=300, sleep_ms=20, wake_ms=30, accelerator_bytes=EACH_BYTES)
        loop = Loop(script)
        await rotate(loop, random.Random(seed), 40, deaths=deaths)
        assert loop.failures == []
        await loop.supervisor.close()

    run_virtual(main)


@pytest.mark.parametrize(
    "bad",
    [
        {"lies_about_sleep": True, "asleep_accelerator_bytes": EACH_BYTES},
        {"hang": frozenset({"sleep"})},
        {"canary_after_wake": "something else"},
        {"fail_wake": "mapping failed"},
    ],
    ids=["lies", "hangs", "wrong-canary", "cannot-wake"],
)
def test_one_bad_engine_does_not_take_the_others_down(bad: dict[str, Any]) -> None:
    async def main() -> None:
        good = FakeScript(start_ms=300, sleep_ms=20, wake_ms=30, accelerator_bytes=EACH_BYTES)
        loop = Loop(lambda order: replace(good, **bad) if order.deployment.endpoint == ENDPOINTS[0] else good)
        await rotate(loop, random.Random(7), 40, deaths=False)
        await loop.supervisor.close()

    run_virtual(main)
