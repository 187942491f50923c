"""Every replica of this node: one `Replica` task each, commands handed to the right one, what ended is remembered."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from tidegate.domain.fleet import Node
from tidegate.domain.plan import NodeCommand, ReplicaStatus, Start, Wake
from tidegate.domain.ports import Clock, EngineDriver, StartOrder, Weights
from tidegate.domain.replica import ReplicaState
from tidegate.node.limits import NodeLimits
from tidegate.node.replica import Replica, Report

log = logging.getLogger(__name__)


class Supervisor:
    """Carries out node commands. Each is answered by a report; none ever starts a second engine for a replica."""

    def __init__(
        self,
        *,
        node: Node,
        drivers: Mapping[str, EngineDriver],
        clock: Clock,
        limits: NodeLimits,
        report: Report,
        weights: Weights | None = None,
    ) -> None:
        self._weights = weights
        self._node, self._drivers, self._clock, self._limits, self._report = node, drivers, clock, limits, report
        self._accelerators = {accelerator.id: accelerator for accelerator in node.accelerators}
        self._replicas: dict[str, Replica] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gone: OrderedDict[str, ReplicaStatus] = OrderedDict()
        self._closing = False

    @property
    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Everything alive here, as last reported."""
        return tuple(replica.status for replica in self._replicas.values())

    def carry_out(self, command: NodeCommand) -> None:
        """Never waits and never raises for what the outside can cause: refusals are reports too."""
        if living := self._replicas.get(command.replica):
            living.post(command)
        elif isinstance(command, Start):
            self._start(command)
        else:
            self._report(self._gone.get(command.replica) or self._unknown(command))

    async def close(self) -> None:
        """Stops every replica, all at once, and waits until their processes are gone."""
        self._closing = True
        for replica in self._replicas.values():
            replica.stop("the node is shutting down")
        if self._tasks:
            bound_ms = self._limits.stop_ms_max + self._limits.measure_ms_max
            _, late = await asyncio.wait(self._tasks.values(), timeout=bound_ms / 1000)
            for task in late:
                task.cancel()

    def _start(self, command: Start) -> None:
        problem = self._problem(command)
        if problem:
            self._remember(replace(self._unknown(command), reason=problem))
            return
        self._gone.pop(command.replica, None)
        order = StartOrder(
            replica=command.replica,
            deployment=command.deployment,
            accelerators=tuple(self._accelerators[a] for a in command.accelerators),
            accelerator_bytes=command.accelerator_bytes,
        )
        replica = Replica(
            command,
            order,
            self._drivers[command.deployment.engine],
            clock=self._clock,
            limits=self._limits,
            report=self._report,
            weights=self._weights,
        )
        task = asyncio.create_task(replica.run(), name=f"replica {command.replica}")
        self._replicas[command.replica], self._tasks[command.replica] = replica, task
        task.add_done_callback(lambda done: self._ended(command.replica, done))

    def _problem(self, command: Start) -> str:
        """Why this node cannot even begin, empty when it can."""
        if self._closing:
            return "the node is shutting down"
        if command.deployment.engine not in self._drivers:
            known = ", ".join(sorted(self._drivers))
            return f"this node has no engine {command.deployment.engine!r}; it has {known}"
        if missing := [a for a in command.accelerators if a not in self._accelerators]:
            return f"this node has no accelerator {missing[0]!r}"
        if not command.accelerators:
            return "no accelerator was given to start on"
        return ""

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        status = self._replicas.pop(name).status
        del self._tasks[name]
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("replica %s: its task failed", name, exc_info=bug)
        self._remember(status, report=False)

    def _remember(self, status: ReplicaStatus, *, report: bool = True) -> None:
        self._gone[status.replica] = status
        if len(self._gone) > self._limits.gone_replicas_max:
            self._gone.popitem(last=False)
        if report:
            self._report(status)

    def _unknown(self, command: NodeCommand) -> ReplicaStatus:
        deployment = command.deployment if isinstance(command, Start) else None
        return ReplicaStatus(
            replica=command.replica,
            endpoint=deployment.endpoint if deployment else "",
            node=self._node.id,
            generation=deployment.generation if deployment else 0,
            state=ReplicaState.STOPPED,
            accelerators=command.accelerators if isinstance(command, Start | Wake) else (),
            reason="not on this node",
        )
