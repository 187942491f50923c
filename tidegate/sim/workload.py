"""Traffic made from arrival processes, as rows of a trace. One seed gives one workload."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import merge
from math import cos, exp, log, pi, sqrt
from random import Random

from tidegate.sim.trace import Row

DAY_MS = 86_400_000.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """One endpoint's traffic.

    `shape` is ``poisson``, ``gamma`` (gaps with coefficient of variation `cv`), ``diurnal`` (Poisson, rate following a
    cosine over a day, from nothing at t = 0 to twice the mean at noon) or ``on_off`` (Poisson while on; on and off last
    `period_ms` on average, exponentially). Token counts are log-normal with a spread of e^0.8.
    """

    endpoint: str
    shape: str
    per_second: float
    input_tokens: int = 500
    output_tokens: int = 100
    cv: float = 4.0
    period_ms: float = 60_000.0


def rows(traffic: list[Traffic], duration_ms: float, seed: int) -> Iterator[Row]:
    """All endpoints' requests of `duration_ms`, in order."""
    streams = [_one(t, duration_ms, Random(f"{seed}:{t.endpoint}")) for t in traffic]
    yield from merge(*streams, key=lambda row: (row[0], row[1]))


def _one(traffic: Traffic, duration_ms: float, dice: Random) -> Iterator[Row]:
    match traffic.shape:
        case "poisson":
            instants = _gaps(lambda: dice.expovariate(traffic.per_second / 1e3))
        case "gamma":
            k = 1.0 / traffic.cv**2
            instants = _gaps(lambda: dice.gammavariate(k, 1e3 / traffic.per_second / k))
        case "diurnal":
            instants = _diurnal(traffic, dice)
        case "on_off":
            instants = _on_off(traffic, dice)
        case _:
            raise ValueError(f"shape {traffic.shape!r} is not poisson, gamma, diurnal or on_off")
    for at_ms in instants:
        if at_ms >= duration_ms:
            return
        yield at_ms, traffic.endpoint, _tokens(traffic.input_tokens, dice), _tokens(traffic.output_tokens, dice)


def _gaps(draw: Callable[[], float]) -> Iterator[float]:
    now = 0.0
    while True:
        now += draw()
        yield now


def _diurnal(traffic: Traffic, dice: Random) -> Iterator[float]:
    """Thinning of a Poisson process at the peak rate."""
    for at_ms in _gaps(lambda: dice.expovariate(2.0 * traffic.per_second / 1e3)):
        if dice.random() < 0.5 - 0.5 * cos(2.0 * pi * at_ms / DAY_MS):
            yield at_ms


def _on_off(traffic: Traffic, dice: Random) -> Iterator[float]:
    now, on = 0.0, dice.random() < 0.5
    while True:
        until = now + dice.expovariate(1.0 / traffic.period_ms)
        while on:
            now += dice.expovariate(traffic.per_second / 1e3)
            if now >= until:
                break
            yield now
        now, on = until, not on


def _tokens(mean: int, dice: Random) -> int:
    spread = 0.8
    return max(1, int(exp(dice.gauss(log(mean) - spread * spread / 2.0, spread))))


def burstiness(gaps: list[float]) -> float:
    """Coefficient of variation of gaps."""
    mean = sum(gaps) / len(gaps)
    return sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps)) / mean
