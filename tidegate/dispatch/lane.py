"""What the waiting room keeps of an endpoint, a replica and a request."""

from tidegate.dispatch.elsewhere import Breaker, Ttft
from tidegate.dispatch.events import Arrived
from tidegate.dispatch.queue import FairQueue
from tidegate.domain.endpoint import EndpointState
from tidegate.domain.errors import LimitHit
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
    """`home` is where it was sent; `lane` where it waits or runs, `reason` why that is another. `elsewhere` is None as
    soon as it went: it goes once.
    """

    __slots__ = (
        "arrived_ms", "charged", "deadline_ms", "elsewhere", "granted_ms", "held", "home", "id", "lane", "late_ms",
        "lost_left", "queued_max", "reason", "seat", "tenant", "tokens", "unserved_left",
    )  # fmt: skip

    def __init__(self, arrived: Arrived, lane: "Lane", now_ms: int) -> None:
        self.id = arrived.request
        self.tenant = arrived.tenant
        self.tokens = arrived.tokens
        self.queued_max = arrived.queued_max
        self.late_ms = arrived.late_ms
        self.elsewhere = arrived.elsewhere
        self.home = self.lane = lane
        self.reason = ""
        self.arrived_ms = now_ms
        self.granted_ms = now_ms
        self.deadline_ms = arrived.deadline_ms
        self.seat: Seat | None = None
        self.held = False
        self.charged = 0
        self.lost_left = LOST_RETRIES_MAX
        self.unserved_left = UNSERVED_RETRIES_MAX


class Lane:
    """One endpoint. Invariant: while something waits, no seat can take it."""

    __slots__ = (
        "arrivals", "breaker", "endpoint", "in_flight", "ready_at_ms", "ready_ms", "reason", "refusal", "removed",
        "reported", "seats", "service_ms", "state", "stirred", "ttft", "version", "waiting",
    )  # fmt: skip

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.version = -1
        self.state = EndpointState.CREATING
        self.ready_at_ms = 0
        self.reason = ""
        self.refusal = ""
        self.seats: list[Seat] = []
        self.waiting: FairQueue[Request] = FairQueue()
        self.breaker = Breaker()
        self.ttft = Ttft()
        self.in_flight = 0
        self.arrivals = 0
        self.ready_ms = 0
        self.service_ms = 0
        self.reported = True
        self.stirred = False  # a replica began or ended to work since the last report
        self.removed = False

    def slots(self) -> int:
        return sum(seat.target.slots for seat in self.seats)

    def limit(self, code: str, queued_max: int) -> LimitHit | None:
        """Which limit a refusal with `code` hit, if one."""
        if code == "queue_full":
            return LimitHit("queue", len(self.waiting), queued_max)
        return LimitHit("capacity", self.in_flight, self.slots()) if code in ("capacity", "hold_expired") else None

    def closed(self) -> str | None:
        """Why nothing of this endpoint should wait, if so."""
        if self.removed:
            return "model_not_found"
        return None if self.seats else self.refusal or CLOSED.get(self.state)

    def free_seat(self, region: str, now_ms: int) -> Seat | None:
        """The least loaded target that can take one more, in `region` if there is one."""
        best: Seat | None = None
        best_rank = (True, 0.0)
        for seat in self.seats:
            target = seat.target
            if seat.draining or seat.in_flight >= target.slots or seat.suspect_until_ms > now_ms:
                continue
            rank = (target.region != region, seat.in_flight / target.slots)
            if best is None or rank < best_rank:
                best, best_rank = seat, rank
        return best

    def retry_after_ms(self, now_ms: int) -> int:
        """What is left of control's estimate while there is no capacity; from how long requests take while there is."""
        slots = self.slots()
        if not slots:
            return max(0, self.ready_at_ms - now_ms)
        return self.service_ms * (len(self.waiting) + 1) // slots
