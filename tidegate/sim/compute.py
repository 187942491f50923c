"""What an accelerator does with the requests it is given: continuous batching, chunked prefill, KV capacity, time
sharing.

All engines with work on one accelerator run in rounds. In a round each decoding sequence gets one token and each engine
with a prefill works off one chunk, so a round lasts the sum over engines of

    decode:  max(weight bytes + context x KV bytes, both ÷ memory bandwidth;  batch x FLOP a token ÷ matrix rate)
    prefill: one chunk: as many tokens as the matrix rate does in `CHUNK_MS`, at most `CHUNK_TOKENS_MAX`

Between two events rounds have one length, so progress is linear and only the next event is ever computed: the cost of a
request is a few heap operations, whatever its length in tokens.

A replica over several accelerators (tensor parallel) does its part of a round on all of them at once, so it advances at
the pace of the busiest of them, and every one of them has its part in its own round. It has their summed bandwidth and
rate times `GANG_EFFICIENCY`: what is left of it after the all-reduces.
"""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from tidegate.sim.profile import AcceleratorProfile, ModelSpec

CHUNK_MS = 64.0  # with a decode step beside it, a round still stays under a TPOT of 100 ms
CHUNK_TOKENS_MAX = 2_048  # what vLLM's guide to tuning advises for chunked prefill where the time between tokens counts
NEVER = float("inf")
TOKENS_SHORT = 1e-3  # after days an instant is known to 1e-7 ms, in which a fast engine does more than 1e-6 of a token
# Weak scaling of tensor parallelism over NVSwitch: Megatron-LM (Shoeybi et al., arXiv 1909.08053), figure 5, 2, 4 and 8
# V100, the model growing along. A fixed model scales the worse the smaller it is (their table 8, 1.2B: 1.64, 2.34 and
# 2.98 times); those simulated are 7 to 60 times that size.
GANG_EFFICIENCY = {1: 1.0, 2: 0.95, 4: 0.82, 8: 0.77}


@dataclass(slots=True, eq=False)
class Request:
    """One request in the simulator. Instants in ms; `prefill_ms` is what its prefill takes on an otherwise idle
    engine.
    """

    id: str
    endpoint: str
    arrived_ms: float
    input_tokens: int
    output_tokens: int
    granted_ms: float = 0.0
    begun_ms: float = 0.0
    first_ms: float = -1.0
    prefill_ms: float = 0.0
    activation_ms: int = 0

    @property
    def beyond_ms(self) -> float:
        """TTFT beyond the request's own prefill."""
        return self.first_ms - self.arrived_ms - self.prefill_ms


