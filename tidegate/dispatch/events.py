"""What the waiting room is told and what it says. `Route`, `Drain`, `Resume` and `EndpointRemoved` are events, too."""

from dataclasses import dataclass

from tidegate.dispatch.elsewhere import Elsewhere
from tidegate.domain.errors import LimitHit
from tidegate.domain.plan import Drain, EndpointRemoved, Resume, Route, Target

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request wants a replica. `deadline_ms` is the instant it gives up; not after now means it does not wait.

    `tokens` is an estimate of what it will count for between `tenant` and the others; from `late_ms` on (0: never) it
    can no longer be served in time (see `queue`).
    """

    request: str
    endpoint: str
    deadline_ms: int
    queued_max: int
    tenant: str = ""
    tokens: int = 0
    elsewhere: Elsewhere | None = None
    late_ms: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The request is over, wherever it was: answered, or its client went away (held or running).

    `first_byte_ms` is the instant its answer began, 0 if it never did; `tokens` what it counts for.
    """

    request: str
    first_byte_ms: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Returned:
    """The target did not serve the request and the client has seen nothing: it may be granted again. `lost` is True
    when the engine died, False when it said that it takes no work (asleep, draining, full).
    """

    request: str
    lost: bool


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """A new link to control: its versions start anew, and what it lists is not draining."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The instant `next_deadline_ms` named has come."""


Event = Arrived | Ended | Returned | Route | Drain | Resume | EndpointRemoved | SessionStarted | Deadline

# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """Send `request` to `target`. It waited `held_ms`, `activation_ms` of that without any replica.

    `endpoint` serves it; where that is not the one it was sent to, `reason` says why.
    """

    request: str
    target: Target
    held_ms: int = 0
    activation_ms: int = 0
    endpoint: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer `request` with the refusal `code`; `retry_after_ms` is an estimate, 0 when there is none."""

    request: str
    code: str
    reason: str = ""
    retry_after_ms: int = 0
    limit: LimitHit | None = None
    held_ms: int = 0


@dataclass(frozen=True, slots=True)
class ReportDemand:
    """`demand(endpoint)` has changed since it was read; `urgent` when something waits and nothing is there to serve, or
    when the endpoint has become idle while something waits elsewhere, perhaps for its place.
    """

    endpoint: str
    urgent: bool


@dataclass(frozen=True, slots=True)
class ConfirmFence:
    """Nothing of this gateway is in flight on `replica`, and nothing more will be."""

    replica: str


Effect = Grant | Refuse | ReportDemand | ConfirmFence


@dataclass(frozen=True, slots=True)
class Demand:
    """One endpoint now; the fields of `plan.DemandReported`."""

    queued: int
    in_flight: int
    arrivals_total: int
    oldest_wait_ms: int
    busy: tuple[str, ...] = ()
