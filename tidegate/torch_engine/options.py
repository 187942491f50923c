"""What an engine is started with: the order of one fork, or the arguments of a direct start."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SLOTS = 16
PREFILL_TOKENS_MAX = 128
WAITING_REQUESTS_MAX = 256


@dataclass(frozen=True, slots=True)
class Options:
    """`memory_bytes` caps weights and KV cache together, on each device; None: the KV cache may take half of what is
    available. `device`: see `devices.devices_of`. `host_copy` is the node's memfd for the master copy of the weights.

    `context_tokens_max` is an upper bound: the model's own context and what fits may be less (`/control/state` tells).
    `adapter_bytes_max` is set aside of the memory for LoRA adapters, and as much again for those of the running batch;
    0: this engine takes none.
    `lifeline` is a pipe's read end: when it reaches its end, the engine does.
    """

    model: Path
    socket: str
    name: str = ""
    memory_bytes: int | None = None
    context_tokens_max: int | None = None
    slots: int = SLOTS
    threads: int = 0
    prefill_tokens_max: int = PREFILL_TOKENS_MAX
    waiting_requests_max: int = WAITING_REQUESTS_MAX
    device: str = "auto"
    adapter_bytes_max: int = 0
    lifeline: int | None = None
    host_copy: int | None = None

    @property
    def threads_used(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def from_order(order: dict[str, Any]) -> Options:
    """Of one JSON order. Raises ValueError naming the field that is missing, unknown or of the wrong type."""
    known = {f.name for f in fields(Options)} - {"lifeline", "host_copy"}
    unknown = order.keys() - known
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r} in the order")
    for name in ("model", "socket"):
        if not isinstance(order.get(name), str) or not order[name]:
            raise ValueError(f"the order needs {name!r}, a text")
    for name, value in order.items():
        is_text = name in ("model", "socket", "name", "device")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if value is not None and not (isinstance(value, str) if is_text else whole):
            raise ValueError(f"{name!r} of the order has the wrong type")
    given = {name: value for name, value in order.items() if value is not None}
    given["model"] = Path(given["model"])
    for name in ("memory_bytes", "context_tokens_max"):
        if given.get(name) == 0:
            del given[name]
    return Options(**given)
