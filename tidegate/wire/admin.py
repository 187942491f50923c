"""The admin API (`/api/v1`): who is asking, what may be asked, what is answered. Pure.

Requests refuse unknown fields by name. Memory is in bytes unless a field takes text such as ``"512MiB"``; instants are
epoch milliseconds.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Generic, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tidegate.domain.endpoint import EndpointState, Mode, ModelKind
from tidegate.domain.errors import Refusal
from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState

# Python's $ also matches before a trailing newline; the look-ahead forbids it and means the same in JSON Schema.
NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$(?!\n)"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Count = Annotated[int, Meta(ge=1, le=1024)]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks: the key's id and its tenant; `tenant` None is an administrator."""

    key: str
    tenant: str | None

    @property
    def admin(self) -> bool:
        return self.tenant is None

    def may_read(self, tenant: str) -> bool:
        return self.tenant is None or self.tenant == tenant


# --- requests -----------------------------------------------------------------------------------------------------


class Request(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of every request body."""


class TenantCreate(Request, frozen=True):
    id: Name


class KeyCreate(Request, frozen=True):
    """A key of `tenant`, or an administrator's when `admin` is true: exactly one of the two."""

    tenant: Name | None = None
    admin: bool = False
    expires_in_s: Annotated[int, Meta(ge=1, le=10 * 365 * 86_400)] | None = None


class SloBody(Request, frozen=True):
    ttft_ms: Annotated[int, Meta(ge=1, le=3_600_000)] = 2_000
    tpot_ms: Annotated[int, Meta(ge=1, le=3_600_000)] = 100
    percentile: Annotated[int, Meta(ge=50, le=99)] = 99


class OverflowBody(Request, frozen=True):
    """Where requests go that find this endpoint busy; one threshold. `to`: an endpoint, or a mode (the first of it)."""

    to: Annotated[str, Meta(min_length=3, max_length=130)]
    above_concurrency: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    above_queue_ms: Annotated[int, Meta(ge=0, le=3_600_000)] | None = None
    above_ttft_ms: Annotated[int, Meta(ge=1, le=3_600_000)] | None = None


class FallbackBody(Request, frozen=True):
    """The endpoint (or mode, as in `overflow`) that serves what this one fails to; left out, the one of `overflow`."""

    to: Annotated[str, Meta(min_length=3, max_length=130)]


class CanaryBody(Request, frozen=True):
    """Another model for a share (`weight`, 0 to 1) of an endpoint's requests; also called as ``tenant/name:canary``."""

    model: Annotated[str, Meta(min_length=1, max_length=4_096)]
    weight: Annotated[float, Meta(ge=0, le=1)]


class ScheduleBody(Request, frozen=True):
    """From when `cron` (minute hour day month weekday) fires until another entry's does, these bounds are in force."""

    cron: Annotated[str, Meta(min_length=9, max_length=200)]
    min_replicas: Annotated[int, Meta(ge=0, le=1024)]
    max_replicas: Count
    utc_offset_minutes: Annotated[int, Meta(ge=-720, le=840)] = 0


class ScalingBody(Request, frozen=True):
    """How replicas follow demand; a window left out is the installation's. Headroom is the larger of slots and percent
    (of what is held and in flight).
    """

    headroom_slots: Annotated[int, Meta(ge=0, le=100_000)] = 0
    headroom_percent: Annotated[int, Meta(ge=0, le=1_000)] = 0
    up_window_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 0
    down_window_ms: Annotated[int, Meta(ge=0, le=86_400_000)] | None = None
    zero_window_ms: Annotated[int, Meta(ge=0, le=604_800_000)] | None = None


class EndpointApply(Request, frozen=True):
    """An endpoint's whole desired state: what is left out gets its default, not its previous value.

    `model` is a directory in Hugging Face layout (a path or ``file://`` URL). `accelerator_memory` overrides the
    footprint computed from the model (bytes, or text such as ``"512MiB"``). `regions` is the ordered allow-list, home
    first. `profile` names a tuning profile for what of `slots` and `engine_args` is left out. With `base` it is a LoRA
    adapter (`model`, in PEFT's layout) on that endpoint's replicas: only `slo` and `price_plan` may be given beside.
    """

    model: Annotated[str, Meta(min_length=1, max_length=4_096)]
    mode: Mode = Mode.DEDICATED_SERVERLESS
    min_replicas: Annotated[int, Meta(ge=0, le=1024)] | None = None
    max_replicas: Count | None = None
    concurrency_target: Count | None = None
    slots: Count | None = None
    context_tokens: Annotated[int, Meta(ge=16, le=1 << 30)] | None = None
    accelerators_per_replica: Count = 1
    accelerator_memory: Annotated[int, Meta(ge=1, le=1 << 50)] | str | None = None
    slo: SloBody = SloBody()
    regions: Annotated[list[Name], Meta(min_length=1, max_length=64)] | None = None
    engine: str = "builtin"
    engine_args: dict[str, str] = {}
    profile: Annotated[str, Meta(max_length=64)] = ""
    price_plan: Name = "default"
    paused: bool = False
    overflow: OverflowBody | None = None
    fallback: FallbackBody | None = None
    lend: bool = False
    schedule: Annotated[list[ScheduleBody], Meta(max_length=32)] = []
    scaling: ScalingBody = ScalingBody()
    base: Annotated[str, Meta(min_length=3, max_length=130)] | None = None
    canary: CanaryBody | None = None


# --- answers ------------------------------------------------------------------------------------------------------

T = TypeVar("T")


class Listing(Struct, Generic[T], frozen=True):
    data: list[T]


class TenantView(Struct, frozen=True):
    id: str
    created_ms: int


class KeyView(Struct, frozen=True, kw_only=True):
    """A key without its secret: `hint` is its last characters. `state` is active | expired | revoked."""

    id: str
    tenant: str | None
    admin: bool
    hint: str
    state: str
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None


class KeyCreated(KeyView, frozen=True, kw_only=True):
    """The only time `secret` is ever shown; its SHA-256 is what is kept."""

    secret: str


class ModelView(Struct, frozen=True):
    source: str
    digest: str
    kind: ModelKind
    params: int
    weight_bytes: int
    kv_bytes_per_token: int
    context_tokens_max: int


class ReplicaView(Struct, frozen=True):
    id: str
    node: str
    accelerators: list[str]
    state: ReplicaState
    generation: int
    accelerator_bytes: int
    host_bytes: int
    since_ms: int


class LimitsView(Struct, frozen=True):
    """`queued_max` requests wait at most `hold_ms_max` milliseconds each for capacity."""

    queued_max: int
    hold_ms_max: int
    context_tokens_max: int


class ConcurrencyView(Struct, frozen=True):
    """How many requests are served at once: `current`ly by the replicas that are ready, `full`y scaled by all."""

    current: int
    full: int


class BoundView(Struct, frozen=True):
    """Measured activations from one tier: of the last `count`, half took at most `p50_ms`, and so on."""

    count: int
    p50_ms: int
    p95_ms: int
    p99_ms: int


class SloView(Struct, frozen=True):
    """How the SLO was kept over one window, as shares; null without requests. `error_budget` is what is left of the
    misses that the SLO's percentile allows, below 0 when it is overdrawn.
    """

    requests: int
    attainment: float | None
    availability: float | None
    error_budget: float | None


class CanaryView(Struct, frozen=True, kw_only=True):
    """A canary as desired and as it is; `slo_status` is of its own requests."""

    model: ModelView
    weight: float
    generation: int
    state: EndpointState
    reason: str
    concurrency: ConcurrencyView
    slo_status: dict[str, SloView]


class EndpointView(Struct, frozen=True, kw_only=True):
    """An endpoint as desired and as it is. `tier` is the best its weights have anywhere. Bytes are per accelerator.

    `activation_ms_last` is from the first request that found no capacity (or the command, if none waited) to ready;
    `activation_bounds` are the same by the tier it came from. `rollback_to` is the generation that a rollback goes back
    to. `slo_status` is by window (5m, 1h, 24h, 30d), measured since `slo_since_ms`.
    """

    name: str
    tenant: str
    state: EndpointState
    tier: Tier
    reason: str
    mode: Mode
    model: ModelView
    generation: int
    min_replicas: int
    max_replicas: int
    concurrency_target: int
    slots: int
    accelerators_per_replica: int
    accelerator_bytes: int
    slo: SloBody
    regions: list[str]
    engine: str
    engine_args: dict[str, str]
    price_plan: str
    paused: bool
    created_ms: int
    overflow: OverflowBody | None = None
    fallback: FallbackBody | None = None
    lend: bool = False
    schedule: list[ScheduleBody] = []
    scaling: ScalingBody = ScalingBody()
    base: str | None = None
    limits: LimitsView
    concurrency: ConcurrencyView
    activation_bounds: dict[str, BoundView]
    slo_status: dict[str, SloView]
    slo_since_ms: int
    canary: CanaryView | None
    rollback_to: int | None
    replicas: list[ReplicaView]
    queued: int
    in_flight: int
    eta_ms: int
    activations: int
    activation_ms_last: int | None = None


class ResidentView(Struct, frozen=True):
    """What one replica has reserved on an accelerator."""

    replica: str
    endpoint: str
    state: ReplicaState
    bytes: int


class AcceleratorView(Struct, frozen=True):
    id: str
    kind: str
    memory_bytes: int
    reserved_bytes: int
    residents: list[ResidentView]


class NodeView(Struct, frozen=True):
    """A node and its budgets; `joined_ms` is when its present link was made, `on_disk` digests of fetched models."""

    id: str
    region: str
    joined_ms: int
    host_memory_bytes: int
    host_reserved_bytes: int
    disk_bytes: int
    accelerators: list[AcceleratorView]
    on_disk: list[str] = []


class ActivityView(Struct, frozen=True):
    """One line of the audit log. `actor` is ``core`` (a rule decided), ``node``, or ``key:ID`` (a person did)."""

    at_ms: int
    actor: str
    kind: str
    subject: str
    reason: str


class StatusView(Struct, frozen=True):
    status: str


class LimitBody(Struct, frozen=True):
    kind: str
    current: int
    full: int


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str
    limit: LimitBody | UnsetType = UNSET


class ErrorBody(Struct, frozen=True):
    """OpenAI's error shape, so that official SDKs raise their own exception classes."""

    error: ErrorDetail


# --- decoding -----------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Struct)

_PATH = re.compile(r" - at `\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")


def decode(body: bytes, kind: type[R]) -> R:
    """`body` as a `kind`. Raises Refusal invalid_json, or invalid_request naming the field and what is accepted."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal("invalid_json", "the body is not valid JSON") from None


def _refusal(text: str, kind: type[Struct]) -> Refusal:
    place = _PATH.search(text)
    path, message = (place[1], text[: place.start()]) if place else ("", text)
    if unknown := _UNKNOWN.search(message):
        path, message = f"{path}.{unknown[1]}".lstrip("."), "unknown field"
    elif missing := _MISSING.search(message):
        path, message = f"{path}.{missing[1]}".lstrip("."), "required field is missing"
    elif "matching regex" in message:
        message = "not a name"
    subject = f"`{path}`: " if path else ""
    return Refusal("invalid_request", f"{subject}{message}{_accepted(kind, path)}", param=path or None)


def _accepted(kind: type[Struct], path: str) -> str:
    """`` (accepted: a, b)`` when the field is one of a few words, or the pattern in words when it is a name."""
    for field in msgspec.structs.fields(kind):
        if field.encode_name != path.split(".")[0].split("[")[0]:
            continue
        if isinstance(field.type, type) and issubclass(field.type, Enum):
            return f" (accepted: {', '.join(str(member.value) for member in field.type)})"
        if Name in (field.type, *get_args(field.type)):
            return " (accepted: 1 to 63 of a-z 0-9 . _ - starting and ending with a letter or digit)"
    return ""
