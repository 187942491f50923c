"""The real time, for everything that is handed a `ports.Clock`. Light to import: the gateway process needs it, too."""

import time


class WallClock:
    """Implements `ports.Clock` on this machine's own clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000
