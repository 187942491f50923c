"""What the waiting room keeps of an endpoint, a replica and a request."""

from collections import OrderedDict

from tidegate.domain.endpoint import EndpointState
from tidegate.domain.plan import Target

SUSPECT_MS = 1_000
LOST_RETRIES_MAX = 1
UNSERVED_RETRIES_MAX = 1

# Without a target, an endpoint in one of these will not have one soon: refused at once, with this code.
CLOSED = {EndpointState.FAILED: "endpoint_failed", EndpointState.PAUSED: "endpoint_paused"}


class Seat:
    """One replica as this gateway sees it."""

    __slots__ = ("draining", "fenced", "in_flight", "listed", "suspect_until_ms", "target")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.in_flight = 0
        self.listed = True
        self.draining = False
        self.fenced = False
        self.suspect_until_ms = 0


class Request:
    __slots__ = ("arrived_ms", "deadline_ms", "granted_ms", "id", "lane", "lost_left", "seat", "unserved_left")

    def __init__(self, request: str, lane: "Lane", now_ms: int, deadline_ms: int) -> None:
        self.id = request
        self.lane = lane
        self.arrived_ms = now_ms
        self.granted_ms = now_ms
        self.deadline_ms = deadline_ms
        self.seat: Seat | None = None
        self.lost_left = LOST_RETRIES_MAX
        self.unserved_left = UNSERVED_RETRIES_MAX


class Lane:
    """One endpoint. Invariant: while something waits, no seat can take it."""

    __slots__ = (
        "arrivals", "endpoint", "in_flight", "ready_at_ms", "ready_ms", "reason", "removed", "reported", "seats",
        "service_ms", "state", "version", "waiting",
    )  # fmt: skip

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.version = -1
        self.state = EndpointState.CREATING
        self.ready_at_ms = 0
        self.reason = ""
        self.seats: list[Seat] = []
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.in_flight = 0
        self.arrivals = 0
        self.ready_ms = 0
        self.service_ms = 0
        self.reported = True
        self.removed = False
