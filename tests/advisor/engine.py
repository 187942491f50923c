"""One replica of the simulator's continuous batching engine (`sim.compute`), fed a whole trace: what the advisor's
replay is measured against.
"""

import numpy as np

from tidegate.advisor.hardware import Accelerator, Model
from tidegate.advisor.traffic import Floats, Traffic
from tidegate.sim.compute import Compute, Engine, Request
from tidegate.sim.profile import GB, AcceleratorProfile, ModelSpec


def engine_ttft_ms(traffic: Traffic, model: Model, accelerator: Accelerator) -> tuple[Floats, float]:
    """TTFT of each request on one replica, and the share of time it had work."""
    hardware = AcceleratorProfile(
        accelerator.name, int(accelerator.memory_gb * 0.92 * GB), accelerator.gb_per_ms * GB, 1.0,
        accelerator.flop_per_ms, 0.0,
    )  # fmt: skip
    spec = ModelSpec(model.name, int(model.weights_gb * GB), model.params, int(model.kv_gb_per_token * GB))
    room = int((accelerator.memory_gb * 0.92 - 1.0 - model.weights_gb) * GB)
    compute = Compute(engines={"r": Engine(spec, hardware, room)})
    waiting = [
        Request(str(k), "e", float(traffic.t_ms[k]), int(traffic.inputs[k]), int(traffic.outputs[k]))
        for k in range(len(traffic))
    ]
    for request in waiting:
        while (upcoming := compute.due_ms()) <= request.arrived_ms:
            compute.collect(upcoming)
        compute.submit("r", request, request.arrived_ms)
    while (upcoming := compute.due_ms()) < float("inf"):
        compute.collect(upcoming)
    return np.array([r.first_ms - r.arrived_ms for r in waiting]), sum(compute.busy_ms.values()) / traffic.span_ms
