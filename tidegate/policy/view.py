"""What people are shown of the core's beliefs: frozen, built on demand, never read back by a decision."""

from dataclasses import dataclass

from tidegate.domain.endpoint import EndpointState, Mode
from tidegate.domain.fleet import Tier
from tidegate.domain.replica import ReplicaState


@dataclass(frozen=True, slots=True)
class ReplicaView:
    replica: str
    node: str
    accelerators: tuple[str, ...]
    state: ReplicaState
    generation: int
    accelerator_bytes: int
    host_bytes: int
    since_ms: int


@dataclass(frozen=True, slots=True)
class EndpointView:
    """`tier` is the nearest tier any replica is on; `eta_ms` as in the last Route; `required`: by demand."""

    endpoint: str
    mode: Mode
    state: EndpointState
    tier: Tier
    replicas: tuple[ReplicaView, ...]
    required: int
    queued: int
    in_flight: int
    eta_ms: int
    reason: str
    activation_ms: int
    failures: int


@dataclass(frozen=True, slots=True)
class AcceleratorView:
    node: str
    accelerator: str
    region: str
    capacity_bytes: int
    reserved_bytes: int
    residents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostView:
    """`on_disk` are the digests of fetched models."""

    node: str
    region: str
    capacity_bytes: int
    reserved_bytes: int
    on_disk: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetView:
    endpoints: tuple[EndpointView, ...]
    accelerators: tuple[AcceleratorView, ...]
    hosts: tuple[HostView, ...]
    gateways: tuple[str, ...]
    waiting: tuple[str, ...]
