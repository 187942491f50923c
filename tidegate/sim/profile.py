"""Hardware and models of a simulated fleet, read from TOML (shape: `fleets/*.toml`); every number carries its source
there. A fleet may name the accelerators and models of `fleets/hardware.toml` without describing them.

From it follow the durations of everything a node does: bytes ÷ bandwidth for each tier, prefill at 45 % of the dense
matrix rate, decode at weight and KV bytes ÷ memory bandwidth.
"""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tidegate.domain.errors import Refusal

PREFILL_EFFICIENCY = 0.45
WORKSPACE_BYTES = 1_000_000_000  # on each accelerator of a replica: activations of one chunk, and the process itself
FP8_BYTES_MAX = 1.2  # a parameter
GB = 1e9
FLEETS = Path(__file__).parent / "fleets"
# Accelerators whose nodes link all of them (NVLink and NVSwitch, from the vendor's data sheets), unless a fleet says.
LINKED = {"a100": 8, "h100": 8, "h200": 8, "b200": 8}


@dataclass(frozen=True, slots=True)
class AcceleratorProfile:
    name: str
    memory_bytes: int
    memory_bytes_per_ms: float
    link_bytes_per_ms: float
    dense_flop_per_ms: float
    usd_per_hour: float
    gang_max: int = 1  # how many a replica may span without slow links between them
    workspace_bytes: int = WORKSPACE_BYTES


@dataclass(frozen=True, slots=True)
class NodeProfile:
    accelerators: int = 8
    host_memory_bytes: int = int(1536 * GB)
    disk_bytes: int = int(15_000 * GB)
    disk_bytes_per_ms: float = 25e6
    start_ms: float = 8_000.0
    wake_fixed_ms: float = 150.0
    sleep_fixed_ms: float = 50.0  # unmapping physical pages; no copy where host memory still has the weights


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """`params` are those a token goes through: of a mixture of experts, the active ones. `fp8`: whether it computes in
    it; None: told by its bytes a parameter.
    """

    name: str
    weight_bytes: int
    params: float
    kv_bytes_per_token: int
    fp8: bool | None = None

    @property
    def flop_rate_factor(self) -> float:
        """One byte a parameter is fp8, whose dense matrix rate is twice that of bf16 on hardware that has it."""
        fp8 = self.weight_bytes <= FP8_BYTES_MAX * self.params if self.fp8 is None else self.fp8
        return 2.0 if fp8 else 1.0


@dataclass(frozen=True, slots=True)
class FleetProfile:
    accelerator: AcceleratorProfile
    node: NodeProfile
    models: dict[str, ModelSpec]
    endpoints: dict[str, str] = field(default_factory=dict)
    default_model: str = ""
    tpot_ms: float = 100.0

    def model_of(self, endpoint: str) -> ModelSpec:
        """Raises Refusal for an endpoint the fleet does not know, unless the fleet names a `default_model`."""
        name = self.endpoints.get(endpoint, self.default_model)
        if not name:
            raise Refusal("invalid_request", f"fleet: no model for endpoint {endpoint!r} in [endpoints]", param="fleet")
        return self.models[name]


def load(path: Path | None) -> FleetProfile:
    """The fleet of a file, or the built-in one (one model for every endpoint). Raises Refusal naming the key."""
    if path is None:
        path = FLEETS / "h200-qwen-14b.toml"
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise Refusal("invalid_request", f"{path.name}: {error}", param="fleet") from error
    return _Reader(path.name).fleet(table)


