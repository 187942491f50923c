"""How many replicas an endpoint must have now (`required`) and may keep (`retained`).

Concurrency against target, as Knative's KPA does, with two windows: the panic side is immediate (requests are there
now), the stable side is the peak of what was required over the last minute, so a dip of seconds takes no replica away.
"""

from dataclasses import dataclass

WINDOW_BUCKETS = 6


class PeakWindow:
    """The largest value pushed within about `window_ms`; six buckets, so memory does not grow with events."""

    __slots__ = ("_bucket_ms", "_buckets")

    def __init__(self, window_ms: int) -> None:
        self._bucket_ms = max(1, window_ms // WINDOW_BUCKETS)
        self._buckets: list[tuple[int, int]] = []

    def push(self, now_ms: int, value: int) -> None:
        bucket = now_ms // self._bucket_ms
        if self._buckets and self._buckets[-1][0] == bucket:
            self._buckets[-1] = (bucket, max(value, self._buckets[-1][1]))
        else:
            self._buckets.append((bucket, value))
            self._forget(bucket)

    def peak(self, now_ms: int) -> int:
        self._forget(now_ms // self._bucket_ms)
        return max((value for _, value in self._buckets), default=0)

    def _forget(self, bucket: int) -> None:
        while self._buckets and self._buckets[0][0] < bucket - WINDOW_BUCKETS:
            del self._buckets[0]


@dataclass(frozen=True, slots=True)
class Want:
    """`required` replicas must be ready or coming; up to `retained` may stay while nobody else needs the room."""

    required: int
    retained: int


def decide(
    *, load: int, concurrency_target: int, minimum: int, maximum: int, recent_peak: int, keep_warm: bool
) -> Want:
    """`load` is requests held and in flight; `recent_peak` the largest `required` of the stable window; `keep_warm` is
    whether an idle endpoint's keep-alive still runs.
    """
    reactive = -(-load // concurrency_target)
    required = max(minimum, min(reactive, maximum))
    retained = max(required, min(max(recent_peak, 1 if keep_warm else 0), maximum) if keep_warm else 0)
    return Want(required, retained)
