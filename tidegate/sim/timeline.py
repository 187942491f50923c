"""What happened when, for people to look at: who was on which accelerator, who was away, which requests missed.

Kept only when asked for. Requests are counted into `BINS` slices of the run's span, so they cost no memory; stays on
accelerators are kept one by one, so memory grows with swaps.
"""

from collections import Counter
from dataclasses import dataclass, field

from tidegate.domain import plan
from tidegate.domain.fleet import Node
from tidegate.domain.plan import Command, ReplicaStatus
from tidegate.domain.replica import ReplicaState
from tidegate.sim.meter import Histogram

BINS = 720
S = ReplicaState
GONE = (S.ASLEEP, S.STOPPED)


@dataclass(slots=True)
class Stay:
    """One replica in the memory of one accelerator. `ready_ms` is -1 if it never was; instants in ms of the run."""

    lane: str
    endpoint: str
    nbytes: int
    began_ms: float
    ready_ms: float = -1.0
    ended_ms: float = -1.0


@dataclass(slots=True)
class Slice:
    """One slice of the span: requests by endpoint, misses by endpoint, TTFT beyond the prefill."""

    requests: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    beyond: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class Totals:
    """One endpoint over the run. `away_ms` is from an eviction until it was ready again: its place was lent."""

    requests: int = 0
    attained: int = 0
    cold: int = 0
    activations: int = 0
    evictions: int = 0
    resident_ms: float = 0.0
    away_ms: float = 0.0
    beyond: Histogram = field(default_factory=Histogram)


class Timeline:
    """Told by the simulated world; read by `sim.page`. Instants are made relative to `open`."""

    def __init__(self) -> None:
        self.lanes: dict[str, int] = {}
        self.stays: list[Stay] = []
        self.slices = [Slice() for _ in range(BINS)]
        self.endpoints: dict[str, Totals] = {}
        self.span_ms = 1.0
        self._origin_ms = 0.0
        self._open = False
        self._here: dict[str, list[Stay]] = {}
        self._endpoint_of: dict[str, str] = {}
        self._away: dict[str, float] = {}

    def lanes_of(self, node: Node) -> None:
        for accelerator in node.accelerators:
            self.lanes[f"{node.id}/{accelerator.id}"] = accelerator.memory_bytes

    def open(self, now_ms: float, span_ms: float) -> None:
        """The first request is about to come; what already is on the accelerators is there from the beginning."""
        self._origin_ms, self.span_ms, self._open = now_ms, max(span_ms, 1.0), True
        self.stays.clear()
        self.endpoints.clear()
        self._away.clear()
        for stays in self._here.values():
            for stay in stays:
                stay.began_ms = 0.0
                stay.ready_ms = min(stay.ready_ms, 0.0)
                self.stays.append(stay)

    def close(self, now_ms: float) -> None:
        """The last request has ended."""
        for replica in list(self._here):
            self._leave(replica, now_ms)
        for endpoint in list(self._away):
            self._back(endpoint, now_ms)

    def command(self, command: Command, now_ms: float) -> None:
        match command:
            case plan.Start(replica, node, accelerators, deployment, nbytes):
                self._endpoint_of[replica] = deployment.endpoint
                self._arrive(replica, node, accelerators, nbytes, now_ms)
            case plan.Wake(replica, node, accelerators, nbytes):
                self._arrive(replica, node, accelerators, nbytes, now_ms)
            case plan.Drain() if command.reason.rule.startswith("evict") and self._open:
                self._of(command.endpoint).evictions += 1
                self._away.setdefault(command.endpoint, now_ms)

    def replica(self, status: ReplicaStatus, now_ms: float) -> None:
        if status.state in GONE:
            self._leave(status.replica, now_ms)
            if status.state is S.STOPPED:
                self._endpoint_of.pop(status.replica, None)
        elif status.state is S.READY:
            for stay in self._here.get(status.replica, ()):
                if stay.ready_ms < 0.0:
                    stay.ready_ms = self._at(now_ms)
            self._back(status.endpoint, now_ms)

    def request(self, endpoint: str, arrived_ms: float, beyond_ms: float | None, attained: bool, cold: bool) -> None:
        """One has ended; it is shown where it arrived. `beyond_ms`: its TTFT beyond the prefill, None if not served."""
        totals, piece = self._of(endpoint), self.slices[self.slice_of(self._at(arrived_ms))]
        totals.requests += 1
        totals.attained += attained
        totals.cold += cold
        piece.requests[endpoint] += 1
        if not attained:
            piece.missed[endpoint] += 1
        if beyond_ms is not None:
            totals.beyond.add(beyond_ms)
            piece.beyond.add(beyond_ms)

    def slice_of(self, at_ms: float) -> int:
        return min(BINS - 1, max(0, int(at_ms / self.span_ms * BINS)))

    def _arrive(self, replica: str, node: str, accelerators: tuple[str, ...], nbytes: int, now_ms: float) -> None:
        endpoint, at_ms = self._endpoint_of[replica], self._at(now_ms)
        stays = [Stay(f"{node}/{accelerator}", endpoint, nbytes, at_ms) for accelerator in accelerators]
        self._here[replica] = stays
        if self._open:
            self._of(endpoint).activations += 1
            self.stays += stays

    def _leave(self, replica: str, now_ms: float) -> None:
        for stay in self._here.pop(replica, ()):
            stay.ended_ms = self._at(now_ms)
            self._of(stay.endpoint).resident_ms += max(0.0, stay.ended_ms - stay.began_ms)

    def _back(self, endpoint: str, now_ms: float) -> None:
        since_ms = self._away.pop(endpoint, None)
        if since_ms is not None:
            self._of(endpoint).away_ms += now_ms - since_ms

    def _of(self, endpoint: str) -> Totals:
        totals = self.endpoints.get(endpoint)
        if totals is None:
            totals = self.endpoints[endpoint] = Totals()
        return totals

    def _at(self, now_ms: float) -> float:
        return now_ms - self._origin_ms
