"""How fast a model is on an accelerator: the throughput curve, and how many requests at once keep within a TPOT limit.

The same roofline as the simulator's (`sim.compute`): prefill at 45 % of the dense matrix rate; a decode step of n
sequences reads the weights once and each one's KV, or is bound by the matrix rate. With n requests in service on one
replica, each of the others brings its own prefill once while this one decodes, so one token takes

    d(n) = step(n) + (n - 1) x mean prefill ÷ mean output tokens

and a replica that is always full completes n requests every (mean prefill + mean output x d(n)) ms.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tidegate.advisor.columns import refuse
from tidegate.advisor.traffic import Floats, Traffic
from tidegate.sim.compute import CHUNK_MS, GANG_EFFICIENCY
from tidegate.sim.profile import GB, PREFILL_EFFICIENCY

USABLE_SHARE = 0.92
WORKSPACE_GB = 1.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    name: str
    memory_gb: float
    gb_per_ms: float
    flop_per_ms: float
    fp8: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """A curve measured on one replica of `spread` accelerators, with prompts and answers of so many tokens.

    Lists are by point, ascending in `slots` (requests at once): output tokens a second together, TTFT and TPOT in ms.
    """

    accelerator: str
    spread: int
    prompt_tokens: int
    output_tokens: int
    slots: tuple[int, ...]
    tokens_per_s: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """`measured` takes the place of the roofline on its accelerator."""

    name: str
    weights_gb: float
    params: float
    kv_gb_per_token: float
    measured: Measured | None = None

    def flop_factor(self, accelerator: Accelerator) -> float:
        return 2.0 if accelerator.fp8 and self.weights_gb * GB <= 1.2 * self.params else 1.0


@cache
def known() -> tuple[Mapping[str, Accelerator], Mapping[str, Model]]:
    """The accelerators and models of hardware.toml by name."""
    table = tomllib.loads((Path(__file__).parent / "hardware.toml").read_text())
    accelerators = {
        name: Accelerator(
            name,
            float(row["memory_gb"]),
            row["memory_bandwidth_gb_s"] / 1e3,
            row["dense_tflops_bf16"] * 1e9 * PREFILL_EFFICIENCY,
            bool(row.get("fp8", False)),
        )
        for name, row in table["accelerator"].items()
    }
    models = {
        name: Model(name, float(row["weights_gb"]), row["params_b"] * 1e9, row["kv_bytes_per_token"] / GB)
        for name, row in table["model"].items()
    }
    return accelerators, models


def model_named(name: str) -> Model:
    """Raises Refusal with the known names."""
    models = known()[1]
    if name not in models:
        raise refuse(f"--model: {name[:40]!r} is not known; accepted: {', '.join(models)}")
    return models[name]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One replica's service of some traffic. Lists are by the number of requests in service, index 0 unused.

    `prefill_ms` is each request's own prefill on an idle replica, `tokens` its output tokens; `token_ms[n]` is what one
    output token takes with n in service; `stretch[n]` is how a prefill is stretched by others' decode steps. `slots`
    keep within the TPOT limit and the KV memory. `work_ms` is what each request takes of a full replica's time.
    """

    accelerator: str
    spread: int
    slots: int
    prefill_ms: list[float]
    tokens: list[float]
    token_ms: list[float]
    stretch: list[float]
    work_ms: Floats

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second of one full replica (0 for fixed-time work)."""
        return float(sum(self.tokens)) / float(self.work_ms.sum()) * 1e3

    @property
    def requests_per_hour(self) -> float:
        return 3.6e6 * len(self.work_ms) / float(self.work_ms.sum())


def fitting(model: Model, accelerator: Accelerator, spread_max: int) -> int | None:
    """The fewest accelerators a replica needs so that weights fit and as much again as a tenth is left for KV."""
    if model.measured is not None and model.measured.accelerator == accelerator.name:
        return model.measured.spread if model.measured.spread <= spread_max else None
    for spread in sorted(GANG_EFFICIENCY):
        if spread <= spread_max and _room_gb(model, accelerator, spread) >= 0.1 * model.weights_gb:
            return spread
    return None


def curve(
    traffic: Traffic, model: Model, accelerator: Accelerator, spread: int, tpot_ms: float, slots_max: int
) -> Curve | None:
    """None where not even one request alone keeps within `tpot_ms`."""
    if traffic.fixed_time:
        return _fixed(traffic, accelerator, slots_max)
    found = model.measured
    if found is not None and (found.accelerator, found.spread) == (accelerator.name, spread):
        return _as_measured(traffic, found, tpot_ms, slots_max)
    worth = spread * GANG_EFFICIENCY[spread]
    flop_ms = 2.0 * model.params / (accelerator.flop_per_ms * model.flop_factor(accelerator) * worth)
    prefill = (traffic.inputs - traffic.cached) * flop_ms
    outputs = traffic.outputs.astype(np.float64)
    mean_prefill, mean_output = float(prefill.mean()), float(outputs.mean())
    context = float((outputs * (traffic.inputs + outputs / 2)).sum() / outputs.sum())
    bandwidth = accelerator.gb_per_ms * worth
    room_gb = _room_gb(model, accelerator, spread)
    at_once = room_gb / (model.kv_gb_per_token * float((traffic.inputs + outputs).mean()))
    most = max(1, min(slots_max, int(at_once)))
    step = [
        max((model.weights_gb + n * context * model.kv_gb_per_token) / bandwidth, n * flop_ms) for n in range(most + 1)
    ]
    token_ms = [step[n] + max(0, n - 1) * mean_prefill / mean_output for n in range(most + 1)]
    slots = max((n for n in range(1, most + 1) if token_ms[n] <= tpot_ms), default=0)
    if not slots:
        return None
    return Curve(
        accelerator=accelerator.name,
        spread=spread,
        slots=slots,
        prefill_ms=prefill.tolist(),
        tokens=outputs.tolist(),
        token_ms=token_ms[: slots + 1],
        stretch=[1.0, 1.0] + [1.0 + step[n] / CHUNK_MS for n in range(2, slots + 1)],
        work_ms=prefill + outputs * step[slots] / slots,
    )


def _as_measured(traffic: Traffic, found: Measured, tpot_ms: float, slots_max: int) -> Curve | None:
    """The time of one full replica goes to prefill and to output tokens in the shares they had in the measurement, each
    of them in proportion to the tokens of a request. Between two points TPOT is taken as straight, before the first as
    the first's.
    """
    most = max(1, min(slots_max, found.slots[-1]))
    token_ms = np.interp(np.arange(most + 1), found.slots, found.tpot_ms)
    slots = max((n for n in range(1, most + 1) if token_ms[n] <= tpot_ms), default=0)
    if not slots:
        return None
    prefill_ms = found.ttft_ms[0] / found.slots[0]
    tokens_per_ms = float(np.interp(slots, found.slots, found.tokens_per_s)) / 1e3
    decode_ms = max(found.output_tokens / tokens_per_ms - prefill_ms, 0.0)
    prefill = (traffic.inputs - traffic.cached) * (prefill_ms / found.prompt_tokens)
    outputs = traffic.outputs.astype(np.float64)
    stretch = np.interp(np.arange(slots + 1), found.slots, found.ttft_ms) / found.ttft_ms[0]
    return Curve(
        accelerator=found.accelerator,
        spread=found.spread,
        slots=slots,
        prefill_ms=prefill.tolist(),
        tokens=outputs.tolist(),
        token_ms=token_ms[: slots + 1].tolist(),
        stretch=stretch.tolist(),
        work_ms=prefill + outputs * (decode_ms / found.output_tokens),
    )


def _fixed(traffic: Traffic, accelerator: Accelerator, slots_max: int) -> Curve:
    """Work of a given time: one request at a time (or `slots_max` side by side), each as long as it says."""
    count = max(1, slots_max)
    return Curve(
        accelerator=accelerator.name,
        spread=1,
        slots=count,
        prefill_ms=traffic.service_ms.tolist(),
        tokens=[0.0] * len(traffic),
        token_ms=[0.0] * (count + 1),
        stretch=[1.0] * (count + 1),
        work_ms=traffic.service_ms / count,
    )


def _room_gb(model: Model, accelerator: Accelerator, spread: int) -> float:
    """Memory for KV beside weights and workspace."""
    return accelerator.memory_gb * USABLE_SHARE * spread - model.weights_gb - WORKSPACE_GB * spread
