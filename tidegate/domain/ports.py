"""Ports: what services need of the outside, as protocols. Adapters implement them; only `assemble` plugs them in.

Every method may raise the `Fault` its docstring names, and nothing else that is not a bug.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tidegate.domain.endpoint import ApiKey, Deployment, ModelProfile, Tenant
from tidegate.domain.fleet import Accelerator
from tidegate.domain.limits import Limits, Scope
from tidegate.domain.usage import UsageRecord


class Clock(Protocol):
    """Time, handed in so that tests and the simulator can hold it still."""

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        ...


# --- transports ---------------------------------------------------------------------------------------------------


class Link(Protocol):
    """An ordered, reliable, two-way stream of typed messages (`wire.internal`) between two services."""

    async def send(self, message: object) -> None:
        """Queue one message. Raises LinkFault when the link is closed or its outgoing bound is exceeded."""
        ...

    async def receive(self) -> object:
        """The next message. Raises LinkFault when the peer is gone."""
        ...

    async def close(self) -> None: ...

    @property
    def peer(self) -> str:
        """``role/name/region`` that the other side's certificate proves; empty on a link within this machine."""
        ...


class Listener(Protocol):
    async def accept(self) -> Link: ...

    async def close(self) -> None: ...


Connect = Callable[[], Awaitable[Link]]

# --- engines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Measured, in bytes: on each accelerator of the replica, in host memory that stays reserved for it, and of the
    copy in host memory that all replicas of its model on this node have together.
    """

    accelerator_bytes: int
    host_bytes: int
    copy_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StartOrder:
    """What a driver needs to bring up one engine. `accelerator_bytes` is a cap the engine must stay under."""

    replica: str
    deployment: Deployment
    accelerators: tuple[Accelerator, ...]
    accelerator_bytes: int


class Engine(Protocol):
    """One running engine process serving one replica. Every call is bounded in time; EngineFault on failure."""

    @property
    def address(self) -> str:
        """Where its OpenAI API listens: ``unix:PATH`` or ``tcp:HOST:PORT``. Never reachable by a tenant."""
        ...

    async def ready(self) -> None:
        """Returns once it answers requests. EngineFault with a safe reason if it never will."""
        ...

    async def drain(self) -> None:
        """Refuse new work and return when nothing is running."""
        ...

    async def sleep(self) -> Memory:
        """Give accelerator memory back; what it returns was measured after the fact. Refused while work runs."""
        ...

    async def wake(self) -> Memory: ...

    async def canary(self) -> str:
        """Digest of the greedy answer to a fixed prompt; must equal the one taken after the first load."""
        ...

    async def memory(self) -> Memory: ...

    def pause(self, on: bool) -> None:
        """Stand still at once and keep all it holds (nothing it is asked is answered then), or go on where it was."""
        ...

    async def stop(self) -> None:
        """End the process and wait until it is gone. Idempotent."""
        ...

    async def exited(self) -> str:
        """Waits for the process to end, however that happens; the reason, safe to show."""
        ...


class HeldWeights(Protocol):
    """A model's files on this node, kept from eviction until `release` (idempotent). `path` is their directory."""

    @property
    def path(self) -> str: ...

    def release(self) -> None: ...


class Weights(Protocol):
    """The weights of one node: its disk cache and what is read in place."""

    async def hold(self, model: ModelProfile, progress: Callable[[int], None]) -> HeldWeights:
        """Brings them here if they are not, telling `progress` in percent; verified. WeightFault when it cannot."""
        ...

    def present(self) -> tuple[str, ...]:
        """Digests of all fetched models that are here whole. Reads a directory."""
        ...


class EngineDriver(Protocol):
    """Starts engines of one kind. Never knows another driver."""

    @property
    def sleeps(self) -> bool:
        """Whether `sleep` really frees memory here; False: there is no `host` tier, stop and start are used."""
        ...

    @property
    def why_not(self) -> str:
        """Why `sleeps` is False, safe to show; empty while it is True."""
        ...

    async def start(self, order: StartOrder) -> Engine: ...

    async def close(self) -> None: ...


class AdapterInspector(Protocol):
    def inspect(self, source: str, base: str) -> ModelProfile:
        """Reads a LoRA adapter's files. Refusal("invalid_configuration") names what does not fit the model `base`."""
        ...


class ModelInspector(Protocol):
    def inspect(self, source: str) -> ModelProfile:
        """Reads a model's files. Refusal("invalid_configuration") names what is missing, truncated or not allowed."""
        ...


# --- stores -------------------------------------------------------------------------------------------------------


class Journal(Protocol):
    """Append-only, durable before it says so; the gateway's write-ahead log of usage records."""

    def append(self, record: UsageRecord) -> Awaitable[None]:
        """Resolves once the record is on disk (group fsync). StoreFault when it cannot be."""
        ...

    @property
    def healthy(self) -> bool:
        """False while the disk refuses writes: the gateway then refuses new work before it could lose a record."""
        ...


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the ledger has read one gateway's journal: (boot id, segment number, byte offset)."""

    boot: str
    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class JournalPage:
    """Records between two cursors of one boot. `closed` is True when that gateway is dead and nothing more will come.

    `damage` describes quarantined bytes (safe to show), empty when the page is clean.
    """

    records: tuple[UsageRecord, ...]
    next: Cursor
    closed: bool = False
    damage: str = ""


class JournalReader(Protocol):
    def boots(self) -> Sequence[str]:
        """Boot ids of every journal present, oldest first."""
        ...

    def read(self, cursor: Cursor, records_max: int) -> JournalPage: ...

    def forget(self, cursor: Cursor) -> None:
        """Delete segments wholly before `cursor`; the ledger has them."""
        ...


@dataclass(frozen=True, slots=True)
class State:
    """Everything the control plane must remember, at one version."""

    version: int
    tenants: tuple[Tenant, ...] = ()
    keys: tuple[ApiKey, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    limits: tuple[Limits, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One commit: things to put (whole) and ids to remove. Applied atomically or not at all."""

    put: tuple[Tenant | ApiKey | Deployment | Limits, ...] = ()
    remove_tenants: tuple[str, ...] = ()
    remove_deployments: tuple[str, ...] = ()
    remove_limits: tuple[tuple[Scope, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Activity:
    """One line of the audit log: a capacity decision or an operator's act, with its reason."""

    at_ms: int
    actor: str
    kind: str
    subject: str
    reason: str


class StateStore(Protocol):
    def load(self) -> State: ...

    def commit(self, expected_version: int, change: Change) -> State:
        """Compare-and-commit. Raises CommitConflict when the stored version is not `expected_version`."""
        ...

    def record(self, activity: Sequence[Activity]) -> None: ...

    def activity(self, limit: int, subject: str | None = None) -> Sequence[Activity]:
        """Newest first."""
        ...
