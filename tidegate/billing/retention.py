"""Usage records are kept for as many days as were asked for; sums by the hour, entries and balances for ever.

A record that a collector of usage events has not taken yet is kept however old it is.
"""

import asyncio
import logging
from collections.abc import Sequence

from tidegate.domain.errors import StoreFault
from tidegate.domain.money_ports import Ledger
from tidegate.domain.ports import Clock
from tidegate.domain.units import MS_PER_DAY, MS_PER_HOUR

log = logging.getLogger(__name__)

DAYS_MIN = 2  # an id is what tells a repeated record from a new one, for as long as it is kept
EVERY_S = 600.0
ROWS_A_TURN_MAX = 10_000


async def keep_records(ledger: Ledger, clock: Clock, days: int, sinks: Sequence[str]) -> None:
    """Until cancelled."""
    while True:
        try:
            removed = await asyncio.to_thread(purge, ledger, clock.now_ms(), days, sinks)
        except StoreFault as fault:
            log.warning("old usage records stay for now: %s", fault.reason)
            removed = 0
        if removed < ROWS_A_TURN_MAX:  # else there is more: go on at once, in turns others can get in between
            await asyncio.sleep(EVERY_S)


def purge(ledger: Ledger, now_ms: int, days: int, sinks: Sequence[str]) -> int:
    """One turn: removes records of requests that arrived more than `days` before `now_ms`; how many."""
    assert days >= DAYS_MIN, "checked where it was configured"
    before_ms = (now_ms - days * MS_PER_DAY) // MS_PER_HOUR * MS_PER_HOUR
    delivered = min((ledger.delivered(sink) for sink in sinks), default=None)
    return ledger.purge(before_ms, delivered, ROWS_A_TURN_MAX)
