"""Batch work in the simulator: one job of many lines on what real-time traffic leaves idle, through the same core and
dispatch.

The job is an endpoint of mode batch, the lowest class. Its runner keeps as many lines asked as its ready replicas take,
and those of one more, so that another replica is wanted. A line whose replica was taken away is asked again from its
beginning; each line ends exactly once, or is left when the run ends.

*Harvest* is the tokens of lines that ended ÷ what the idle accelerator time could have done: the time, from the job's
beginning to its end (or the run's), in which an accelerator computed nothing for real-time requests, times the rate
at which an accelerator does these lines when it has nothing else to do, keeps its replica and is never interrupted.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile, Slo
from tidegate.domain.errors import Refusal
from tidegate.sim import trace
from tidegate.sim.compute import Compute, Engine, Request
from tidegate.sim.profile import FleetProfile, ModelSpec

LINES_MAX = 1_000_000
SLOTS = 32  # at once: beyond this a 14B's decode gains little, and its KV would crowd others out
RATE_MS = 600_000.0
REPLICAS_MAX = 64

Line = tuple[int, int]
"""(input tokens, output tokens)"""


class LineLost(AssertionError):
    """A line ended twice, or one that was never asked."""


@dataclass(slots=True)
class Job:
    """Lines, in order, and how far they are. `open` are those asked, by request id; `again` those to be asked again.

    After a refusal (its endpoint fails) nothing is asked until `paused_until_ms`. `began_ms` and `ended_ms` are
    instants of the run, -1 before; `live_ms` is what accelerators had spent on real-time requests when it began and,
    once it ended, how much they spent in between.
    """

    endpoint: str
    lines: list[Line]
    slots: int
    rate: float
    """Tokens (input and output) one accelerator does alone in a millisecond."""
    asked: int = 0
    done: int = 0
    tokens: int = 0
    preempted: int = 0
    began_ms: float = -1.0
    ended_ms: float = -1.0
    live_ms: float = 0.0
    paused_until_ms: float = 0.0
    open: dict[str, Line] = field(default_factory=dict)
    again: deque[Line] = field(default_factory=deque)

    def next(self) -> Line | None:
        """The next line to ask."""
        if self.again:
            return self.again.popleft()
        if self.asked == len(self.lines):
            return None
        self.asked += 1
        return self.lines[self.asked - 1]

    def finished(self, request: Request) -> None:
        if self.open.pop(request.id, None) is None:
            raise LineLost(f"line of request {request.id} ended twice or was never asked")
        self.done += 1
        self.tokens += request.input_tokens + request.output_tokens

    def lost(self, request: Request) -> bool:
        """Whether it is a line of this job, which begins anew: nobody has seen a part of its answer."""
        if request.id not in self.open:
            return False
        self.preempted += 1
        request.first_ms = -1.0
        return True

    def refused(self, request_id: str) -> None:
        """To be asked again."""
        self.again.append(self.open.pop(request_id))

    @property
    def left(self) -> int:
        return len(self.lines) - self.done

    def end(self, now_ms: float, live_ms: float) -> None:
        """The last line has ended, or the run has. Raises LineLost unless each line ended once or is still to do."""
        if self.done + len(self.open) + len(self.again) != self.asked:
            raise LineLost(
                f"{self.asked} lines asked, {self.done} done, {len(self.open)} open, {len(self.again)} again"
            )
        self.ended_ms, self.live_ms = now_ms, live_ms - self.live_ms

    def verdict(self, accelerators: int, batch_ms: float) -> dict[str, float | int | None]:
        """Figures of a job that ended; `batch_ms` is accelerator time spent on it."""
        idle_ms = max(0.0, accelerators * (self.ended_ms - self.began_ms) - self.live_ms)
        could = idle_ms * self.rate
        return {
            "batch_lines": self.done,
            "batch_lines_left": self.left,
            "batch_preempted": self.preempted,
            "batch_accelerator_hours": round(batch_ms / 3.6e6, 3),
            "idle_accelerator_hours": round(idle_ms / 3.6e6, 3),
            "batch_could_have_done_tokens": int(could),
            "harvest_share": round(self.tokens / could, 4) if could else None,
        }


def read(path: Path, profile: FleetProfile, model: str | None, accelerators: int) -> tuple[Job, Deployment]:
    """The job of a trace (one endpoint; `t_s` is not looked at: a batch is there as a whole) and its deployment.

    `model` names one of the fleet; without it the endpoint's own, else the one that most endpoints have. Raises
    Refusal for a bad trace, for more than `LINES_MAX` lines, and for a model the fleet does not have or hold.
    """
    lines, names = list[Line](), dict[str, None]()
    for _, endpoint, input_tokens, output_tokens in trace.rows(path):
        lines.append((input_tokens, output_tokens))
        names[endpoint] = None
        if len(lines) > LINES_MAX or len(names) > 1:
            raise _bad(path, f"a batch has one endpoint and at most {LINES_MAX} lines")
    if not lines:
        raise _bad(path, "no line in it")
    name = f"{next(iter(names))}:batch"
    spec = _model(profile, next(iter(names)), model)
    lane = deployment(profile, name, spec, lines, accelerators)
    return Job(name, lines, lane.slots, alone_rate(profile, lane, spec, lines)), lane


def _model(profile: FleetProfile, endpoint: str, model: str | None) -> ModelSpec:
    if model is None:
        used = list(profile.endpoints.values())
        model = profile.endpoints.get(endpoint) or profile.default_model or max(sorted(set(used)), key=used.count)
    if model not in profile.models:
        known = ", ".join(sorted(profile.models))
        raise Refusal("invalid_request", f"batch model {model!r} is not in the fleet ({known})", param="batch_model")
    return profile.models[model]


def deployment(profile: FleetProfile, name: str, model: ModelSpec, lines: list[Line], accelerators: int) -> Deployment:
    """Over two accelerators where they are linked and even in number, like real-time replicas, which would else span
    the remains of two pairs; else on as few as hold it. With KV for `SLOTS` mean lines.
    """
    hardware, longest = profile.accelerator, max(i + o for i, o in lines)
    mean = sum(i + o for i, o in lines) // len(lines) + 1
    whole = model.weight_bytes + max(longest, SLOTS * mean) * model.kv_bytes_per_token
    even = not (accelerators % 2 or profile.node.accelerators % 2)
    spread = 2 if even and hardware.gang_max > 1 else 1
    while -(-whole // spread) + hardware.workspace_bytes > hardware.memory_bytes:
        spread *= 2
        if spread > min(profile.node.accelerators, accelerators):
            raise Refusal("invalid_request", f"batch model {model.name!r} does not fit on a node", param="batch_model")
    return Deployment(
        endpoint=name,
        tenant="sim",
        model=ModelProfile(
            model.name, f"{name}:{model.name}", ModelKind.GENERATIVE, model.weight_bytes, model.kv_bytes_per_token,
            longest,
        ),
        mode=Mode.BATCH,
        max_replicas=max(1, min(REPLICAS_MAX, accelerators // spread)),
        concurrency_target=SLOTS,
        slots=SLOTS,
        accelerators_per_replica=spread,
        accelerator_bytes=-(-whole // spread) + hardware.workspace_bytes,
        host_bytes=model.weight_bytes,
        slo=Slo(tpot_ms=int(profile.tpot_ms)),
        movable=True,
    )  # fmt: skip


def alone_rate(profile: FleetProfile, lane: Deployment, model: ModelSpec, lines: list[Line]) -> float:
    """Tokens a millisecond and accelerator of a replica that does nothing else for ten minutes."""
    places = tuple(f"a{i}" for i in range(lane.accelerators_per_replica))
    kv_bytes = (lane.accelerator_bytes - profile.accelerator.workspace_bytes) * len(places) - model.weight_bytes
    compute = Compute({"r": Engine(model, profile.accelerator, kv_bytes, places)})
    endless, now_ms, tokens = cycle(lines), 0.0, 0
    for _ in range(lane.slots):
        compute.submit("r", Request("", "", 0.0, *next(endless)), 0.0)
    while now_ms < RATE_MS:
        now_ms = compute.due_ms()
        for request in compute.collect(now_ms):
            tokens += request.input_tokens + request.output_tokens
            compute.submit("r", Request("", "", now_ms, *next(endless)), now_ms)
    return tokens / now_ms / len(places)


def _bad(path: Path, what: str) -> Refusal:
    return Refusal("invalid_request", f"{path.name}: {what}", param="batch_trace")
