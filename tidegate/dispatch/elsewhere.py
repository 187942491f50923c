"""When a request leaves the endpoint it was sent to: overflow of a busy one, fallback of a failing one."""

from dataclasses import dataclass

from tidegate.domain.endpoint import Overflow

FAILURES_MAX = 5
OPEN_MS = 10_000
TTFT_STALE_MS = 5_000

# What an endpoint that refuses with one of these could not do, its fallback may. Paused is what its owner wants.
FALLS_BACK = frozenset({"engine_error", "endpoint_failed", "capacity", "hold_expired", "queue_full"})


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the owner allows. `resident`: the endpoint always has a replica, so that having none means it failed, not
    that it sleeps.
    """

    overflow: Overflow | None = None
    fallback: str = ""
    resident: bool = False

    @property
    def hold(self) -> tuple[int, str] | None:
        """(how many milliseconds it may be held before it goes, why it goes then); None: the hold does not decide."""
        if self.overflow is None:
            return None
        if self.overflow.above_queue_ms is not None:
            return self.overflow.above_queue_ms, "queue_ms"
        return None if self.overflow.above_ttft_ms is None else (self.overflow.above_ttft_ms, "ttft_ms")


class Breaker:
    """Counts failures in a row before the first byte. At `FAILURES_MAX` nothing is sent for `OPEN_MS`; then one request
    tries, and its outcome decides.
    """

    __slots__ = ("_failures", "_retry_ms")

    def __init__(self) -> None:
        self._failures = 0
        self._retry_ms = 0

    def allows(self, now_ms: int) -> bool:
        if self._failures < FAILURES_MAX:
            return True
        if now_ms < self._retry_ms:
            return False
        self._retry_ms = now_ms + OPEN_MS  # the others wait for what this one finds
        return True

    def failed(self, now_ms: int) -> None:
        self._failures += 1
        self._retry_ms = now_ms + OPEN_MS

    def worked(self) -> None:
        self._failures = 0


class Ttft:
    """Recent time from grant to first byte. Without news for `TTFT_STALE_MS` it is 0: what overflows brings no news, so
    an endpoint that was slow once must be asked again.
    """

    __slots__ = ("_at_ms", "_mean_ms")

    def __init__(self) -> None:
        self._mean_ms = 0
        self._at_ms = 0

    def seen(self, ttft_ms: int, now_ms: int) -> None:
        self._mean_ms = (self.recent_ms(now_ms) * 7 + ttft_ms) // 8 if self.recent_ms(now_ms) else ttft_ms
        self._at_ms = now_ms

    def recent_ms(self, now_ms: int) -> int:
        return self._mean_ms if now_ms - self._at_ms <= TTFT_STALE_MS else 0


def overflow_reason(overflow: Overflow, load: int, wait_ms: int, ttft_ms: int) -> str:
    """Why a request that comes now should go elsewhere, empty if it should not.

    `load` is what is held and in flight, `wait_ms` how long it would wait by estimate, `ttft_ms` what follows the wait.
    """
    if overflow.above_concurrency is not None and load >= overflow.above_concurrency:
        return "concurrency"
    if overflow.above_queue_ms is not None and wait_ms > overflow.above_queue_ms:
        return "queue_ms"
    if overflow.above_ttft_ms is not None and wait_ms + ttft_ms > overflow.above_ttft_ms:
        return "ttft_ms"
    return ""
