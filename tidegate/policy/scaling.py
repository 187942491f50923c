"""How many replicas an endpoint must have now (`required`) and may keep (`retained`).

Concurrency against target, as Knative's KPA does, with windows of an endpoint's own: none before its first replica,
`up_window_ms` before one more, `down_window_ms` before a surplus goes (a dip of seconds takes no replica away), and
`zero_window_ms` before the last does. What present replicas will get to in time, as fast as they were measured to be,
asks for no other.
"""

from tidegate.domain.endpoint import Deployment

WINDOW_BUCKETS = 6
SLO_SHARE = 0.5  # of the TTFT promised, that a request may spend in a queue; the rest is for its own work


class PeakWindow:
    """The largest value pushed within about `window_ms`; six buckets, so memory does not grow with events."""

    __slots__ = ("_buckets", "bucket_ms", "window_ms")

    def __init__(self, window_ms: int) -> None:
        self.window_ms = window_ms
        self.bucket_ms = max(1, window_ms // WINDOW_BUCKETS)
        self._buckets: list[tuple[int, int]] = []

    def push(self, now_ms: int, value: int) -> None:
        bucket = now_ms // self.bucket_ms
        if self._buckets and self._buckets[-1][0] == bucket:
            self._buckets[-1] = (bucket, max(value, self._buckets[-1][1]))
        else:
            self._buckets.append((bucket, value))
            self._forget(bucket)

    def peak(self, now_ms: int) -> int:
        self._forget(now_ms // self.bucket_ms)
        return max([value for _, value in self._buckets], default=0)

    def _forget(self, bucket: int) -> None:
        while self._buckets and self._buckets[0][0] < bucket - WINDOW_BUCKETS:
            del self._buckets[0]


def pressing(queued: int, in_flight: int, ready: int, served_per_s: float | None, slo_ttft_ms: int) -> int:
    """How many requests count as load: those in flight, and those held that the `ready` replicas will not get to within
    their share of the SLO, each at `served_per_s` as measured; without a measurement all. One at least if there is any.
    """
    in_time = int(ready * (served_per_s or 0.0) * slo_ttft_ms * SLO_SHARE / 1_000)
    return in_flight + max(queued - in_time, 0 if in_flight else min(queued, 1))


def replicas(load: int, deployment: Deployment) -> int:
    """How many `load` requests ask for, with the headroom its owner wants on top; none without load."""
    scaling = deployment.scaling
    spare = max(scaling.headroom_slots, -(-load * scaling.headroom_percent // 100)) if load else 0
    return -(-(load + spare) // deployment.concurrency_target)


def decide(reactive: int, minimum: int, maximum: int, recent_peak: int, keep_warm: bool) -> tuple[int, int]:
    """(required, retained): so many replicas must be ready or coming; up to so many may stay while nobody else needs
    the room. `reactive` is how many the load asks for; `recent_peak` the largest `required` of the down window;
    `keep_warm` whether an idle endpoint's zero window still runs.
    """
    required = max(minimum, min(reactive, maximum))
    retained = max(required, min(max(recent_peak, 1 if keep_warm else 0), maximum) if keep_warm else 0)
    return required, retained
