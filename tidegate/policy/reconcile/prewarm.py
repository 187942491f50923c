"""Ahead of demand: an endpoint that is away comes back before its next request, where that is worth more than what
leaves for it.

Worth is regret, the measure of evictions: what its next request would wait, against what those of the victims would.
Both are forecasts, so it must be worth several times as much (`room.AHEAD_WORTH`). And a swap that nobody uses is lost,
so a request must be twice as likely as not within a quarter of the time it has been quiet: arrivals without a pattern
hardly ever are. It is looked at each time that quarter is over and when an hour begins, so that the number of such
swaps between two requests grows with the logarithm of the time between them at most, however wrong the forecast is.
"""

from tidegate.domain.endpoint import Mode
from tidegate.policy.forecast import HOUR_MS
from tidegate.policy.reconcile.fleet import Endpoint, Fleet
from tidegate.policy.reconcile.room import Press, activate

LOOK_MS_MIN = 10_000
LIKELY = 0.67
QUIET_SHARE = 0.25
AT_ONCE_MAX = 2
HOUR_SPREAD_MS = 30_000


def watch(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Nothing of it is up, and nobody asks for it: look at it again later."""
    quiet_ms = endpoint.history.quiet_ms(now_ms)
    if endpoint.ahead_ms or quiet_ms is None or endpoint.deployment.mode is Mode.BATCH or not fleet.settings.prewarm:
        return
    # When an hour begins not all are looked at in the same instant.
    hour_ms = (now_ms // HOUR_MS + 1) * HOUR_MS + (endpoint.history.last_ms or 0) % HOUR_SPREAD_MS
    endpoint.ahead_ms = min(now_ms + max(LOOK_MS_MIN, int(quiet_ms * QUIET_SHARE)), hour_ms)
    fleet.set_timer(endpoint.ahead_ms, "ahead", endpoint.name)


def look(fleet: Fleet, endpoint: Endpoint, now_ms: int) -> None:
    """Bring it up if that is worth it now. Nobody's wait is made longer for it, and few come up so at once."""
    endpoint.ahead_ms = 0
    fleet.ahead = [name for name in fleet.ahead if name in fleet.endpoints and fleet.endpoints[name].coming()]
    away = not (endpoint.busy or endpoint.live_count() or endpoint.activations)
    quiet_ms = endpoint.history.quiet_ms(now_ms)
    if quiet_ms is None or not away or endpoint.withdrawn or endpoint.failures:
        return
    if fleet.waiting or len(fleet.ahead) >= AT_ONCE_MAX:
        return
    within_ms = int(quiet_ms * QUIET_SHARE)
    likely = endpoint.history.needed_within(now_ms, within_ms)
    seen = (("likely", round(likely, 2)), ("within_ms", within_ms))
    if likely >= LIKELY and activate(fleet, endpoint, now_ms, "prewarm", Press.AHEAD, None, seen):
        fleet.ahead.append(endpoint.name)
        endpoint.ahead_until_ms = now_ms + min(within_ms, HOUR_MS)
