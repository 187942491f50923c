"""The shape of traffic: how much, how uneven, how predictable; all from counts per minute."""

from dataclasses import dataclass

import numpy as np

from tidegate.advisor.traffic import DAY_MS, HOUR_MS, Floats, Traffic

MINUTE_MS = 60_000.0
WINDOW_MIN = 10
BASE_QUANTILE = 0.10
SPIKE_FACTOR = 3.0
MINUTES_MAX = 366 * 24 * 60


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Rates are requests per minute. `base` is the rate of 10-minute windows that nine in ten windows reach;
    `base_share` of all requests is within it, `spike_share` is above `SPIKE_FACTOR` times the mean and
    what chance does there. `idle_share` is the
    share of minutes without a request. `burstiness` is the coefficient of variation of gaps (1: Poisson).
    `predictability` is how much of the variance of hourly counts the same hour a day earlier tells (0 to 1; None below
    two days). `hour_of_day` are mean requests per hour; `days` is one row of 24 hourly counts a day.
    """

    requests: int
    span_hours: float
    per_day: float
    mean: float
    p50: float
    p99: float
    peak: float
    peak_to_mean: float
    hour_peak_to_mean: float
    idle_share: float
    burstiness: float
    predictability: float | None
    base: float
    base_share: float
    spike_share: float
    tokens_in: float
    tokens_out: float
    tokens_month: float
    cached_share: float
    hour_of_day: tuple[float, ...]
    weekday: tuple[float, ...] | None
    days: Floats
    minutes: Floats

    @property
    def kind(self) -> str:
        """steady | business-hours | spiky | mixed: the words in which the articles speak of traffic."""
        if self.base_share > 0.6 and self.hour_peak_to_mean < 1.7 and self.burstiness < 3:
            return "steady"
        nights = min(self.hour_of_day) < 0.15 * max(self.hour_of_day) and self.span_hours >= 24
        repeats = self.predictability is None or self.predictability >= 0.5
        if nights and repeats and self.spike_share < 0.35:
            return "business-hours"
        return "spiky" if self.base_share < 0.25 and (self.spike_share > 0.2 or self.burstiness > 3) else "mixed"


def measure(traffic: Traffic) -> Shape:
    """Traffic has at least two requests (as read)."""
    count = max(1, min(MINUTES_MAX, int(np.ceil(traffic.span_ms / MINUTE_MS))))
    per_minute = np.bincount(np.minimum((traffic.t_ms // MINUTE_MS).astype(np.int64), count - 1), minlength=count)
    minutes = per_minute.astype(np.float64)
    mean = len(traffic) / (traffic.span_ms / MINUTE_MS)
    windows = _sums(minutes, WINDOW_MIN) / WINDOW_MIN
    base = float(np.quantile(windows, BASE_QUANTILE))
    hours = _hours(traffic)
    columns = (hours[:, hour][~np.isnan(hours[:, hour])] for hour in range(24))
    by_hour = [float(column.mean()) if len(column) else 0.0 for column in columns]
    gaps = np.diff(traffic.t_ms)
    spike = SPIKE_FACTOR * mean + 3.0 * np.sqrt(SPIKE_FACTOR * mean)  # what chance alone would do at the tripled rate
    seen = hours[~np.isnan(hours)]
    return Shape(
        requests=len(traffic),
        span_hours=traffic.span_ms / HOUR_MS,
        per_day=len(traffic) / (traffic.span_ms / DAY_MS),
        mean=mean,
        p50=float(np.quantile(minutes, 0.5)),
        p99=float(np.quantile(minutes, 0.99)),
        peak=float(minutes.max()),
        peak_to_mean=float(minutes.max() / mean),
        hour_peak_to_mean=float(seen.max() / seen.mean()) if len(seen) and seen.mean() else 1.0,
        idle_share=float(np.mean(minutes == 0)),
        burstiness=float(gaps.std() / gaps.mean()) if gaps.sum() else 0.0,
        predictability=_predictability(hours),
        base=base,
        base_share=float(np.minimum(windows, base).sum() / windows.sum()),
        spike_share=float(np.maximum(minutes - spike, 0.0).sum() / minutes.sum()),
        tokens_in=float(traffic.inputs.mean()),
        tokens_out=float(traffic.outputs.mean()),
        tokens_month=float((traffic.inputs.sum() + traffic.outputs.sum()) / traffic.months),
        cached_share=float(traffic.cached.sum() / max(1, traffic.inputs.sum())),
        hour_of_day=tuple(by_hour),
        weekday=_weekday(traffic, hours),
        days=hours,
        minutes=minutes,
    )


def _sums(values: Floats, width: int) -> Floats:
    whole = len(values) // width * width
    if not whole:  # less than one window: the whole of it, scaled to one
        return np.array([values.sum() * width / len(values)])
    return np.asarray(values[:whole].reshape(-1, width).sum(axis=1), np.float64)


def _hours(traffic: Traffic) -> Floats:
    """Days × 24 hourly counts in local time; NaN where the trace was not running for at least half of the hour."""
    start = (traffic.start_ms or 0.0) % DAY_MS
    local = traffic.t_ms + start
    days = max(1, int(np.ceil((start + traffic.span_ms) / DAY_MS)))
    counts = np.bincount(np.minimum((local // HOUR_MS).astype(np.int64), days * 24 - 1), minlength=days * 24)
    edges = np.arange(days * 24) * HOUR_MS
    watched = np.minimum(edges + HOUR_MS, start + traffic.span_ms) - np.maximum(edges, start)
    scaled = np.where(watched >= HOUR_MS / 2, counts * HOUR_MS / np.maximum(watched, 1.0), np.nan)
    return scaled.reshape(days, 24)


def _predictability(hours: Floats) -> float | None:
    """1 - (error of "as the same hour yesterday") ÷ (variance, twice): 1 for perfect repetition, 0 for noise."""
    today, yesterday = hours[1:].ravel(), hours[:-1].ravel()
    known = ~(np.isnan(today) | np.isnan(yesterday))
    if known.sum() < 24:
        return None
    error = float(np.mean((today[known] - yesterday[known]) ** 2))
    variance = float(np.var(np.concatenate([today[known], yesterday[known]])))
    return float(np.clip(1.0 - error / (2.0 * variance), 0.0, 1.0)) if variance else 1.0


def _weekday(traffic: Traffic, hours: Floats) -> tuple[float, ...] | None:
    """Mean requests a day from Monday on; None where the trace has no date or is short of a week."""
    watched = ~np.isnan(hours).all(axis=1)  # a trace that begins minutes after midnight ends minutes into an eighth day
    if traffic.start_ms is None or watched.sum() < 7:
        return None
    first = int(traffic.start_ms // DAY_MS + 3) % 7  # 1 January 1970 was a Thursday
    whole = np.nanmean(hours[watched], axis=1) * 24.0
    days = (np.flatnonzero(watched) + first) % 7
    return tuple(float(np.mean(whole[days == day])) for day in range(7))
