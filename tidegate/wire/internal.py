"""Messages between tidegate's own services, and their one encoding: a line of ``NAME SPACE JSON``.

The capacity core's events and commands (`domain.plan`) travel as they are; what only a gateway needs is defined here.
"""

from dataclasses import dataclass, field

import msgspec

from tidegate.domain import plan
from tidegate.domain.contract import Contract
from tidegate.domain.endpoint import Mode, ModelKind, Overflow, Slo
from tidegate.domain.errors import LinkFault
from tidegate.domain.limits import Lease, Limits
from tidegate.domain.price import PriceVersion
from tidegate.wire.joining import Joining

MESSAGE_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class GatewayHello:
    """First message of a gateway on its link. `gateway` is its boot id, new at each start."""

    gateway: str
    region: str


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What a gateway needs to know a key: the hex SHA-256 of its secret, never the secret. `tenant` None = admin.

    `runner` is the batch runner's own key: it acts for the tenant, key and line that its ``x-tidegate-batch`` names.
    """

    digest: str
    id: str
    tenant: str | None
    expires_ms: int | None = None
    revoked: bool = False
    runner: bool = False


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """An OpenAI-compatible API elsewhere that serves an endpoint in place of replicas; no node, no accelerator.

    `url` is the API's base (``https://host/v1``), `model` what it is called there. `key` says where a gateway finds the
    secret, never the secret itself: ``env:NAME``, ``file:/PATH``, or empty where none is needed. `ca_file` names other
    certificate authorities than the machine's. At most `concurrency_max` requests are there at once from one gateway.
    `region` is where it computes, for residency.
    """

    provider: str
    url: str
    model: str
    key: str = ""
    ca_file: str = ""
    concurrency_max: int = 16
    connect_ms_max: int = 5_000
    first_byte_ms_max: int = 60_000
    metering: str = "usage_event"
    context_tokens_max: int = 131_072
    region: str = "remote"
    paused: bool = False


@dataclass(frozen=True, slots=True)
class EndpointEntry:
    """What a gateway needs to know of an endpoint besides its routes. `shared` endpoints serve every tenant.

    `metering` says how delivered output tokens are counted: ``sse_id`` (events are numbered, built-in engine),
    ``usage_continuous`` (every event carries OpenAI usage when asked: vLLM, SGLang), ``timings`` (every event carries
    llama.cpp's own counts when asked) or ``usage_event`` (usage comes once, at the end). `cache_salt`: the engine
    shares cached prefixes only within a salt, which the gateway sets to the tenant's. `remote` endpoints have no
    replicas: a gateway routes to the target itself, like to a replica of `concurrency_max` slots that is always ready.
    `serves` names the endpoint whose batch lines this one does, or whose canary it is; usage is then recorded under
    that name. The endpoint `canary` gets `canary_permille` of this one's requests.
    `resident`: it always has a replica, so that having none means it failed. `base`: it is an adapter, which replicas
    of that endpoint serve when asked with the header `adapter` (``DIGEST FOLDER``).
    """

    endpoint: str
    tenant: str
    model: str
    kind: ModelKind
    mode: Mode
    generation: int
    context_tokens_max: int
    created_ms: int
    shared: bool = False
    hold_ms_max: int = 120_000
    queued_max: int = 512
    metering: str = "sse_id"
    remote: RemoteTarget | None = None
    cache_salt: bool = False
    overflow: Overflow | None = None
    fallback: str = ""
    resident: bool = False
    slo: Slo = field(default_factory=Slo)
    canary: str = ""
    canary_permille: int = 0
    serves: str = ""
    base: str = ""
    adapter: str = ""
    price_plan: str = "default"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Who may call what: replaces the gateway's previous one whole when `version` is newer. `batch` are lanes for batch
    lines, which only the runner reaches. `limits` are of keys, tenants and endpoints.
    """

    version: int
    keys: tuple[KeyEntry, ...]
    endpoints: tuple[EndpointEntry, ...]
    batch: tuple[EndpointEntry, ...] = ()
    limits: tuple[Limits, ...] = ()


@dataclass(frozen=True, slots=True)
class Gateways:
    """How many gateways share every limit."""

    count: int


@dataclass(frozen=True, slots=True)
class PriceList:
    """The whole price book: what a gateway reserves and settles with."""

    versions: tuple[PriceVersion, ...]


@dataclass(frozen=True, slots=True)
class RefusingContracts:
    """Every contract that refuses what it does not cover and is not over, in the order in which they pay."""

    contracts: tuple[Contract, ...]


@dataclass(frozen=True, slots=True)
class BudgetLeases:
    """What a gateway may spend, for `good_ms` from now (of all its leases). `number` counts up on a link; to be
    answered with BudgetUse.
    """

    number: int
    good_ms: int
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """The leases a gateway acts on, having received everything up to message `number`, and what it has used of them."""

    gateway: str
    number: int
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceReported:
    """What a gateway has counted for an endpoint since it started: `served` requests were answered, `attained` of them
    within the endpoint's SLO, `failed` were not answered through no fault of their client. A `baseline` is told at the
    beginning of a link, for what was counted before it.
    """

    gateway: str
    endpoint: str
    served: int
    attained: int
    failed: int
    baseline: bool = False


Message = (
    GatewayHello
    | ServiceReported
    | Catalog
    | Gateways
    | PriceList
    | RefusingContracts
    | BudgetLeases
    | BudgetUse
    | plan.NodeJoined
    | plan.ReplicaChanged
    | plan.WeightsChanged
    | plan.DemandReported
    | plan.FenceConfirmed
    | plan.Start
    | plan.Wake
    | plan.Sleep
    | plan.Stop
    | plan.Pause
    | plan.Prefetch
    | plan.Drain
    | plan.Resume
    | plan.Route
    | Joining
)

_TYPES: dict[str, type] = {t.__name__: t for t in Message.__args__}
_DECODERS: dict[bytes, msgspec.json.Decoder[Message]] = {
    name.encode(): msgspec.json.Decoder(kind) for name, kind in _TYPES.items()
}
_encode = msgspec.json.Encoder().encode


def encode(message: Message) -> bytes:
    """One frame, newline included. JSON escapes newlines, so a frame never contains another."""
    return type(message).__name__.encode() + b" " + _encode(message) + b"\n"


def decode(frame: bytes) -> Message:
    """Raises LinkFault for a frame this version does not know."""
    name, _, body = frame.rstrip(b"\n").partition(b" ")
    decoder = _DECODERS.get(name)
    if decoder is None:
        raise LinkFault(f"unknown message {name[:40]!r}")
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise LinkFault(f"malformed {name.decode()} message") from error
