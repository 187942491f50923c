"""The sole feeder of the capacity core: events in one order, each command to its node or to all gateways.

One task reads the inbox and ticks when the core asked for it; nobody else calls `FleetCore.handle`. Sessions and the
admin API only put into the inbox. A command for a node that is gone is dropped: its NodeLost, in the same inbox,
corrects the core.
"""

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import assert_never

from tidegate.control.activity import ActivityLog
from tidegate.control.meters import Meters
from tidegate.domain import plan
from tidegate.domain.errors import LinkFault, Refusal
from tidegate.domain.fleet import Node
from tidegate.domain.plan import Drain, Pause, Prefetch, Resume, Route, Sleep, Start, Stop, Wake
from tidegate.domain.ports import Clock, Link
from tidegate.domain.replica import ReplicaState
from tidegate.policy.reconcile import FleetCore
from tidegate.policy.view import FleetView
from tidegate.wire.internal import Catalog, Message, ServiceReported

INBOX_EVENTS_MAX = 10_000  # a full inbox holds back the links that feed it, and nothing else
SETTLE_MS_MAX = 10_000

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class GatewaySession:
    gateway: str
    region: str
    link: Link


@dataclass(eq=False, slots=True)
class NodeSession:
    node: Node
    link: Link
    joined_ms: int


Session = GatewaySession | NodeSession


@dataclass(frozen=True, slots=True)
class Opened:
    """A link said who it is."""

    session: Session
    event: plan.GatewayJoined | plan.NodeJoined


@dataclass(frozen=True, slots=True)
class Closed:
    """A link ended."""

    session: Session


@dataclass(frozen=True, slots=True)
class Settled:
    """Resolves once everything queued before it has been decided and sent."""

    done: asyncio.Future[None]


Item = plan.Event | Catalog | ServiceReported | Opened | Closed | Settled


