"""Links of gateways and nodes: the first message says who it is, the rest goes to the fleet loop's inbox."""

import asyncio
import logging

from tidegate.control.budgets import Budgets
from tidegate.control.loop import Closed, FleetLoop, GatewaySession, NodeSession, Opened, Session
from tidegate.domain import plan
from tidegate.domain.errors import LinkFault
from tidegate.domain.ports import Clock, Link, Listener
from tidegate.wire.internal import BudgetUse, GatewayHello, ServiceReported

HELLO_MS_MAX = 10_000
LINKS_MAX = 1_024

log = logging.getLogger(__name__)


async def serve_links(listener: Listener, loop: FleetLoop, budgets: Budgets, clock: Clock) -> None:
    """Accepts links for ever. What one of them does wrong ends that one."""
    links: set[asyncio.Task[None]] = set()
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                link = await listener.accept()
                if len(links) >= LINKS_MAX:
                    log.warning("more than %d links: one is turned away", LINKS_MAX)
                    await link.close()
                    continue
                task = group.create_task(_serve(link, loop, budgets, clock))
                links.add(task)
                task.add_done_callback(links.discard)
    finally:
        await listener.close()


async def _serve(link: Link, loop: FleetLoop, budgets: Budgets, clock: Clock) -> None:
    session: Session | None = None
    try:
        async with asyncio.timeout(HELLO_MS_MAX / 1_000):
            session, opened = _introduced(await link.receive(), link, clock.now_ms())
        await loop.tell(opened)
        budgets.wake()
        while True:
            match allowed := _allowed(session, await link.receive()):
                case BudgetUse():
                    assert isinstance(session, GatewaySession)
                    budgets.reported(session, allowed)
                case _:
                    await loop.tell(allowed)
    except LinkFault as fault:
        log.info("link of %s ended: %s", _who(session), fault.reason)
    except TimeoutError:
        log.warning("a link said nothing for %d ms and was closed", HELLO_MS_MAX)
    finally:
        await link.close()
    if session is not None:
        await loop.tell(Closed(session))


def _introduced(message: object, link: Link, now_ms: int) -> tuple[Session, Opened]:
    session: Session
    match message:
        case GatewayHello(gateway, region):
            _prove(link, "gateway", gateway.partition("+")[0], region)
            session = GatewaySession(gateway, region, link)
            return session, Opened(session, plan.GatewayJoined(gateway, region))
        case plan.NodeJoined(node, _):
            _prove(link, "node", node.id, node.region)
            session = NodeSession(node, link, now_ms)
            return session, Opened(session, message)
        case _:
            raise LinkFault(f"first message was {type(message).__name__}, not GatewayHello or NodeJoined")


def _prove(link: Link, role: str, name: str, region: str) -> None:
    """On a link from another machine a part is who its certificate says, in the region it says. Raises LinkFault."""
    if link.peer and link.peer != (claimed := f"{role}/{name}/{region}"):
        raise LinkFault(f"{link.peer} says it is {claimed}")


def _allowed(session: Session, message: object) -> plan.Event | ServiceReported | BudgetUse:
    """`message` if it is one this peer may send, about itself. Raises LinkFault."""
    match session, message:
        case GatewaySession(), plan.DemandReported() | plan.FenceConfirmed() if message.gateway == session.gateway:
            return message
        case GatewaySession(), ServiceReported() | BudgetUse() if message.gateway == session.gateway:
            return message
        case NodeSession(), plan.ReplicaChanged() if message.status.node == session.node.id:
            return message
        case NodeSession(), plan.WeightsChanged() if message.node == session.node.id:
            return message
        case _:
            raise LinkFault(f"{_who(session)} may not send {type(message).__name__}")


def _who(session: Session | None) -> str:
    match session:
        case None:
            return "a stranger"
        case GatewaySession():
            return f"gateway {session.gateway}"
        case NodeSession():
            return f"node {session.node.id}"
