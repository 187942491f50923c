"""What one offer costs on one trace, by replay, under the offer's own scaling, billing and cold-start rules."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tidegate.advisor import estimate, replay, tries
from tidegate.advisor.catalogue import Offer, Rental
from tidegate.advisor.hardware import Curve, Model, curve, fitting, known
from tidegate.advisor.models_apart import load_pattern
from tidegate.advisor.replay import Replayed, WorkerRules
from tidegate.advisor.traffic import DAY_MS, HOUR_MS, Floats, Traffic
from tidegate.advisor.tries import CLOSE, Try

REPLICAS_MAX = 64
REFERENCE = "h100"  # whose prefill a shared pool is taken to have


@dataclass(frozen=True, slots=True)
class Need:
    """What is asked of a mode. `private`: an off-catalog model or isolation is needed; `promised`: a latency SLA is.

    `apart`: every endpoint is a model of its own. `side_by_side`: how many requests of fixed time a replica takes at
    once. `exhaustive`: replay every accelerator and every number of replicas, whatever the estimate says.
    """

    model: Model
    slo_ttft_ms: float = 2_000.0
    tpot_ms: float = 100.0
    private: bool = False
    promised: bool = False
    apart: bool = False
    side_by_side: int = 1
    exhaustive: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """`usd` is the cost in each time unit of the trace. `paid_ms` and `busy_ms` are replica time (0 by the token)."""

    usd: Floats
    ttft_ms: Floats
    cold: int = 0
    paid_ms: float = 0.0
    busy_ms: float = 0.0
    work_ms: float = 0.0
    accelerator: str = ""
    replicas: int = 0
    warm: int = 0
    why_not: str = ""

    @property
    def p99(self) -> float:
        return float(np.quantile(self.ttft_ms, 0.99)) if len(self.ttft_ms) else float("inf")

    @property
    def total(self) -> float:
        return float(self.usd.sum())


@dataclass(eq=False)
class Costing:
    """Costs of one trace. Curves and replays are kept: several offers rent the same accelerator by the same rules."""

    traffic: Traffic
    need: Need
    tick: Callable[[int], None] | None = None
    replays: int = 0
    _curves: dict[tuple[str, str, int, int], Curve | None] = field(default_factory=dict)

    @cached_property
    def parts(self) -> list[Traffic]:
        return list(self.traffic.apart()) if self.need.apart else [self.traffic]

    @cached_property
    def unit_ms(self) -> float:
        """Days, hours or ten minutes: what is resampled for the range."""
        span = self.traffic.span_ms
        return DAY_MS if span >= 3 * DAY_MS else HOUR_MS if span >= 3 * HOUR_MS else 600_000.0

    @cached_property
    def units(self) -> int:
        return max(1, int(np.ceil(self.traffic.span_ms / self.unit_ms - 1e-9)))

    def cost(self, offer: Offer) -> Outcome:
        """The cheapest way this offer meets the target; where none does, the cheapest way at all and why not."""
        if offer.many_models:
            return self._many_models(offer)
        outcomes = [self._part(offer, part) for part in self.parts]
        first = outcomes[0]
        if len(outcomes) == 1 or not len(first.ttft_ms):
            return first
        return Outcome(
            usd=np.sum([o.usd for o in outcomes], axis=0),
            ttft_ms=np.concatenate([o.ttft_ms for o in outcomes]),
            cold=sum(o.cold for o in outcomes),
            paid_ms=sum(o.paid_ms for o in outcomes),
            busy_ms=sum(o.busy_ms for o in outcomes),
            work_ms=sum(o.work_ms for o in outcomes),
            accelerator=first.accelerator,
            replicas=sum(o.replicas for o in outcomes),
            warm=sum(o.warm for o in outcomes),
            why_not=next((o.why_not for o in outcomes if o.why_not), ""),
        )

    def _part(self, offer: Offer, part: Traffic) -> Outcome:
        match offer.billing:
            case "tokens":
                return self.by_tokens(offer, part)
            case "reserved":
                found = tries.reserved(part, self.need.slo_ttft_ms, self._fit(offer, part))
                return self._best(found, lambda one: self._reserved(offer, part, one.rental, one.curve))
            case "worker" | "execution":
                return self._on_workers(offer, part)

    def nothing(self, why: str) -> Outcome:
        """No cost, and why there is none."""
        return Outcome(np.zeros(self.units), np.array([]), why_not=why)

    def _best(self, found: list[Try], run: Callable[[Try], Outcome]) -> Outcome:
        """Tries in the order of their estimates until one is good, and those that may still be cheaper than it."""
        best: Outcome | None = None
        guessed = 0.0
        hopeless: set[str] = set()  # too slow though hardly ever cold: more warm workers do not help
        for one in tries.ordered(found, self.need.exhaustive):
            if not self.need.exhaustive:
                dearer = best is not None and not best.why_not and one.usd > max(guessed * CLOSE, best.total)
                if dearer or one.rental.name in hopeless:
                    continue
            outcome = run(one)
            if outcome.why_not and outcome.cold <= 0.005 * len(outcome.ttft_ms):
                hopeless.add(one.rental.name)
            if best is None or (bool(outcome.why_not), outcome.total) < (bool(best.why_not), best.total):
                best, guessed = outcome, one.usd
        return best or self.nothing("no accelerator of this offer holds the model within the TPOT target")

    def _fit(self, offer: Offer, part: Traffic) -> list[tuple[Rental, Curve]]:
        return [(rental, c) for rental in offer.accelerators if (c := self.curve_of(part, rental, offer.slots_max))]

    # -- by the token -------------------------------------------------------------------------------------------------

    def by_tokens(self, offer: Offer, part: Traffic) -> Outcome:
        price = offer.price_of(self.need.model.name)
        if part.fixed_time:
            return self.nothing("bills by the token; this work has none")
        if price is None:
            return self.nothing(f"has no price for {self.need.model.name}")
        fresh = (part.inputs - part.cached) * price.input + part.cached * price.cached_or_input
        usd = (fresh + part.outputs * price.output) / 1e6
        by_unit = self._by_unit(part.t_ms, usd)
        if offer.async_only:
            return Outcome(by_unit, np.array([]), why_not="answers within 24 hours; somebody is waiting for these")
        if offer.private and offer.accelerators:
            served = self.activated(offer, part)
            return replace(served, usd=by_unit) if served else self.nothing("its accelerator does not hold the model")
        ttft_ms = self._shared_ttft(offer, part)
        return Outcome(by_unit, ttft_ms, why_not=self._late(ttft_ms))

    def activated(self, offer: Offer, part: Traffic) -> Outcome | None:
        """TTFT on a private replica that is woken on demand; the accelerator is not paid for by the hour."""
        for rental in offer.accelerators:
            c = self.curve_of(part, rental, offer.slots_max)
            if c is not None:
                rules = WorkerRules(self._cold_ms(offer), offer.idle_s * 1e3, 0, offer.workers_max)
                done = self._replay(lambda: replay.workers(c, part.t_ms.tolist(), part.span_ms, rules))  # noqa: B023
                return Outcome(
                    np.zeros(self.units), done.ttft_ms, done.cold, 0.0, done.busy_ms, float(c.work_ms.sum()),
                    label(rental.name, c.spread), max(done.index, default=0) + 1, why_not=self._late(done.ttft_ms),
                )  # fmt: skip
        return None

    def _shared_ttft(self, offer: Offer, part: Traffic) -> Floats:
        """A shared pool's queue, log-normal through its p50 and p99, plus the prefill on a large accelerator."""
        reference = known()[0][REFERENCE]
        spread = fitting(self.need.model, reference, 8) or 8
        c = self.curve_of(part, Rental(name=REFERENCE, usd_per_hour=0.0, count_max=8), 256)
        prefill = np.array(c.prefill_ms) if c else np.zeros(len(part)) + spread
        middle = max(offer.queue_p50_ms, 1e-3)
        sigma = np.log(max(offer.queue_p99_ms, middle) / middle) / 2.326
        drawn = np.random.default_rng(7).normal(0.0, 1.0, len(part))
        return np.asarray(prefill + middle * np.exp(sigma * drawn), np.float64)

    # -- by the hour --------------------------------------------------------------------------------------------------

    def _reserved(self, offer: Offer, part: Traffic, rental: Rental, c: Curve) -> Outcome:
        if offer.scaling == "reactive":
            done = self._replay(
                lambda: replay.reactive(
                    c, part.t_ms.tolist(), part.span_ms, 1, offer.target, offer.react_s * 1e3, REPLICAS_MAX
                )
            )
            return self._paid(done, part, rental, c, rental.usd_per_hour)
        replicas, done = self.smallest(c, part)
        return replace(self._paid(done, part, rental, c, rental.usd_per_hour), replicas=replicas)

    def smallest(self, c: Curve, part: Traffic) -> tuple[int, Replayed]:
        """The fewest replicas that meet the target, by replay: from the estimate up or down (exhaustively: from 1)."""
        t_ms, slo = part.t_ms.tolist(), self.need.slo_ttft_ms

        def run(count: int) -> Replayed | None:
            done = self._replay(lambda: replay.fixed(c, t_ms, part.span_ms, count, slo))
            return None if done.lost or self._late(done.ttft_ms) else done

        least = max(1, int(c.work_ms.sum() / part.span_ms))
        if float(np.quantile(c.prefill_ms, 0.99)) > slo:
            return least, self._replay(lambda: replay.fixed(c, t_ms, part.span_ms, least))
        count = least if self.need.exhaustive else max(
            least, estimate.replicas(c, part.t_ms, part.span_ms, slo) or least
        )  # fmt: skip
        done = run(count)
        if done is not None:
            while count > least and (fewer := run(count - 1)) is not None:
                count, done = count - 1, fewer
            return count, done
        while count < REPLICAS_MAX:
            count = count + 1 if self.need.exhaustive or count < 8 else count + max(1, count // 8)
            if (done := run(count)) is not None:
                return count, done
        return count, self._replay(lambda: replay.fixed(c, t_ms, part.span_ms, count))

    # -- by worker time or execution ----------------------------------------------------------------------------------

    def _on_workers(self, offer: Offer, part: Traffic) -> Outcome:
        """Every accelerator is replayed with no worker kept warm; what keeping some warm costs follows from that."""
        bare: dict[str, Outcome] = {}
        found: list[Try] = []
        fit = self._fit(offer, part)
        quick = [one for one in fit if float(np.quantile(one[1].prefill_ms, 0.99)) <= self.need.slo_ttft_ms]
        for rental, c in fit if self.need.exhaustive or not quick else quick:
            done, outcome = self._workers(offer, part, rental, c, 0)
            bare[rental.name] = outcome
            found.append(Try(rental, c, 0, outcome.total, not outcome.why_not))
            found += tries.warm(offer, part, self.need.slo_ttft_ms, self._cold_ms(offer), found[-1], done)

        def run(one: Try) -> Outcome:
            return self._workers(offer, part, one.rental, one.curve, one.warm)[1] if one.warm else bare[one.rental.name]

        return self._best(found, run)

    def _workers(self, offer: Offer, part: Traffic, rental: Rental, c: Curve, warm: int) -> tuple[Replayed, Outcome]:
        rules = WorkerRules(self._cold_ms(offer), offer.idle_s * 1e3, warm, offer.workers_max)
        done = self._replay(lambda: replay.workers(c, part.t_ms.tolist(), part.span_ms, rules, self.tick))
        return done, replace(self._executed(offer, done, part, rental, c, rules), warm=warm)

    def _executed(
        self, offer: Offer, done: Replayed, part: Traffic, rental: Rental, c: Curve, rules: WorkerRules
    ) -> Outcome:
        warm_rate = rental.usd_per_hour if rental.warm_usd_per_hour is None else rental.warm_usd_per_hour
        if offer.async_only:
            late = "answers when an instance is up; somebody is waiting for these"
            return replace(self._paid(done, part, rental, c, rental.usd_per_hour, offer), why_not=late)
        if offer.billing == "worker":
            others = [i for i in done.intervals if i[3] >= rules.warm]
            always = [i for i in done.intervals if i[3] < rules.warm]
            paid = self._paid(replace(done, intervals=others), part, rental, c, rental.usd_per_hour, offer)
            warm = self._paid(replace(done, intervals=always), part, rental, c, warm_rate)
            return replace(paid, usd=paid.usd + warm.usd, paid_ms=paid.paid_ms + warm.paid_ms)
        rounded = np.ceil(done.executed_ms / offer.round_up_ms) * offer.round_up_ms
        usd = self._by_unit(part.t_ms, rounded) * rental.usd_per_hour * c.spread / HOUR_MS
        if offer.bill_cold:
            starts = np.array([begun for begun, ready, _, _ in done.intervals if ready > begun])
            cold_usd = rules.cold_ms * rental.usd_per_hour * c.spread / HOUR_MS
            usd = usd + self._by_unit(starts, np.full(len(starts), cold_usd))
        usd = usd + rules.warm * tries.warm_usd(offer, rental, part.span_ms) * c.spread / self.units
        out = self._paid(done, part, rental, c, 0.0)
        return replace(out, usd=usd, paid_ms=float(rounded.sum()))

    # -- shared -------------------------------------------------------------------------------------------------------

    def _many_models(self, offer: Offer) -> Outcome:
        """All endpoints on the same replicas, each model loaded when it is asked for and not among the resident."""
        part = self.traffic
        if not self.need.apart:
            return self.nothing("is for many models; this is one (--models-apart)")

        loaded: dict[str, int] = {}

        def slowed(rental: Rental, c: Curve) -> Curve:
            room = int(known()[0][rental.name].memory_gb * 0.8 * c.spread // self.need.model.weights_gb)
            loads = load_pattern(part, max(1, room), self._cold_ms(offer))
            loaded[rental.name] = int((loads > 0).sum())
            return replace(c, prefill_ms=(np.array(c.prefill_ms) + loads).tolist(), work_ms=c.work_ms + loads)

        def run(one: Try) -> Outcome:
            replicas, done = self.smallest(one.curve, part)
            outcome = self._paid(done, part, one.rental, one.curve, one.rental.usd_per_hour)
            return replace(outcome, replicas=replicas, cold=loaded[one.rental.name])

        fit = [(rental, slowed(rental, c)) for rental, c in self._fit(offer, part)]
        return self._best(tries.reserved(part, self.need.slo_ttft_ms, fit), run)

    def _paid(
        self, done: Replayed, part: Traffic, rental: Rental, c: Curve, usd_per_hour: float, offer: Offer | None = None
    ) -> Outcome:
        """Replica time × rate, in the units in which it was paid; rounded up a worker where the offer does."""
        begun = np.array([i[0] if offer is None or offer.bill_cold else i[1] for i in done.intervals])
        until = np.array([i[2] for i in done.intervals])
        if offer is not None:
            until = begun + np.ceil((until - begun) / offer.round_up_ms) * offer.round_up_ms
        edges = np.minimum(np.arange(self.units + 1) * self.unit_ms, part.span_ms)
        edges[-1] = max(edges[-1], float(until.max(initial=0.0)))
        order, closing = np.sort(begun), np.sort(until)
        reached = _time_before(edges, order) - _time_before(edges, closing)
        ms = np.diff(reached)
        why = "the queue grows without end" if done.lost else self._late(done.ttft_ms)
        return Outcome(
            usd=ms * usd_per_hour * c.spread / HOUR_MS,
            ttft_ms=done.ttft_ms,
            cold=done.cold,
            paid_ms=float(ms.sum()),
            busy_ms=done.busy_ms,
            work_ms=float(c.work_ms.sum()),
            accelerator=label(rental.name, c.spread),
            replicas=max(done.index) + 1 if done.index else max(1, round(float(ms.sum()) / part.span_ms)),
            why_not=why,
        )

    def curve_of(self, part: Traffic, rental: Rental, slots_max: int) -> Curve | None:
        key = (part.name, rental.name, rental.count_max, slots_max)
        if key not in self._curves:
            accelerator = known()[0][rental.name]
            spread = fitting(self.need.model, accelerator, rental.count_max)
            at_once = min(slots_max, self.need.side_by_side) if part.fixed_time else slots_max
            need = self.need
            self._curves[key] = curve(part, need.model, accelerator, spread, need.tpot_ms, at_once) if spread else None
        return self._curves[key]

    def _replay(self, run: Callable[[], Replayed]) -> Replayed:
        self.replays += 1
        return run()

    def _cold_ms(self, offer: Offer) -> float:
        return (offer.cold_start_s + self.need.model.weights_gb / offer.load_gb_s) * 1e3

    def _late(self, ttft_ms: Floats) -> str:
        p99 = float(np.quantile(ttft_ms, 0.99))
        slo = self.need.slo_ttft_ms
        return "" if p99 <= slo else f"p99 of TTFT {p99:,.0f} ms is over the target of {slo:,.0f} ms"

    def _by_unit(self, t_ms: Floats, weights: Floats) -> Floats:
        at = np.minimum((t_ms // self.unit_ms).astype(np.int64), self.units - 1)
        return np.asarray(np.bincount(at, weights=weights, minlength=self.units), np.float64)


def label(accelerator: str, spread: int) -> str:
    return accelerator if spread == 1 else f"{spread} x {accelerator}"


def _time_before(edges: Floats, instants: Floats) -> Floats:
    """Σ max(0, edge - instant) over sorted instants, for each edge."""
    counts = np.searchsorted(instants, edges, side="right")
    sums = np.concatenate([[0.0], np.cumsum(instants)])
    return np.asarray(counts * edges - sums[counts], np.float64)
