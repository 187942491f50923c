"""The node's link to the control plane: joins with what is alive, carries out commands, survives losing the link."""

import asyncio
from collections.abc import Awaitable, Callable

from tests.node.builders import NODE, settle, sleep, start
from tests.node.loop import LoopClock, run_virtual
from tidegate.domain.errors import LinkFault
from tidegate.domain.plan import NodeJoined, ReplicaChanged
from tidegate.domain.ports import Link
from tidegate.domain.replica import ReplicaState as S
from tidegate.engines.fake import FakeDriver, FakeScript
from tidegate.node.agent import NodeAgent
from tidegate.node.limits import NodeLimits
from tidegate.wire.internal import GatewayHello


class TestLink:
    """The core's end in a test: `sent` is what the node said; `say` is what the core says; `cut` breaks it."""

    __test__ = False

    def __init__(self, *, deaf: bool = False) -> None:
        self.sent: list[object] = []
        self._inbox: asyncio.Queue[object] = asyncio.Queue(100)
        self._deaf = deaf
        self.closed = False

    def say(self, message: object) -> None:
        self._inbox.put_nowait(message)

    def cut(self) -> None:
        self._inbox.put_nowait(LinkFault("cut"))

    async def send(self, message: object) -> None:
        if self.closed:
            raise LinkFault("closed")
        if self._deaf and not isinstance(message, NodeJoined):
            await asyncio.Event().wait()
        self.sent.append(message)

    async def receive(self) -> object:
        message = await self._inbox.get()
        if isinstance(message, LinkFault):
            raise message
        return message

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.cut()

    def changes(self) -> list[S]:
        return [message.status.state for message in self.sent if isinstance(message, ReplicaChanged)]

    def joined(self) -> NodeJoined:
        assert isinstance(self.sent[0], NodeJoined)
        return self.sent[0]


Scene = Callable[[NodeAgent, list[TestLink], FakeDriver], Awaitable[None]]


def play(
    scene: Scene, script: FakeScript = FakeScript(), *, refusals: int = 0, limits: NodeLimits = NodeLimits()
) -> None:
    """Runs an agent over fakes; `links` grows with each connection, after `refusals` failed ones."""

    async def main() -> None:
        links: list[TestLink] = []
        left = refusals

        async def connect() -> Link:
            nonlocal left
            if left:
                left -= 1
                raise LinkFault("nobody listens")
            links.append(TestLink())
            return links[-1]

        driver = FakeDriver(script)
        agent = NodeAgent(node=NODE, drivers={"fake": driver}, connect=connect, clock=LoopClock(), limits=limits)
        running = asyncio.create_task(agent.run())
        await asyncio.sleep(1)
        await scene(agent, links, driver)
        await agent.close()
        await asyncio.wait_for(running, 60)
        assert not any(engine.alive for engine in driver.engines)

    run_virtual(main)


def test_joins_with_the_node_and_reports_what_commands_lead_to() -> None:
    async def scene(agent: NodeAgent, links: list[TestLink], driver: FakeDriver) -> None:
        assert links[0].joined() == NodeJoined(NODE, ())
        links[0].say(start())
        links[0].say(sleep())
        await settle()
        assert links[0].changes() == [S.STARTING, S.READY, S.DRAINING, S.SLEEPING, S.ASLEEP]

    play(scene)


def test_a_broken_link_leaves_engines_alone_and_the_next_one_tells_all() -> None:
    async def scene(agent: NodeAgent, links: list[TestLink], driver: FakeDriver) -> None:
        links[0].say(start("r1"))
        links[0].say(start("r2"))
        await asyncio.sleep(1)
        links[0].cut()
        await asyncio.sleep(5)
        assert len(links) == 2
        assert {(s.replica, s.state, s.address) for s in links[1].joined().replicas} == {
            ("r1", S.READY, "unix:fake-r1"),
            ("r2", S.READY, "unix:fake-r2"),
        }
        assert all(engine.alive for engine in driver.engines)

    play(scene)


def test_what_changes_while_nobody_listens_is_in_the_next_snapshot() -> None:
    async def scene(agent: NodeAgent, links: list[TestLink], driver: FakeDriver) -> None:
        links[0].say(start())
        await asyncio.sleep(0.1)
        assert links[0].changes() == [S.STARTING]
        links[0].cut()
        await asyncio.sleep(10)
        assert [s.state for s in links[1].joined().replicas] == [S.READY]

    play(scene, FakeScript(start_ms=3_000), limits=NodeLimits(reconnect_ms_min=5_000, reconnect_ms_max=5_000))


def test_keeps_trying_until_somebody_listens() -> None:
    async def scene(agent: NodeAgent, links: list[TestLink], driver: FakeDriver) -> None:
        await settle()
        assert len(links) == 1

    play(scene, refusals=20)


def test_a_message_not_meant_for_nodes_ends_the_link_not_the_node() -> None:
    async def scene(agent: NodeAgent, links: list[TestLink], driver: FakeDriver) -> None:
        links[0].say(start())
        await asyncio.sleep(1)
        links[0].say(GatewayHello("g1", "local"))
        await asyncio.sleep(5)
        assert [s.state for s in links[1].joined().replicas] == [S.READY]

    play(scene)


def test_a_reader_that_stalls_costs_the_link_not_memory() -> None:
    async def main() -> None:
        links = [TestLink(deaf=True), TestLink()]
        waiting = list(links)

        async def connect() -> Link:
            return waiting.pop(0)

        driver = FakeDriver()
        limits = NodeLimits(reports_max=4, measure_ms_max=100)
        agent = NodeAgent(node=NODE, drivers={"fake": driver}, connect=connect, clock=LoopClock(), limits=limits)
        running = asyncio.create_task(agent.run())
        await asyncio.sleep(0.1)
        for name in ("r1", "r2", "r3"):
            links[0].say(start(name))
        await asyncio.sleep(5)
        assert links[0].closed
        assert {s.replica for s in links[1].joined().replicas} == {"r1", "r2", "r3"}
        await agent.close()
        await asyncio.wait_for(running, 60)

    run_virtual(main)


def test_closing_reports_every_replica_stopped() -> None:
    async def main() -> None:
        link = TestLink()

        async def connect() -> Link:
            return link

        agent = NodeAgent(node=NODE, drivers={"fake": FakeDriver()}, connect=connect, clock=LoopClock())
        running = asyncio.create_task(agent.run())
        await asyncio.sleep(0.1)
        link.say(start())
        await asyncio.sleep(1)
        await agent.close()
        await asyncio.wait_for(running, 60)
        assert link.changes()[-1] is S.STOPPED

    run_virtual(main)