class FleetLoop:
    """`relay_address` is put before the names of replicas whose engines listen on this machine only, for gateways on
    others.
    """

    def __init__(
        self, core: FleetCore, activity: ActivityLog, meters: Meters, clock: Clock, relay_address: str = ""
    ) -> None:
        self._core = core
        self._relay_address = relay_address
        self._activity = activity
        self._meters = meters
        self._clock = clock
        self._inbox: asyncio.Queue[Item] = asyncio.Queue(INBOX_EVENTS_MAX)
        self._gateways: dict[str, GatewaySession] = {}
        self._nodes: dict[str, NodeSession] = {}
        self._joined = asyncio.Event()
        self._now_ms = 0
        self._applied: set[str] = set()
        self._catalog = Catalog(0, (), ())
        self._routes: dict[str, Route] = {}
        self._owners: dict[str, str] = {}  # replica -> endpoint, so that a line of the audit log has a subject

    # --- what others may call -------------------------------------------------------------------------------------

    async def tell(self, item: Item) -> None:
        """Queues one thing for the core. Waits only while the inbox is full."""
        await self._inbox.put(item)

    async def settled(self) -> None:
        """Returns once the core has decided on everything told so far. Refusal not_ready when that takes too long."""
        done = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(SETTLE_MS_MAX / 1_000):
                await self.tell(Settled(done))
                await done
        except TimeoutError:
            raise Refusal("not_ready", "the control plane is too busy; what you asked for will be done") from None

    async def until_joined(self, *, nodes: int, gateways: int) -> None:
        """Returns once that many of each have a live link."""
        while len(self._nodes) < nodes or len(self._gateways) < gateways:
            self._joined.clear()
            await self._joined.wait()

    def route(self, endpoint: str) -> Route | None:
        """What gateways were last told of an endpoint."""
        return self._routes.get(endpoint)

    def address(self, replica: str) -> str | None:
        """Where on this machine a replica that is routed to listens; None for any other."""
        targets = (target for route in self._routes.values() for target in route.targets)
        found = next((target.address for target in targets if target.replica == replica), "tls:")
        return None if found.startswith("tls:") else found

    def view(self) -> FleetView:
        return self._core.view()

    @property
    def nodes(self) -> tuple[NodeSession, ...]:
        return tuple(self._nodes.values())

    @property
    def gateway_sessions(self) -> tuple[GatewaySession, ...]:
        return tuple(self._gateways.values())

    @property
    def gateways(self) -> tuple[str, ...]:
        return tuple(self._gateways)

    async def run(self) -> None:
        """For ever: an event or, when one is due, a tick."""
        while True:
            due_ms = self._core.next_tick_ms()
            wait_s = None if due_ms is None else max(due_ms - self._clock.now_ms(), 0) / 1_000
            try:
                async with asyncio.timeout(wait_s):
                    item = await self._inbox.get()
            except TimeoutError:
                await self._feed(plan.Tick())
                continue
            await self._take(item)
            # Under a flood of events a tick that is due must not starve.
            due_ms = self._core.next_tick_ms()
            if due_ms is not None and due_ms <= self._clock.now_ms():
                await self._feed(plan.Tick())

    # --- the feeder's own -----------------------------------------------------------------------------------------

    async def _take(self, item: Item) -> None:
        match item:
            case Opened(session, event):
                await self._open(session, event)
            case Closed(session):
                await self._close(session)
            case Settled(done):
                if not done.done():
                    done.set_result(None)
            case ServiceReported():
                self._meters.attainment.report(item, self._clock.now_ms())
            case Catalog():
                self._catalog = item
                await self._to_gateways(item)
            case _:
                await self._feed(item)

    async def _open(self, session: Session, event: plan.GatewayJoined | plan.NodeJoined) -> None:
        match session:
            case GatewaySession():
                if (before := self._gateways.get(session.gateway)) is not None:
                    await self._close(before)
                self._gateways[session.gateway] = session
                await self._send(session, self._catalog)
                for route in list(self._routes.values()):
                    await self._send(session, route)
                self._activity.note("gateway", "joined", session.gateway, f"region={session.region}")
            case NodeSession():
                if (before_node := self._nodes.get(session.node.id)) is not None:
                    await self._close(before_node)
                self._nodes[session.node.id] = session
                accelerators = len(session.node.accelerators)
                self._activity.note("node", "joined", session.node.id, f"region={session.node.region} {accelerators=}")
            case _:
                assert_never(session)
        await self._feed(event)
        self._joined.set()

    async def _close(self, session: Session) -> None:
        """Whoever came back in the meantime has a new session, which the end of the old one must not touch."""
        await session.link.close()
        match session:
            case GatewaySession():
                if self._gateways.get(session.gateway) is session:
                    del self._gateways[session.gateway]
                    self._activity.note("gateway", "lost", session.gateway, "its link ended")
                    self._meters.attainment.gateway_lost(session.gateway)
                    await self._feed(plan.GatewayLost(session.gateway))
            case NodeSession():
                if self._nodes.get(session.node.id) is session:
                    del self._nodes[session.node.id]
                    self._activity.note("node", "lost", session.node.id, "its link ended")
                    await self._feed(plan.NodeLost(session.node.id))
            case _:
                assert_never(session)

    async def _feed(self, event: plan.Event) -> None:
        # A wall clock may be set back; the core's must not.
        self._now_ms = now_ms = max(self._now_ms, self._clock.now_ms())
        self._observe(event, now_ms)
        for command in self._core.handle(event, now_ms):
            self._meters.command(command, self._owner(command), now_ms)
            await self._carry_out(command)

    def _observe(self, event: plan.Event, now_ms: int) -> None:
        if isinstance(event, plan.NodeJoined):
            for status in event.replicas:
                self._owners[status.replica] = status.endpoint
        elif isinstance(event, plan.EndpointApplied):
            self._applied.add(event.deployment.endpoint)
        elif isinstance(event, plan.EndpointRemoved):
            self._applied.discard(event.endpoint)
            self._routes.pop(event.endpoint, None)
        elif isinstance(event, plan.ReplicaChanged):
            status = event.status
            # A node that never heard of a replica says it is stopped, and cannot say whose it was.
            endpoint = status.endpoint or self._owners.get(status.replica, "")
            self._owners[status.replica] = endpoint
            if status.state is not ReplicaState.READY or status.took_ms:  # else an echo of a pause: nothing moved
                self._activity.note("node", status.state.value, endpoint or status.replica, _report(status))
            if status.state is ReplicaState.STOPPED:
                del self._owners[status.replica]
        self._meters.event(event, now_ms)

    def _owner(self, command: plan.Command) -> str:
        match command:
            case Start():
                self._owners[command.replica] = command.deployment.endpoint
                return command.deployment.endpoint
            case Drain() | Resume() | Route():
                return command.endpoint
            case Wake() | Sleep() | Stop() | Pause():
                return self._owners.get(command.replica, "")
            case Prefetch():
                return ""  # weights may serve several endpoints
            case _:
                assert_never(command)

    async def _carry_out(self, command: plan.Command) -> None:
        match command:
            case Start() | Wake() | Sleep() | Stop() | Pause():
                self._note(command)
                if (session := self._nodes.get(command.node)) is not None:
                    await self._send(session, command)
            case Prefetch():
                self._activity.note("core", "prefetch", command.node, f"{command.reason} model={command.model.source}")
                if (session := self._nodes.get(command.node)) is not None:
                    await self._send(session, command)
            case Drain() | Resume():
                self._note(command)
                await self._to_gateways(command)
            case Route():
                self._note_route(command)
                if command.endpoint in self._applied:  # an endpoint that was removed has its last words yet
                    self._routes[command.endpoint] = command
                await self._to_gateways(command)
            case _:
                assert_never(command)

    async def _to_gateways(self, message: Message) -> None:
        for session in list(self._gateways.values()):
            await self._send(session, message)

    async def _send(self, session: Session, message: Message) -> None:
        if isinstance(message, Route) and session.link.peer:
            message = replace(message, targets=tuple(self._outward(target) for target in message.targets))
        try:
            await session.link.send(message)
        except LinkFault as fault:
            log.warning("link given up: %s", fault.reason)
            await session.link.close()  # its reader sees the end and queues Closed

    def _outward(self, target: plan.Target) -> plan.Target:
        """The same replica as it is reached from another machine."""
        if target.address.startswith("tls:"):
            return target
        return replace(target, address=f"{self._relay_address}/replica:{target.replica}")

    def _note(self, command: plan.NodeCommand | Drain | Resume) -> None:
        where = f"replica={command.replica} node={command.node}"
        if isinstance(command, Start | Wake):
            where += f" accelerators={','.join(command.accelerators)}"
        kind = type(command).__name__.lower() if not isinstance(command, Pause) or command.on else "go_on"
        self._activity.note("core", kind, self._owner(command) or command.replica, f"{command.reason} {where}")

    def _note_route(self, route: Route) -> None:
        before = self._routes.get(route.endpoint)
        if before is None or (before.state, before.reason) != (route.state, route.reason):
            was, now = before.state.value if before is not None else "new", route.state.value
            why = "" if route.reason == now else route.reason.removeprefix(f"{now}: ")
            step = now if was == now else f"{was} → {now}"
            self._activity.note("core", "state", route.endpoint, f"{step}: {why}" if why else step)


def _report(status: plan.ReplicaStatus) -> str:
    parts = [f"replica={status.replica} node={status.node}"]
    if status.took_ms:
        parts.append(f"took_ms={status.took_ms}")
    if status.accelerator_bytes:
        parts.append(f"accelerator_bytes={status.accelerator_bytes}")
    return " ".join([status.reason, *parts] if status.reason else parts)
