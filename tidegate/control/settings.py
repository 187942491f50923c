"""What the control plane is told at assembly. Plain values: nobody here reads configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.control.engines import BUILTIN, EngineTraits
from tidegate.control.tuning import Profiles, shipped
from tidegate.domain.units import MIB
from tidegate.wire.internal import RemoteTarget


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """Defaults and bounds of deployments.

    `workspace_bytes` is reserved on each accelerator beyond weights and KV. Until measured, a start is estimated as
    `start_ms_base` + weights ÷ `load_bytes_per_s` (a cold disk's); it must fit in `start_ms_max`, and a hold
    (`hold_ms_max`, 0 = never hold) must outlast it. An eviction undone within `thrash_ms` counts as thrash.
    `profiles` reads the tuning profiles there are. `runner_digest` is the hex SHA-256 of the batch runner's key.
    `relay_address` (``tls:HOST:PORT/ROLE/NAME``) is where gateways on other machines reach engines of this one.
    """

    region: str = "local"
    engines: Mapping[str, EngineTraits] = field(default_factory=lambda: {"builtin": BUILTIN})
    providers: Mapping[str, RemoteTarget] = field(default_factory=dict)
    slots: int = 8
    context_tokens_max: int = 4_096
    workspace_bytes: int = MIB
    start_ms_max: int = 120_000
    start_ms_base: int = 2_000
    load_bytes_per_s: int = 500 * MIB
    hold_ms_max: int = 150_000
    queued_max: int = 512
    thrash_ms: int = 60_000
    runner_digest: str = ""
    profiles: Profiles = shipped
    relay_address: str = ""