@cache
def _known() -> dict[str, Any]:
    with (FLEETS / "hardware.toml").open("rb") as file:
        return tomllib.load(file)


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name

    def fleet(self, table: dict[str, Any]) -> FleetProfile:
        own = self._table(table, "accelerator")
        kinds = {**_known()["accelerator"], **own}
        kind = table.get("node", {}).get("accelerator", next(iter(own), ""))
        if kind not in kinds:
            known = ", ".join(kinds)
            raise self._bad("node.accelerator", f"is {kind!r}; described or known are {known}")
        fp8 = bool(kinds[kind].get("fp8", True)) if isinstance(kinds[kind], dict) else True
        specs = {**_known()["model"], **self._table(table, "model")}
        models = {name: self._model(name, spec, fp8) for name, spec in specs.items()}
        endpoints = table.get("endpoints", {})
        default = table.get("default_model", "")
        for key, model in [*endpoints.items(), *([("default_model", default)] if default else [])]:
            if model not in models:
                raise self._bad(f"endpoints.{key}", f"names model {model!r}, which is not in [model]")
        tpot_ms = float(table.get("slo", {}).get("tpot_ms", 100.0))
        profile = self._accelerator(kind, kinds[kind])
        return FleetProfile(profile, self._node(table.get("node", {})), models, dict(endpoints), default, tpot_ms)

    def _accelerator(self, name: str, spec: dict[str, Any]) -> AcceleratorProfile:
        key = f"accelerator.{name}"
        share = self._number(spec, key, "usable_share", 0.92)
        if share > 1:
            raise self._bad(f"{key}.usable_share", "must be at most 1")
        return AcceleratorProfile(
            name=name,
            memory_bytes=int(self._number(spec, key, "memory_gb") * share * GB),
            memory_bytes_per_ms=self._number(spec, key, "memory_bandwidth_gb_s") * GB / 1e3,
            link_bytes_per_ms=self._number(spec, key, "host_to_device_gb_s") * GB / 1e3,
            dense_flop_per_ms=self._number(spec, key, "dense_tflops_bf16") * 1e12 / 1e3 * PREFILL_EFFICIENCY,
            usd_per_hour=self._number(spec, key, "usd_per_hour", 0.01),
            gang_max=int(self._number(spec, key, "gang_max", LINKED.get(name.lower(), 1))),
        )

    def _node(self, spec: dict[str, Any]) -> NodeProfile:
        start_s = self._number(
            spec, "node", "engine_start_template_s", self._number(spec, "node", "engine_start_s", 8.0)
        )
        return NodeProfile(
            accelerators=int(self._number(spec, "node", "accelerators", 8)),
            host_memory_bytes=int(self._number(spec, "node", "host_memory_gb", 1536.0) * GB),
            disk_bytes=int(self._number(spec, "node", "disk_gb", 15_000.0) * GB),
            disk_bytes_per_ms=self._number(spec, "node", "disk_read_gb_s", 25.0) * GB / 1e3,
            start_ms=start_s * 1e3,
            wake_fixed_ms=self._number(spec, "node", "wake_fixed_s", 0.15) * 1e3,
            sleep_fixed_ms=self._number(spec, "node", "sleep_fixed_s", 0.05) * 1e3,
        )

    def _model(self, name: str, spec: dict[str, Any], fp8: bool) -> ModelSpec:
        key = f"model.{name}"
        weights, params = self._number(spec, key, "weights_gb") * GB, self._number(spec, key, "params_b") * 1e9
        return ModelSpec(
            name=name,
            weight_bytes=int(weights),
            params=self._number(spec, key, "active_b", params / 1e9) * 1e9,
            kv_bytes_per_token=int(self._number(spec, key, "kv_bytes_per_token")),
            fp8=fp8 and weights <= FP8_BYTES_MAX * params,
        )

    def _table(self, table: dict[str, Any], key: str) -> dict[str, Any]:
        found = table.get(key, {})
        if not isinstance(found, dict):
            raise self._bad(key, "must be a table")
        return found

    def _number(self, spec: Any, key: str, name: str, default: float | None = None) -> float:
        value = spec.get(name, default) if isinstance(spec, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._bad(f"{key}.{name}", f"must be a number above 0, is {value!r}")
        return float(value)

    def _bad(self, key: str, what: str) -> Refusal:
        return Refusal("invalid_request", f"{self._name}: {key} {what}", param="fleet")
