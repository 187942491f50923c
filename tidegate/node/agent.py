"""The node's side of its link to the control plane: says what is alive, takes commands, sends every change.

The link may break at any time and engines do not care: replicas go on, and the next connection begins with
`NodeJoined`, which tells everything alive, so a report lost with the old link does no harm.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from tidegate.domain.errors import LinkFault
from tidegate.domain.fleet import Node
from tidegate.domain.plan import (
    NodeCommand,
    NodeJoined,
    Pause,
    Prefetch,
    ReplicaChanged,
    ReplicaStatus,
    WeightsChanged,
)
from tidegate.domain.ports import Clock, Connect, EngineDriver, Link, Weights
from tidegate.domain.replica import ReplicaState
from tidegate.node.limits import NodeLimits
from tidegate.node.prefetch import Prefetcher
from tidegate.node.supervisor import Supervisor

log = logging.getLogger(__name__)


class NodeAgent:
    """`run` serves until `close`; `close` ends every engine of this node and returns when they are gone.

    `public` says how gateways reach a replica: from elsewhere not at the address its engine has on this machine.
    """

    def __init__(
        self,
        *,
        node: Node,
        drivers: Mapping[str, EngineDriver],
        connect: Connect,
        clock: Clock,
        limits: NodeLimits = NodeLimits(),
        weights: Weights | None = None,
        public: Callable[[ReplicaStatus], str] = lambda status: status.address,
    ) -> None:
        self._public = public
        self._node, self._drivers, self._connect, self._limits = node, drivers, connect, limits
        self._supervisor = Supervisor(
            node=node, drivers=drivers, clock=clock, limits=limits, report=self._report, weights=weights
        )
        self._weights = weights
        self._prefetcher = Prefetcher(weights, self._tell_weights) if weights is not None else None
        self._told: tuple[str, ...] | None = None
        self._reports: asyncio.Queue[ReplicaChanged | WeightsChanged] | None = None
        self._overflow = asyncio.Event()
        self._link: Link | None = None
        self._closing = asyncio.Event()

    @property
    def statuses(self) -> tuple[ReplicaStatus, ...]:
        return self._supervisor.statuses

    def address(self, replica: str) -> str | None:
        """Where on this machine the engine of a replica listens that is ready; None for any other."""
        return next((s.address for s in self.statuses if s.replica == replica and s.address), None)

    async def run(self) -> None:
        """Connects, serves the link until it breaks, and again, waiting longer while nobody answers."""
        wait_ms = self._limits.reconnect_ms_min
        while not self._closing.is_set():
            try:
                self._link = await self._connect()
                await self._serve(self._link)
                wait_ms = self._limits.reconnect_ms_min
            except LinkFault as fault:
                log.info("node %s: link to the control plane: %s", self._node.id, fault.reason)
            finally:
                await self._hang_up()
            await self._pause(wait_ms)
            wait_ms = min(wait_ms * 2, self._limits.reconnect_ms_max)

    async def close(self) -> None:
        """Stops all replicas, reports them, then ends the link and the drivers. Idempotent."""
        if self._prefetcher is not None:
            await self._prefetcher.close()
        await self._supervisor.close()
        await self._flush()
        self._closing.set()
        await self._hang_up()
        for driver in self._drivers.values():
            await driver.close()

    async def _serve(self, link: Link) -> None:
        """One connection's life. The snapshot and the queue begin in the same step, so no change falls between them."""
        self._reports = asyncio.Queue(self._limits.reports_max)
        await link.send(NodeJoined(self._node, tuple(self._shown(status) for status in self.statuses)))
        self._tell_weights()
        parts = {
            asyncio.create_task(part)
            for part in (
                self._send(link, self._reports),
                self._receive(link),
                self._watch_overflow(),
                self._watch_weights(),
            )
        }
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            self._reports = None
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)

    async def _send(self, link: Link, reports: asyncio.Queue[ReplicaChanged | WeightsChanged]) -> None:
        while True:
            await link.send(await reports.get())
            reports.task_done()

    async def _receive(self, link: Link) -> None:
        while True:
            message = await link.receive()
            if isinstance(message, NodeCommand):
                kind, level = type(message).__name__, logging.INFO
                if isinstance(message, Pause):  # comes with requests
                    level = logging.DEBUG
                log.log(level, "node %s: %s %s: %s", self._node.id, kind, message.replica, message.reason)
                self._supervisor.carry_out(message)
            elif isinstance(message, Prefetch) and self._prefetcher is not None:
                log.info("node %s: Prefetch %s: %s", self._node.id, message.model.source, message.reason)
                self._prefetcher.take(message)
            else:
                raise LinkFault(f"a {type(message).__name__} message is not for a node")

    async def _watch_overflow(self) -> None:
        """The control plane does not read: a new link with a fresh snapshot is better than reports of long ago."""
        self._overflow.clear()
        await self._overflow.wait()
        raise LinkFault(f"{self._limits.reports_max} reports unread")

    async def _watch_weights(self) -> None:
        """What other nodes of this machine fetch or evict is here and gone, too."""
        while True:
            await asyncio.sleep(self._limits.weights_ms / 1000)
            self._tell_weights(changed=True)

    def _report(self, status: ReplicaStatus) -> None:
        if status.reason:
            log.info("replica %s of %s: %s: %s", status.replica, status.endpoint, status.state, status.reason)
        self._put(ReplicaChanged(self._shown(status)))
        if status.state is ReplicaState.READY:
            self._tell_weights(changed=True)

    def _shown(self, status: ReplicaStatus) -> ReplicaStatus:
        return replace(status, address=self._public(status)) if status.address else status

    def _tell_weights(self, *, changed: bool = False) -> None:
        """What is on the disk now; `changed`: only if it is something else than was told last."""
        if self._weights is not None:
            present = self._weights.present()
            if not changed or present != self._told:
                self._told = present
                self._put(WeightsChanged(self._node.id, present))

    def _put(self, report: ReplicaChanged | WeightsChanged) -> None:
        if self._reports is None:
            return  # no link: what the next one begins with says it
        try:
            self._reports.put_nowait(report)
        except asyncio.QueueFull:
            self._overflow.set()

    async def _flush(self) -> None:
        """Gives the last reports a moment to leave: a core that hears STOPPED need not wait for NodeLost."""
        reports = self._reports
        if reports is not None:
            waiting = asyncio.create_task(reports.join())
            await asyncio.wait({waiting}, timeout=self._limits.measure_ms_max / 1000)
            waiting.cancel()

    async def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def _pause(self, ms: int) -> None:
        try:
            async with asyncio.timeout(ms / 1000):
                await self._closing.wait()
        except TimeoutError:
            return  # time to try again
