"""How long each step of a replica's life may take, and how much a node remembers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """Times in ms. A step that outlasts its bound is a fault: the engine is killed, and reported. `weights_ms`: how
    often the node looks at what is on its disk, which other nodes of this machine may share.
    """

    fetch_ms_max: int = 3_600_000
    start_ms_max: int = 120_000
    drain_ms_max: int = 60_000
    sleep_ms_max: int = 10_000
    wake_ms_max: int = 10_000
    canary_ms_max: int = 30_000
    stop_ms_max: int = 20_000
    measure_ms_max: int = 5_000
    weights_ms: int = 5_000
    reconnect_ms_min: int = 50
    reconnect_ms_max: int = 2_000
    commands_max: int = 64
    reports_max: int = 4_096
    gone_replicas_max: int = 256
