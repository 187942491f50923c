"""What an operator may set of the capacity core. Every bound carries its unit in its name."""

from dataclasses import dataclass, field

from tidegate.policy.costs import CostPriors


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """All in milliseconds unless named otherwise.

    `wait_ms_max`: an endpoint held longer than this with no replica makes even a busy endpoint's replica drain.
    `residency_ms_min`: a replica that became ready stays at least this long: until the requests it came for are seen on
    it. `idle_ms_max`: quiet longer than this, the accelerator is given back even when nobody asks for it.
    `stranded_ms`: without a node where it may run, an endpoint's requests are held for this long, then refused.
    `return_home_ms`: how often an endpoint that borrows in another region looks for room at home.
    `drain_ms`: what drain, fence and sleep of an idle replica are expected to take.
    `pause_ms_max`: how long a batch replica stands still for others before it ends (below the 300 s in which the
    watchdogs of vLLM and SGLang take an engine for dead).
    `victim_order`: "regret" (the policy), "lru" or "none" (nobody is evicted for another): baselines to compare with.
    `horizon_ms`: how far ahead regret looks. `prewarm`: endpoints may come up ahead of demand (by regret only).
    """

    wait_ms_max: int = 10_000
    residency_ms_min: int = 250
    idle_ms_max: int = 600_000
    stable_window_ms: int = 60_000
    horizon_ms: int = 300_000
    prewarm: bool = True
    drain_ms: int = 100
    drain_ms_max: int = 900_000
    start_ms_max: int = 900_000
    wake_ms_max: int = 180_000
    sleep_ms_max: int = 60_000
    stop_ms_max: int = 60_000
    pause_ms_max: int = 120_000
    backoff_ms_first: int = 1_000
    backoff_ms_max: int = 30_000
    failures_max: int = 3
    failure_forget_ms: int = 60_000
    nodes_examined_max: int = 4
    retries_per_event_max: int = 4
    first_loads_max: int = 2
    slept_accelerator_bytes_max: int = 64 << 20
    first_load: bool = True
    return_home_ms: int = 5_000
    stranded_ms: int = 10_000
    victim_order: str = "regret"
    priors: CostPriors = field(default_factory=CostPriors)

    def __post_init__(self) -> None:
        for name in ("wait_ms_max", "stable_window_ms", "horizon_ms", "backoff_ms_first", "failures_max"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        if self.victim_order not in ("regret", "lru", "none"):
            raise ValueError(f"victim_order {self.victim_order!r} is not regret, lru or none")
