"""`plan`: by policy, the fewest accelerators that meet a target, beside a lower bound.

Found by galloping upwards from the bound (steps of 1, 2, 4, …) and then halving, so a policy that needs 30
accelerators costs about ten runs. A run ends as soon as it has missed more than the target allows of the whole trace,
which the small fleets do early. Both steps take more accelerators to be no worse; near the threshold runs may differ
from that by a few requests. Policies are searched beside each other in `jobs` processes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

from tidegate.domain.endpoint import Deployment
from tidegate.sim import baselines, clairvoyant, trace
from tidegate.sim.api import build_world, deployments
from tidegate.sim.bound import Bound, lower_bound
from tidegate.sim.compute import Request
from tidegate.sim.meter import ENDPOINT_REQUESTS_MIN, Meter
from tidegate.sim.profile import FleetProfile, load

ACCELERATORS_MAX = 64
PROGRESS_S = 0.2
DEDICATED = ("dedicated", "dedicated:0.5", "dedicated:0.35", "dedicated:0.25")

Progress = Callable[[str, int | None, int, int], None]
"""(policy, accelerators being tried, requests simulated, requests in the trace)"""


@dataclass(slots=True)
class Judge(Meter):
    """A meter that knows how many misses are allowed, of all requests or of each endpoint's, and when they are used up.

    `allowed` by endpoint; endpoints that are not in it share what is allowed under the key "".
    """

    allowed: dict[str, float] = field(default_factory=dict)
    broken: bool = False

    def count(self, request: Request, missed: str) -> bool:
        if missed:
            key = request.endpoint if request.endpoint in self.allowed else ""
            self.allowed[key] -= 1.0
            self.broken = self.broken or self.allowed[key] < 0.0
        return Meter.count(self, request, missed)


@dataclass(frozen=True, slots=True)
class _Search:
    """What every try of one `plan` has in common."""

    profile: FleetProfile
    path: Path
    summary: trace.TraceSummary
    wanted: list[Deployment]
    bound: Bound
    attainment: float
    each_endpoint: bool
    slo_ttft_ms: float
    progress: Progress | None

    def allowed(self) -> dict[str, float]:
        share = 1.0 - self.attainment
        if not self.each_endpoint:
            return {"": self.summary.requests * share}
        totals = {name: t.requests for name, t in self.summary.endpoints.items()}
        allowed = {name: count * share for name, count in totals.items() if count >= ENDPOINT_REQUESTS_MIN}
        rest = sum(count for count in totals.values() if count < ENDPOINT_REQUESTS_MIN)
        return {**allowed, "": rest * share}

    def meets(self, policy: str, accelerators: int | None) -> int | None:
        """How many accelerators the run had if it met the target, else None."""
        setup = baselines.prepare(policy, self.profile, self.wanted, accelerators, self.path)
        judge = Judge(self.slo_ttft_ms, self.profile.tpot_ms, allowed=self.allowed())
        progress = self.progress

        def tell(done: int) -> None:
            if progress is not None:
                progress(policy, setup.accelerators, done, self.summary.requests)

        tell(0)
        build_world(self.profile, setup, judge).run(trace.rows(self.path), tell, lambda: judge.broken)
        return None if judge.broken else setup.accelerators

    def fewest(self, policy: str) -> int | None:
        if policy == "dedicated":  # how many it has follows from the share of them its busiest minute may take
            return next((met for share in DEDICATED if (met := self.meets(share, None)) is not None), None)
        failed, step = self.bound.accelerators - 1, 1
        met = None
        while met is None and failed < ACCELERATORS_MAX:
            tried = min(failed + step, ACCELERATORS_MAX)
            met = self.meets(policy, tried)
            if met is None:
                failed, step = tried, step * 2
        while met is not None and met - failed > 1:
            middle = (failed + met) // 2
            if self.meets(policy, middle) is None:
                failed = middle
            else:
                met = middle
        return met


def plan(
    trace_path: Path | str,
    *,
    fleet: Path | str | None = None,
    attainment: float = 0.99,
    slo_ttft_ms: float = 2_000.0,
    each_endpoint: bool = False,
    policies: Sequence[str] = baselines.POLICIES,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """By policy the fewest accelerators that serve a share `attainment` of the requests within the SLO, and a bound.

    `each_endpoint` asks it of every endpoint with 100 requests or more, and of the rest together. None where not even
    `ACCELERATORS_MAX` do. `keep_alive` is what giving idle places up costs over the clairvoyant's way. Raises Refusal
    for bad input, OSError for an unreadable file.
    """
    path = Path(trace_path)
    profile = load(Path(fleet) if fleet is not None else None)
    summary = trace.summarize(path)
    wanted = deployments(profile, summary, slo_ttft_ms)
    bound = lower_bound(profile, path, attainment, slo_ttft_ms)
    search = _Search(profile, path, summary, wanted, bound, attainment, each_endpoint, slo_ttft_ms, progress)
    return {
        "attainment": attainment,
        "slo_ttft_ms": slo_ttft_ms,
        "each_endpoint": each_endpoint,
        "policies": _in_processes(search, policies, jobs) if jobs > 1 else {p: search.fewest(p) for p in policies},
        "lower_bound": {"name": bound.name, "accelerators": bound.accelerators},
        "keep_alive": clairvoyant.report(path, fleet=fleet),
    }


_said: Any = None  # in a worker: where its progress goes


def _hear(said: Any) -> None:
    global _said
    _said = said


def _fewest(search: _Search, policy: str) -> int | None:
    return replace(search, progress=lambda *what: _said.put(what)).fewest(policy)


def _in_processes(search: _Search, policies: Sequence[str], jobs: int) -> dict[str, int | None]:
    """One search a process, `jobs` at once. What they say of their progress is passed on while they run."""
    context = get_context("spawn")
    said, silent = context.Queue(), replace(search, progress=None)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_hear, initargs=(said,)) as pool:
        runs = {policy: pool.submit(_fewest, silent, policy) for policy in policies}
        while wait(runs.values(), timeout=0.0).not_done:
            try:
                what = said.get(timeout=PROGRESS_S)
            except Empty:
                continue
            if search.progress is not None:
                search.progress(*what)
        return {policy: run.result() for policy, run in runs.items()}
