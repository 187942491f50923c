"""Traffic of those who have no data yet: a shape, requests a day and tokens, made into a week of requests.

One seed gives one week. The shapes: `steady` (Poisson, day and night), `business-hours` (weekdays 8 to 18, nothing at
night, a tenth at weekends), `spiky` (bursts of half a minute or so, long silence between), `mixed` (a steady base with
half the requests, business hours and spikes on top).
"""

from collections.abc import Callable

import numpy as np

from tidegate.advisor.columns import refuse
from tidegate.advisor.traffic import DAY_MS, HOUR_MS, WEEK_MS, Floats, Traffic

REQUESTS_A_DAY_MAX = 2_000_000
MODELS_MAX = 1_000
SPREAD = 0.8  # of log-normal token counts, as in real traces (sim.workload)
BURST_MEAN = 40.0  # requests of a burst
BURST_MS = 30_000.0


def steady(count: int, dice: np.random.Generator) -> Floats:
    return dice.uniform(0.0, WEEK_MS, count)


def business_hours(count: int, dice: np.random.Generator) -> Floats:
    """Monday is day 0. A lunch dip and two humps between 8 and 18."""
    day = dice.choice(7, count, p=np.array([1, 1, 1, 1, 1, 0.1, 0.1]) / 5.2)
    hump = np.where(dice.random(count) < 0.5, 10.5, 15.0)
    drawn = dice.normal(hump, 1.4)
    hour = np.where((drawn > 8.0) & (drawn < 18.0), drawn, dice.uniform(8.0, 18.0, count))
    return np.minimum(day * DAY_MS + hour * HOUR_MS + dice.uniform(0.0, 60_000.0, count), WEEK_MS - 1.0)


def spiky(count: int, dice: np.random.Generator) -> Floats:
    bursts = max(1, round(count / BURST_MEAN))
    starts = dice.uniform(0.0, WEEK_MS - BURST_MS, bursts)
    weights = dice.pareto(3.0, bursts) + 0.2
    which = dice.choice(bursts, count, p=weights / weights.sum())
    return starts[which] + dice.uniform(0.0, BURST_MS, count)


def mixed(count: int, dice: np.random.Generator) -> Floats:
    base, office = count // 2, count // 4
    parts = [steady(base, dice), business_hours(office, dice), spiky(count - base - office, dice)]
    return np.concatenate(parts)


SHAPES: dict[str, Callable[[int, np.random.Generator], Floats]] = {
    "business-hours": business_hours,
    "spiky": spiky,
    "steady": steady,
    "mixed": mixed,
}


def describe(
    shape: str,
    requests_per_day: float,
    input_tokens: int = 500,
    output_tokens: int = 150,
    *,
    service_ms: float = 0.0,
    models: int = 1,
    seed: int = 1,
) -> Traffic:
    """A week of it, from a Monday midnight. `models` > 1 spreads it over that many endpoints, the k-th getting 1/k.

    Raises Refusal naming the option.
    """
    if shape not in SHAPES:
        raise refuse(f"--shape: {shape[:40]!r} is not one of {', '.join(SHAPES)}")
    if not 1 <= requests_per_day <= REQUESTS_A_DAY_MAX:
        raise refuse(f"--requests-per-day: {requests_per_day:g}; expected 1 to {REQUESTS_A_DAY_MAX:,}")
    if not 1 <= models <= MODELS_MAX:
        raise refuse(f"--models: {models}; expected 1 to {MODELS_MAX:,}")
    if not 0.0 <= service_ms < WEEK_MS:
        raise refuse(f"--service-ms: {service_ms:g}; expected milliseconds of work, above 0")
    if not service_ms and min(input_tokens, output_tokens) < 1:
        raise refuse("--input-tokens and --output-tokens: expected 1 or more each")
    dice = np.random.default_rng(seed)
    count = max(2, round(requests_per_day * 7))
    t_ms = np.sort(SHAPES[shape](count, dice))
    share = 1.0 / np.arange(1, models + 1)
    which = dice.choice(models, count, p=share / share.sum()).astype(np.int32)
    zeros = np.zeros(count)
    return Traffic(
        name=f"{shape}, {requests_per_day:g} requests a day",
        t_ms=t_ms,
        inputs=_tokens(input_tokens, count, dice) if not service_ms else zeros.astype(np.int64),
        cached=zeros.astype(np.int64),
        outputs=_tokens(output_tokens, count, dice) if not service_ms else zeros.astype(np.int64),
        service_ms=zeros + service_ms,
        endpoint_of=which,
        endpoints=tuple(f"model-{k + 1}" for k in range(models)) if models > 1 else ("all",),
        span_ms=WEEK_MS,
        start_ms=4.0 * DAY_MS,  # 5 January 1970 was a Monday
        notes=(
            f"made from a description (seed {seed}), not measured: replay your own traffic as soon as there is some",
        ),
    )


def _tokens(mean: int, count: int, dice: np.random.Generator) -> np.ndarray:
    drawn = np.exp(dice.normal(np.log(mean) - SPREAD**2 / 2.0, SPREAD, count))
    return np.maximum(1, drawn).astype(np.int64)
