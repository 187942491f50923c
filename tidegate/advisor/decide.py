"""The decision: the articles' questions in their order, answered from the data where the data has the answer.

1. Does anybody wait for the answer? 2. Is the volume past the break-even of a dedicated replica? 3. Is an off-catalog
model, a latency promise or isolation needed? The recommendation itself is the cheapest mode that meets the target; the
path says why, and says so where the articles' order would end elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.advisor.breakeven import BreakEven
from tidegate.advisor.costs import Need
from tidegate.advisor.shape import Shape


@dataclass(frozen=True, slots=True)
class ModeRow:
    """The best offer of one mode. `monthly_usd` is None where nothing of this mode can be priced."""

    mode: str
    monthly_usd: float | None
    low_usd: float | None
    high_usd: float | None
    p50_ttft_ms: float | None
    p95_ttft_ms: float | None
    p99_ttft_ms: float | None
    cold_share: float
    idle_share: float | None
    feasible: bool
    why: str
    offer: str = ""
    accelerator: str = ""
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    question: str
    answer: str
    why: str


def recommended(modes: Sequence[ModeRow]) -> ModeRow | None:
    fine = [row for row in modes if row.feasible and row.monthly_usd is not None]
    return min(fine, key=lambda row: row.monthly_usd or 0.0) if fine else None


def path(modes: Sequence[ModeRow], shape: Shape, even: BreakEven | None, need: Need, async_share: float) -> list[Step]:
    steps = [_waits(async_share)]
    by_mode = {row.mode: row for row in modes}
    if async_share < 1.0:
        steps.append(_volume(by_mode, shape, even))
        steps.append(_needs(need))
    best = recommended(modes)
    ends = _articles_end(by_mode, even, need, async_share)
    if best is None:
        steps.append(Step("Which mode?", "none", "no mode meets the target: " + _nearest(modes)))
        return steps
    if best.mode == ends:
        why = (
            f"where the articles' questions lead, and the cheapest that meets the target at {best.monthly_usd:,.2f} USD"
        )
    else:
        other = by_mode.get(ends)
        known = other is not None and other.monthly_usd is not None
        said = f"{other.monthly_usd:,.2f} USD, {other.why}" if other and known else "not to be had here"
        cost = f"the cheapest that meets the target at {best.monthly_usd:,.2f} USD"
        why = f"{cost}; the questions alone lead to {ends} ({said})"
    steps.append(Step("Which mode?", best.mode, why))
    return steps


def changes(modes: Sequence[ModeRow], even: BreakEven | None, need: Need, current: str | None) -> list[str]:
    """What would change the answer, and by how much it would have to change."""
    best = recommended(modes)
    said: list[str] = []
    if best is None or best.monthly_usd is None:
        return [_nearest(modes)]
    if current is not None:
        said.append(_from_current(modes, best, current))
    for row in sorted(modes, key=lambda r: r.monthly_usd or 0.0):
        if row.mode == best.mode or row.monthly_usd is None:
            continue
        if row.feasible:
            cut = 1.0 - best.monthly_usd / row.monthly_usd
            said.append(
                f"{row.mode}: if its price fell by {100 * cut:.0f} % (it costs {row.monthly_usd:,.2f} USD a month)"
            )
        elif row.monthly_usd < best.monthly_usd and row.p99_ttft_ms and row.p99_ttft_ms > need.slo_ttft_ms:
            said.append(
                f"{row.mode}: if a p99 TTFT of {row.p99_ttft_ms:,.0f} ms were acceptable it would save "
                f"{best.monthly_usd - row.monthly_usd:,.2f} USD a month"
            )
        elif row.monthly_usd < best.monthly_usd:
            said.append(f"{row.mode}: {row.why}; else it would cost {row.monthly_usd:,.2f} USD a month")
    if even is not None and even.factor is not None and best.mode not in ("dedicated", "hybrid"):
        said.append(f"dedicated: once traffic of this shape is {even.factor:.2g} times what it is")
    return said


def _waits(async_share: float) -> Step:
    if async_share >= 1.0:
        return Step("Does anybody wait for the answer?", "no", "all of it may take up to 24 hours: batch")
    if async_share > 0.0:
        why = f"{100 * async_share:.0f} % may take up to 24 hours and goes to batch; the rest is looked at on its own"
        return Step("Does anybody wait for the answer?", "partly", why)
    return Step("Does anybody wait for the answer?", "yes", "nothing was said to be asynchronous (--async-share)")


def _volume(by_mode: dict[str, ModeRow], shape: Shape, even: BreakEven | None) -> Step:
    question = "Is the volume high and steady enough for dedicated?"
    if even is None:
        return Step(question, "unknown", "there is no dedicated offer or no token price to compare")
    row, best = by_mode.get("dedicated"), recommended(list(by_mode.values()))
    much = f"it takes {100 * even.utilisation:.0f} % of a replica to break even"
    if even.utilisation > 1:
        return Step(question, "no", f"{much}: at these prices a full one costs more than its tokens")
    peaks = f"peak ÷ mean {shape.peak_to_mean:.1f}"
    have = f"this traffic fills its dedicated replicas to {100 * even.ceiling:.0f} % ({peaks})"
    past = even.ceiling >= even.utilisation
    if row and not row.feasible:
        return Step(question, "no", f"{row.why}; {much}, {have}")
    if past and best and best.mode not in ("dedicated", "hybrid"):
        have += f"; still {best.mode} is cheaper, by what another offer costs"
    return Step(question, "yes" if past else "no", f"{much}; {have}")


def _needs(need: Need) -> Step:
    question = "Off-catalog model, latency promise or isolation needed?"
    asked = [w for w, on in (("private model or isolation", need.private), ("latency promise", need.promised)) if on]
    if asked:
        return Step(question, "yes", f"asked for: {', '.join(asked)}; shared catalog endpoints are out")
    return Step(question, "no", "nothing of the kind was said (--private, --promised)")


def _articles_end(by_mode: dict[str, ModeRow], even: BreakEven | None, need: Need, async_share: float) -> str:
    if async_share >= 1.0:
        return "batch"
    row = by_mode.get("dedicated")
    if even is not None and even.ceiling >= even.utilisation and row is not None and row.feasible:
        return "dedicated"
    return "dedicated_serverless" if need.private or need.promised else "serverless"


def _nearest(modes: Sequence[ModeRow]) -> str:
    late = [row for row in modes if row.p99_ttft_ms]
    if not late:
        return "no offer can serve this model"
    near = min(late, key=lambda row: row.p99_ttft_ms or 0.0)
    return f"the nearest is {near.mode} with a p99 TTFT of {near.p99_ttft_ms:,.0f} ms"


def _from_current(modes: Sequence[ModeRow], best: ModeRow, current: str) -> str:
    now = next((row for row in modes if row.mode == current), None)
    if now is None or now.mode == best.mode:
        return f"stay: {best.mode} is the cheapest that meets the target"
    if best.mode == "hybrid":
        return f"split: keep {best.replicas} replicas for the base and let the rest overflow"
    if now.monthly_usd is None or best.monthly_usd is None:
        return f"move from {current} to {best.mode}"
    saved = now.monthly_usd - best.monthly_usd
    return f"move from {current} to {best.mode}: {saved:,.2f} USD a month less" + (
        "" if now.feasible else f"; {now.why}"
    )