class Engine:
    """One replica's batch, on the accelerators `places`. `mask` has a bit for each of them, given by its `Compute`;
    `live` is the same where the work is real-time, none where it is `batch` work.
    """

    __slots__ = (
        "batch", "chunk_ms", "chunk_tokens", "context", "decoding", "flop_ms", "kv_free", "kv_ms", "left", "live",
        "mask", "pace_ms", "part_ms", "paused", "places", "prefilling", "queue", "rounds_left", "seq", "tokens_max",
        "virtual", "weight_ms",
    )  # fmt: skip

    def __init__(
        self,
        model: ModelSpec,
        hardware: AcceleratorProfile,
        kv_bytes: int,
        places: tuple[str, ...] = ("",),
        *,
        batch: bool = False,
    ) -> None:
        worth = len(places) * GANG_EFFICIENCY[len(places)]
        self.places = places
        self.weight_ms = model.weight_bytes / hardware.memory_bytes_per_ms / worth
        self.kv_ms = model.kv_bytes_per_token / hardware.memory_bytes_per_ms / worth
        self.flop_ms = 2.0 * model.params / (hardware.dense_flop_per_ms * model.flop_rate_factor) / worth
        self.chunk_ms = min(CHUNK_MS, CHUNK_TOKENS_MAX * self.flop_ms)
        self.chunk_tokens = max(1.0, self.chunk_ms / self.flop_ms)
        self.pace_ms = self.part_ms = self.rounds_left = 0.0
        self.batch = batch
        self.paused = False
        self.mask = self.live = 0
        self.tokens_max = self.kv_free = int(kv_bytes // model.kv_bytes_per_token)
        self.queue: deque[Request] = deque()
        self.prefilling: Request | None = None
        self.left = 0.0
        self.decoding: list[tuple[float, int, Request]] = []
        self.virtual = 0.0
        self.context = 0.0
        self.seq = 0

    def take_next(self, now_ms: float) -> None:
        """Begin the next prefill if there is none and its KV fits; first come, first served."""
        if self.prefilling is None and self.queue:
            need = self.queue[0].input_tokens + self.queue[0].output_tokens
            if need <= self.kv_free or not self.decoding:  # one longer than the whole cache runs alone, spilling
                request = self.queue.popleft()
                self.kv_free -= need
                self.prefilling, self.left = request, float(request.input_tokens)
                request.begun_ms = now_ms

    def collect(self, now_ms: float, finished: list[Request]) -> None:
        """Whatever has ended by now: the prefill is followed by decoding, what is decoded makes room for the next."""
        request, decoding = self.prefilling, self.decoding
        if request is not None and self.left <= TOKENS_SHORT:
            request.first_ms = now_ms
            self.prefilling = None
            self.seq += 1
            self.context += request.input_tokens
            heappush(decoding, (self.virtual + request.output_tokens - 1, self.seq, request))
        while decoding and decoding[0][0] <= self.virtual + TOKENS_SHORT:
            done = heappop(decoding)[2]
            finished.append(done)
            tokens = done.input_tokens + done.output_tokens
            self.kv_free += tokens
            self.context -= tokens - 1
        self.take_next(now_ms)
        if not decoding:
            self.context = 0.0
            if self.prefilling is None:
                self.virtual = 0.0

    def requests(self) -> list[Request]:
        found = [request for _, _, request in self.decoding] + list(self.queue)
        return [*found, self.prefilling] if self.prefilling is not None else found


class Compute:
    """The compute of one accelerator, or of all those that replicas may span.

    `active` are the engines with work. `stamp` counts the changes of what they have to do.
    """

    __slots__ = (
        "_batch_ms", "_bits", "_busy_ms", "_crowds", "_due_ms", "_live", "_reckoned", "_span", "_working", "active",
        "engines", "last_ms", "stamp",
    )  # fmt: skip

    def __init__(self, engines: dict[str, Engine] | None = None) -> None:
        self.engines: dict[str, Engine] = {}
        self.active: dict[str, Engine] = {}
        self.last_ms = 0.0
        self._due_ms = NEVER
        self.stamp = self._reckoned = 0
        self._working: dict[str, list[Engine]] = {}  # by accelerator
        self._crowds: list[list[Engine]] = []
        self._bits: dict[str, int] = {}
        self._span = self._live = 0
        self._busy_ms: dict[int, float] = {}
        self._batch_ms: dict[int, float] = {}
        for replica, engine in (engines or {}).items():
            self.open(replica, engine)

    def open(self, replica: str, engine: Engine) -> None:
        """`engine` is ready to take requests."""
        engine.mask = sum(self._bits.setdefault(place, 1 << len(self._bits)) for place in engine.places)
        engine.live = 0 if engine.batch else engine.mask
        for place in engine.places:
            self._working.setdefault(place, [])
        self.engines[replica] = engine

    @property
    def busy_ms(self) -> dict[str, float]:
        """How long each accelerator had real-time work, by its name."""
        spans = self._busy_ms.items()
        return {place: sum(ms for mask, ms in spans if mask & bit) for place, bit in self._bits.items()}

    @property
    def batch_ms(self) -> float:
        """Accelerator time with batch work and nothing else."""
        return sum(mask.bit_count() * ms for mask, ms in self._batch_ms.items())

    def submit(self, replica: str, request: Request, now_ms: float) -> None:
        self.advance(now_ms)
        engine = self.engines[replica]
        request.prefill_ms = request.input_tokens * engine.flop_ms
        engine.queue.append(request)
        engine.take_next(now_ms)
        if replica not in self.active and not engine.paused:
            self._begin(replica, engine)
        self.stamp += 1

    def advance(self, now_ms: float) -> None:
        """Let time pass up to `now_ms`, which must not be beyond the next event."""
        passed = now_ms - self.last_ms
        if not self.active or passed <= 0.0:
            self.last_ms = now_ms
            return
        if self._reckoned != self.stamp:
            self._reckon()
        self.last_ms = now_ms
        live, span = self._live, self._span
        self._busy_ms[live] = self._busy_ms.get(live, 0.0) + passed
        if live != span:
            batch = span & ~live
            self._batch_ms[batch] = self._batch_ms.get(batch, 0.0) + passed
        for engine in self.active.values():
            rounds = passed / engine.pace_ms
            if engine.decoding:
                engine.virtual += rounds
                engine.context += rounds * len(engine.decoding)
            if engine.prefilling is not None:
                engine.left -= rounds * engine.chunk_tokens

    def collect(self, now_ms: float) -> list[Request]:
        """Advance to `now_ms` and take out what is finished; first tokens are stamped on the way."""
        self.advance(now_ms)
        finished: list[Request] = []
        idle: list[str] = []
        for replica, engine in self.active.items():
            decoding = engine.decoding
            ended = decoding and decoding[0][0] <= engine.virtual + TOKENS_SHORT
            if ended or (engine.left <= TOKENS_SHORT if engine.prefilling is not None else engine.queue):
                engine.collect(now_ms, finished)
                if engine.prefilling is None and not engine.decoding:
                    idle.append(replica)
        for replica in idle:
            self._end(replica)
        self.stamp += 1
        return finished

    def pause(self, replica: str, on: bool, now_ms: float) -> None:
        """The engine stands still with all it has, or goes on."""
        self.advance(now_ms)
        engine = self.engines[replica]
        engine.paused = on
        if on and replica in self.active:
            self._end(replica)
        elif not on and (engine.prefilling is not None or engine.decoding):
            self._begin(replica, engine)
        self.stamp += 1

    def remove(self, replica: str, now_ms: float) -> list[Request]:
        """The engine ends; what it had is handed back."""
        self.advance(now_ms)
        engine = self.engines.pop(replica, None)
        if replica in self.active:
            self._end(replica)
        self.stamp += 1
        return engine.requests() if engine is not None else []

    def due_ms(self) -> float:
        """When something ends next."""
        if self._reckoned != self.stamp:
            self._reckon()
        return self._due_ms

    def _begin(self, replica: str, engine: Engine) -> None:
        """It has work from now on."""
        self.active[replica] = engine
        for place in engine.places:
            self._working[place].append(engine)
        self._regroup()

    def _end(self, replica: str) -> None:
        engine = self.active.pop(replica)
        for place in engine.places:
            self._working[place].remove(engine)
        self._regroup()

    def _regroup(self) -> None:
        """Who has work has changed: which accelerators are at it, and who shares one."""
        self._span = self._live = 0
        for engine in self.active.values():
            self._span |= engine.mask
            self._live |= engine.live
        self._crowds.clear()
        for crowd in self._working.values():
            if crowd and crowd not in self._crowds:  # the accelerators of one replica often have the same engines
                self._crowds.append(crowd)

    def _reckon(self) -> None:
        """Each engine's part of a round, how long a round lasts for each (that of the busiest accelerator it has a part
        of), and when something ends next.
        """
        self._reckoned = self.stamp
        for engine in self.active.values():
            decoding, part_ms, rounds_left = engine.decoding, 0.0, NEVER
            if engine.prefilling is not None:
                part_ms = engine.chunk_ms
                rounds_left = engine.left / engine.chunk_tokens
            if decoding:
                read_ms = engine.weight_ms + engine.context * engine.kv_ms
                flop_ms = len(decoding) * engine.flop_ms
                part_ms += read_ms if read_ms >= flop_ms else flop_ms
                rounds = decoding[0][0] - engine.virtual
                if rounds < rounds_left:
                    rounds_left = rounds
            engine.part_ms, engine.rounds_left, engine.pace_ms = part_ms, rounds_left, 0.0
        for crowd in self._crowds:
            round_ms = 0.0
            for engine in crowd:
                round_ms += engine.part_ms
            for engine in crowd:
                if round_ms > engine.pace_ms:
                    engine.pace_ms = round_ms
        left_ms = NEVER
        for engine in self.active.values():
            engine_ms = engine.rounds_left * engine.pace_ms
            if engine_ms < left_ms:
                left_ms = engine_ms
        self._due_ms = self.last_ms + max(left_ms, 0.0)
