"""What a fleet is made of: regions hold nodes, nodes hold accelerators, a model's weights rest on a residency tier."""

from dataclasses import dataclass
from enum import StrEnum, auto


class Tier(StrEnum):
    """Residency tier: where a model's weights are on a node, fastest first."""

    ACCELERATOR = auto()
    HOST = auto()
    DISK = auto()
    REMOTE = auto()


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU, or a CPU accelerator with a configured memory budget. `memory_bytes` is what replicas may reserve."""

    id: str
    kind: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. `host_memory_bytes` is the budget for weights kept in (pinned) host memory, `disk_bytes` the
    weight cache's.
    """

    id: str
    region: str
    accelerators: tuple[Accelerator, ...]
    host_memory_bytes: int
    disk_bytes: int
