"""Builders for node tests: one node, its deployments and commands, and a recorder of what was reported."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.node.loop import LoopClock
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.plan import NodeCommand, Pause, Reason, ReplicaStatus, Sleep, Start, Stop, Wake
from tidegate.domain.ports import EngineDriver
from tidegate.domain.replica import TRANSITIONS, ReplicaState
from tidegate.engines.fake import MIB, FakeDriver, Script
from tidegate.node.limits import NodeLimits
from tidegate.node.supervisor import Supervisor

NODE = Node(
    "node-1", "local", (Accelerator("cpu-0", "cpu", 64 * MIB), Accelerator("cpu-1", "cpu", 64 * MIB)), 1 << 30, 1 << 33
)
WHY = Reason("test")
RESERVED = 16 * MIB
PROFILE = ModelProfile("model", "digest", ModelKind.GENERATIVE, 4 * MIB, 64, 256)
DEPLOYMENT = Deployment("acme/chat", "acme", PROFILE, Mode.DEDICATED_SERVERLESS, engine="fake", generation=3)


def start(replica: str = "r1", *, accelerators: tuple[str, ...] = ("cpu-0",), **deployment: Any) -> Start:
    return Start(replica, "node-1", accelerators, replace(DEPLOYMENT, **deployment), RESERVED, WHY)


def wake(replica: str = "r1", *, accelerators: tuple[str, ...] = ("cpu-0",)) -> Wake:
    return Wake(replica, "node-1", accelerators, RESERVED, WHY)


def sleep(replica: str = "r1") -> Sleep:
    return Sleep(replica, "node-1", WHY)


def stop(replica: str = "r1") -> Stop:
    return Stop(replica, "node-1", WHY)


def pause(replica: str = "r1", *, on: bool = True) -> Pause:
    return Pause(replica, "node-1", on, WHY)


class Recorder:
    """Everything reported, per replica; checks on the way that each change is a chain of legal arrows."""

    def __init__(self) -> None:
        self.statuses: list[ReplicaStatus] = []
        self._last: dict[str, ReplicaState] = {}

    def __call__(self, status: ReplicaStatus) -> None:
        before = self._last.get(status.replica, ReplicaState.STOPPED)
        legal = {after for (from_, _), after in TRANSITIONS.items() if from_ is before} | {before}
        assert status.state in legal, f"{before} -> {status.state}"
        self._last[status.replica] = status.state
        self.statuses.append(status)

    def states(self, replica: str = "r1") -> list[ReplicaState]:
        return [status.state for status in self.statuses if status.replica == replica]

    def last(self, replica: str = "r1") -> ReplicaStatus:
        return [status for status in self.statuses if status.replica == replica][-1]


class Bench:
    """A supervisor over fakes, with its recorder."""

    def __init__(
        self,
        script: Script,
        *,
        limits: NodeLimits = NodeLimits(),
        drivers: Mapping[str, EngineDriver] | None = None,
        sleeps: bool = True,
    ) -> None:
        self.driver = FakeDriver(script, sleeps=sleeps)
        self.reports = Recorder()
        self.supervisor = Supervisor(
            node=NODE, drivers=drivers or {"fake": self.driver}, clock=LoopClock(), limits=limits, report=self.reports
        )

    async def do(self, *commands: NodeCommand) -> ReplicaStatus:
        """Gives the commands one after another, letting each come to rest; the last report."""
        for command in commands:
            self.supervisor.carry_out(command)
            await settle()
        return self.reports.last(commands[-1].replica)


async def settle(seconds: float = 3_600.0) -> None:
    """Lets (virtual) time pass until everything with a bound has happened."""
    await asyncio.sleep(seconds)
