"""Parts on other machines: who they may say they are, and how engines of this machine are shown to them."""

import pytest

from tests.control.world import Clock
from tests.loop import on_loop
from tidegate.control import sessions
from tidegate.control.activity import ActivityLog
from tidegate.control.loop import FleetLoop, GatewaySession
from tidegate.control.meters import Meters
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.errors import LinkFault
from tidegate.domain.fleet import Accelerator, Node
from tidegate.domain.plan import NodeJoined, Route, Target
from tidegate.policy.reconcile import CoreSettings, FleetCore
from tidegate.transports.local import pair
from tidegate.wire.internal import GatewayHello

RELAY = "tls:hub:7443/control/control"
NODE = Node("us-1", "us", (Accelerator("cpu-0", "cpu", 100),), 100, 100)


@pytest.mark.parametrize(
    ("peer", "hello", "taken"),
    [
        ("node/us-1/us", NodeJoined(NODE), True),
        ("", NodeJoined(NODE), True),
        ("node/us-2/us", NodeJoined(NODE), False),
        ("node/us-1/eu", NodeJoined(NODE), False),
        ("gateway/us-1/us", NodeJoined(NODE), False),
        ("gateway/us-1/us", GatewayHello("us-1+18f-ab", "us"), True),
        ("gateway/us-1/us", GatewayHello("us-1+18f-ab", "eu"), False),
        ("gateway/us-1/us", GatewayHello("us-10+18f-ab", "us"), False),
        ("gateway/us-1/us", GatewayHello("gw-18f-ab", "us"), False),
        ("node/us-1/us", GatewayHello("us-1+18f-ab", "us"), False),
    ],
)
def test_a_part_elsewhere_is_who_its_certificate_says(peer: str, hello: object, taken: bool) -> None:
    link, _ = pair()
    link.peer = peer
    if taken:
        session, _ = sessions._introduced(hello, link, 0)
        assert session.link is link
    else:
        with pytest.raises(LinkFault, match="says it is"):
            sessions._introduced(hello, link, 0)


@on_loop
async def test_gateways_elsewhere_are_told_of_the_relay_and_those_here_of_the_socket() -> None:
    clock = Clock()
    log = ActivityLog(None, clock)  # type: ignore[arg-type]
    loop = FleetLoop(FleetCore(CoreSettings()), log, Meters(1, clock), clock, RELAY)  # type: ignore[arg-type]
    here, near = pair()
    there, far = pair()
    there.peer = "gateway/us-1/us"
    elsewhere = Target("r2", "tls:us:7444/node/us-1/replica:r2", 4, "us")
    targets = (Target("r1", "unix:/run/r1", 4), elsewhere, Target("r3", "tcp:127.0.0.1:9", 4))
    route = Route("acme/a", 1, EndpointState.READY, targets)
    loop._routes["acme/a"] = route
    for link in (here, there):
        await loop._send(GatewaySession("g", "us", link), route)
    assert await near.receive() == route
    shown = await far.receive()
    assert isinstance(shown, Route)
    assert [target.address for target in shown.targets] == [
        f"{RELAY}/replica:r1",
        "tls:us:7444/node/us-1/replica:r2",
        f"{RELAY}/replica:r3",
    ]
    found = [loop.address(replica) for replica in ("r1", "r2", "r3", "r4")]
    assert found == ["unix:/run/r1", None, "tcp:127.0.0.1:9", None]
