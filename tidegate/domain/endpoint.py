"""What a tenant calls and what its owner asked for: tenants, API keys, models, deployments."""

from dataclasses import dataclass, field
from enum import StrEnum, auto


class Mode(StrEnum):
    SERVERLESS = auto()
    DEDICATED = auto()
    DEDICATED_SERVERLESS = auto()
    BATCH = auto()


class ModelKind(StrEnum):
    GENERATIVE = auto()
    EMBEDDING = auto()
    CLASSIFICATION = auto()


class EndpointState(StrEnum):
    """What people see. `ASLEEP` is shown with its tier; `IDLE` is ready without traffic."""

    CREATING = auto()
    LOADING = auto()
    READY = auto()
    IDLE = auto()
    ASLEEP = auto()
    WAKING = auto()
    DRAINING = auto()
    DEGRADED = auto()
    FAILED = auto()
    PAUSED = auto()


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    created_ms: int


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key is shown once; only `digest` (hex SHA-256 of the secret) is stored. `tenant` is None for an admin key."""

    id: str
    tenant: str | None
    digest: str
    hint: str
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What the fleet must know of a model to place it. Read off its files, never guessed.

    `weight_bytes` is what crosses the link on a wake; `kv_bytes_per_token` is over all layers of one replica.
    """

    source: str
    digest: str
    kind: ModelKind
    weight_bytes: int
    kv_bytes_per_token: int
    context_tokens_max: int
    params: int = 0

    @property
    def remote(self) -> bool:
        """Whether its weights must be fetched before a node has them on its disk."""
        return self.source.startswith(("hf://", "s3://"))


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets at `percentile` (99 = p99). TTFT counts from arrival, or beyond the prefill where a report says so."""

    ttft_ms: int = 2_000
    tpot_ms: int = 100
    percentile: int = 99


@dataclass(frozen=True, slots=True)
class Scaling:
    """How replicas follow demand; None: as this installation does.

    `headroom_slots`, `headroom_percent`: spare concurrency kept while there are requests, the larger of the two (the
    second of what is held and in flight). `up_window_ms`: how long more replicas must have been wanted before one more
    comes (never the first). `down_window_ms`: how long a surplus is kept after it was last needed; `zero_window_ms`:
    how long the last idle replica is.
    """

    headroom_slots: int = 0
    headroom_percent: int = 0
    up_window_ms: int = 0
    down_window_ms: int | None = None
    zero_window_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Overflow:
    """Where requests go that a busy endpoint should not serve itself. Exactly one threshold is set.

    `above_concurrency`: more than so many requests held and in flight; `above_queue_ms`: held longer than this;
    `above_ttft_ms`: expected to see its first token later than this. A gateway judges by what it sees itself.
    """

    to: str
    above_concurrency: int | None = None
    above_queue_ms: int | None = None
    above_ttft_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ScheduleEntry:
    """From when `cron` fires (five fields, UTC plus the offset) until another entry does, these bounds are in force."""

    cron: str
    min_replicas: int
    max_replicas: int
    utc_offset_minutes: int = 0


@dataclass(frozen=True, slots=True)
class Deployment:
    """An endpoint's desired state. `regions` is the ordered allow-list, home first; each apply raises `generation`.

    `accelerator_bytes` is reserved on each of `accelerators_per_replica` accelerators for one replica: weights, KV and
    workspace. `host_bytes` is what one sleeping replica keeps in host memory; `one_copy`: all replicas of the model on
    a node keep it together. `slots` is how many requests one replica takes at once; `concurrency_target` is where
    another replica is wanted (≤ slots). `movable`: its engine can wake on other accelerators of its node than those it
    slept on. `fallback`: the endpoint that serves what this one fails to.
    `canary` stands beside it and gets `canary_permille` of its requests; `previous` is what a rollback goes back to.
    `base`: this endpoint is a LoRA adapter (`model`) without replicas; those of `base` carry it.
    `schedule` overrides `min_replicas` and `max_replicas`, but never what a dedicated endpoint reserves.
    """

    endpoint: str
    tenant: str
    model: ModelProfile
    mode: Mode
    generation: int = 1
    min_replicas: int = 0
    max_replicas: int = 1
    concurrency_target: int = 8
    slots: int = 16
    accelerators_per_replica: int = 1
    accelerator_bytes: int = 0
    host_bytes: int = 0
    one_copy: bool = False
    slo: Slo = field(default_factory=Slo)
    regions: tuple[str, ...] = ("local",)
    engine: str = "builtin"
    engine_args: tuple[tuple[str, str], ...] = ()
    price_plan: str = "default"
    paused: bool = False
    created_ms: int = 0
    movable: bool = False
    overflow: Overflow | None = None
    fallback: str = ""
    lend: bool = False
    schedule: tuple[ScheduleEntry, ...] = ()
    scaling: Scaling = field(default_factory=Scaling)
    base: str = ""
    canary: "Deployment | None" = None
    canary_permille: int = 0
    previous: "Deployment | None" = None

    @property
    def reserved(self) -> int:
        """Replicas that are always resident and never a victim; a dedicated owner who lends lets go of idle ones."""
        if self.mode is not Mode.DEDICATED:
            return self.min_replicas
        return 0 if self.lend else max(self.min_replicas, 1)
