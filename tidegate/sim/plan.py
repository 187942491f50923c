"""`plan`: by policy, the fewest accelerators that meet a target, beside a lower bound.

Found by galloping upwards from the bound (steps of 1, 2, 4, …) and then halving, so a policy that needs 30
accelerators costs about ten runs. A run ends as soon as it has missed more than the target allows of the whole trace,
which the small fleets do early. Both steps take more accelerators to be no worse; near the threshold runs may differ
from that by a few requests. With a pool, policies are searched beside each other.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tidegate.domain.endpoint import Deployment
from tidegate.sim import baselines, clairvoyant, trace
from tidegate.sim.api import build_world, deployments
from tidegate.sim.bound import Bound, lower_bound
from tidegate.sim.compute import Request
from tidegate.sim.meter import ENDPOINT_REQUESTS_MIN, Meter
from tidegate.sim.profile import FleetProfile, load

ACCELERATORS_MAX = 64
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
    allowed: dict[str, float]
    slo_ttft_ms: float
    progress: Progress | None

    def meets(self, policy: str, accelerators: int | None) -> int | None:
        """How many accelerators the run had if it met the target, else None."""
        setup = baselines.prepare(policy, self.profile, self.wanted, accelerators, self.path)
        judge = Judge(self.slo_ttft_ms, self.profile.tpot_ms, allowed=dict(self.allowed))
        progress = self.progress

        def tell(done: int) -> None:
            if progress is not None:
                progress(policy, setup.accelerators, done, self.summary.requests)

        tell(0)
        build_world(self.profile, setup, judge).run(trace.rows(self.path), tell, lambda: judge.broken)
        return None if judge.broken else setup.accelerators

    def tries(self, policy: str) -> "Tries":
        """What to try next, one after the other, told how many accelerators it had if it met the target, else None;
        returns the fewest that did.
        """
        met = None
        if policy == "dedicated":  # how many it has follows from the share of them its busiest minute may take
            for share in DEDICATED:
                met = yield share, None
                if met is not None:
                    return met
            return None
        failed, step = self.bound.accelerators - 1, 1
        while met is None and failed < ACCELERATORS_MAX:
            tried = min(failed + step, ACCELERATORS_MAX)
            met = yield policy, tried
            if met is None:
                failed, step = tried, step * 2
        while met is not None and met - failed > 1:
            middle = (failed + met) // 2
            if (yield policy, middle) is None:
                failed = middle
            else:
                met = middle
        return met

    def one_by_one(self, policies: Sequence[str]) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for policy in policies:
            tries, met = self.tries(policy), None
            while policy not in found:
                try:
                    met = self.meets(*tries.send(met))
                except StopIteration as end:
                    found[policy] = end.value
        return found

    def in_pool(self, policies: Sequence[str], pool: Executor) -> dict[str, int | None]:
        """One try of each policy at a time. Progress is told when a try begins."""
        found: dict[str, int | None] = {}
        silent = replace(self, progress=None)
        runs: dict[Future[int | None], tuple[str, Tries]] = {}

        def go_on(policy: str, tries: Tries, met: int | None) -> None:
            try:
                name, accelerators = tries.send(met)
            except StopIteration as end:
                found[policy] = end.value
                return
            runs[pool.submit(silent.meets, name, accelerators)] = (policy, tries)
            if self.progress is not None:
                self.progress(policy, accelerators, 0, self.summary.requests)

        for policy in policies:
            go_on(policy, self.tries(policy), None)
        while runs:
            for run in wait(runs, return_when=FIRST_COMPLETED).done:
                go_on(*runs.pop(run), run.result())
        return {policy: found[policy] for policy in policies}


Tries = Generator[tuple[str, int | None], int | None, int | None]
"""Yields (policy, accelerators), is sent the number of accelerators that met the target or None."""


def plan(
    trace_path: Path | str,
    *,
    fleet: Path | str | None = None,
    attainment: float = 0.99,
    slo_ttft_ms: float = 2_000.0,
    each_endpoint: bool = False,
    policies: Sequence[str] = baselines.POLICIES,
    pool: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """By policy the fewest accelerators that serve a share `attainment` of the requests within the SLO, and a bound.

    `each_endpoint` asks it of every endpoint with 100 requests or more, and of the rest together; the bound
    then also says what each needs alone. None where not even `ACCELERATORS_MAX` do. `keep_alive` is what giving idle
    places up costs over the clairvoyant's way. Raises Refusal for bad input, OSError for an unreadable file.
    """
    path = Path(trace_path)
    profile = load(Path(fleet) if fleet is not None else None)
    summary = trace.summarize(path)
    wanted = deployments(profile, summary, slo_ttft_ms)
    allowed = _allowed(summary, 1.0 - attainment, each_endpoint)
    bound = lower_bound(profile, path, allowed, slo_ttft_ms)
    search = _Search(profile, path, summary, wanted, bound, allowed, slo_ttft_ms, progress)
    return {
        "attainment": attainment,
        "slo_ttft_ms": slo_ttft_ms,
        "each_endpoint": each_endpoint,
        "policies": search.in_pool(policies, pool) if pool is not None else search.one_by_one(policies),
        "lower_bound": asdict(bound),
        "keep_alive": clairvoyant.report(path, fleet=fleet),
    }


def _allowed(summary: trace.TraceSummary, share: float, each_endpoint: bool) -> dict[str, float]:
    """How many may miss: of all, or of each endpoint with requests enough to tell, and of the rest together."""
    if not each_endpoint:
        return {"": summary.requests * share}
    totals = {name: t.requests for name, t in summary.endpoints.items()}
    allowed = {name: count * share for name, count in totals.items() if count >= ENDPOINT_REQUESTS_MIN}
    rest = sum(count for count in totals.values() if count < ENDPOINT_REQUESTS_MIN)
    return {**allowed, "": rest * share}
