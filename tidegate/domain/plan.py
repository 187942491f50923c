"""What the capacity core is told and what it says: every event in, every command out.

The live controller feeds real events and carries out the commands; the simulator feeds the same from a trace on a
virtual clock. Events are absolute (counts so far, not deltas), so a lost or doubled message does no harm.
"""

from dataclasses import dataclass

from tidegate.domain.endpoint import Deployment, EndpointState, ModelProfile
from tidegate.domain.fleet import Node
from tidegate.domain.replica import ReplicaState

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What a node reports of one replica. `accelerator_bytes` is measured on each of its accelerators, not assumed.

    `host_bytes` are its own in host memory; `copy_bytes` of the copy that all replicas of its model on the node share.
    `since_ms` is the node's instant at which `state` began, 0 if it does not say. `took_ms` is how long the step that
    led to `state` took (start, wake, sleep); `address` is where gateways reach it (``unix:PATH`` or ``tcp:HOST:PORT``),
    empty unless READY. `paused`: READY, and standing still for others.
    """

    replica: str
    endpoint: str
    node: str
    generation: int
    state: ReplicaState
    accelerators: tuple[str, ...] = ()
    accelerator_bytes: int = 0
    host_bytes: int = 0
    copy_bytes: int = 0
    took_ms: int = 0
    address: str = ""
    reason: str = ""
    since_ms: int = 0
    paused: bool = False


@dataclass(frozen=True, slots=True)
class EndpointApplied:
    deployment: Deployment


@dataclass(frozen=True, slots=True)
class EndpointRemoved:
    endpoint: str


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node is there (again). `replicas` is everything alive on it: what the core believed otherwise is corrected."""

    node: Node
    replicas: tuple[ReplicaStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLost:
    node: str


@dataclass(frozen=True, slots=True)
class GatewayJoined:
    gateway: str
    region: str


@dataclass(frozen=True, slots=True)
class GatewayLost:
    gateway: str


@dataclass(frozen=True, slots=True)
class DemandReported:
    """One gateway's view of one endpoint now. `arrivals_total` only grows while the gateway lives, so a request that
    came and went between two reports still counts. `oldest_wait_ms` is how long the first held request has waited;
    `busy` are the replicas on which the requests in flight are.
    """

    gateway: str
    endpoint: str
    queued: int
    in_flight: int
    arrivals_total: int
    oldest_wait_ms: int = 0
    busy: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FenceConfirmed:
    """`gateway` sends nothing more to `replica` and has nothing in flight on it.

    `fence` echoes the Drain it answers, so that one of a drain since called off is not taken for the next one's.
    """

    gateway: str
    replica: str
    fence: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaChanged:
    status: ReplicaStatus


@dataclass(frozen=True, slots=True)
class WeightsChanged:
    """Digests of all remote models that `node` has whole on its disk now."""

    node: str
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ManualAction:
    """An operator's word: `action` is ``wake`` or ``sleep``."""

    endpoint: str
    action: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent at the instant `FleetCore.next_tick_ms` named."""


Event = (
    EndpointApplied
    | EndpointRemoved
    | NodeJoined
    | NodeLost
    | GatewayJoined
    | GatewayLost
    | DemandReported
    | FenceConfirmed
    | ReplicaChanged
    | WeightsChanged
    | ManualAction
    | Tick
)

# --- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a command was given: the rule's name and what it saw. Goes to the audit log and the console as it is."""

    rule: str
    inputs: tuple[tuple[str, str | int | float], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.rule, *(f"{k}={v}" for k, v in self.inputs)])


@dataclass(frozen=True, slots=True)
class Start:
    """Start a new replica of `deployment` from disk. `accelerator_bytes` is reserved on each of `accelerators`."""

    replica: str
    node: str
    accelerators: tuple[str, ...]
    deployment: Deployment
    accelerator_bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring a sleeping replica back. The reservation was made before this command: a wake without one cannot be issued.

    `accelerators` are where it goes: the ones it slept on, unless its engine can move.
    """

    replica: str
    node: str
    accelerators: tuple[str, ...]
    accelerator_bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Drain:
    """Gateways: send `replica` nothing more, confirm the fence once nothing of yours is in flight on it.

    `fence` numbers the drains of one replica; the confirmation echoes it. `abort`: what is in flight is taken back and
    waits again.
    """

    replica: str
    node: str
    endpoint: str
    reason: Reason
    fence: int = 0
    abort: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """The drain is called off before anything was freed: the replica takes traffic again."""

    replica: str
    node: str
    endpoint: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Sleep:
    """Node: every gateway has confirmed the fence; give the accelerator memory back, keep the process (tier `host`)."""

    replica: str
    node: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Stop:
    """Node: end the process (tier `disk`)."""

    replica: str
    node: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Pause:
    """Node: a ready engine stands still from now on and keeps all it holds (`on`), or goes on where it was."""

    replica: str
    node: str
    on: bool
    reason: Reason


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Node: bring these weights from their source to the disk (tier `remote` → `disk`). Answered by WeightsChanged."""

    node: str
    model: ModelProfile
    reason: Reason


@dataclass(frozen=True, slots=True)
class Target:
    """A replica that takes traffic: up to `slots` requests at once."""

    replica: str
    address: str
    slots: int
    region: str = "local"


@dataclass(frozen=True, slots=True)
class Route:
    """Gateways: from now on `endpoint` is served by exactly these targets. Newer `version` wins.

    `eta_ms` is the honest estimate until capacity is there when there is none (for holds and Retry-After), 0 if
    unknown. `reason` is safe to show a tenant. While there is no target, requests are refused at once with the code
    `refusal`, if there is one.
    """

    endpoint: str
    version: int
    state: EndpointState
    targets: tuple[Target, ...]
    eta_ms: int = 0
    reason: str = ""
    refusal: str = ""


Command = Start | Wake | Drain | Resume | Sleep | Stop | Pause | Prefetch | Route
NodeCommand = Start | Wake | Sleep | Stop | Pause
