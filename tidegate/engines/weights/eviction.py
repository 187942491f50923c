"""Which models leave a full disk cache: enough bytes at the least total regret. Pure.

Regret of a model = how often it is used × the time it took to fetch it. Use is counted with a half-life of a day, over
which traffic repeats itself: what was used every hour is kept for what was tried once a minute ago.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE_S = 86_400.0
BYTES_PER_MS_UNKNOWN = 100_000  # of a model whose fetch was not timed: 1 Gbit/s or so


@dataclass(frozen=True, slots=True)
class Kept:
    """One model on the disk: its bytes, its uses as of now (see `faded`), and what its fetch took; 0: not known."""

    digest: str
    size: int
    uses: float
    fetch_ms: int = 0

    @property
    def regret(self) -> float:
        """What letting it go is expected to cost, in ms a day or so."""
        return self.uses * (self.fetch_ms or self.size / BYTES_PER_MS_UNKNOWN)


def faded(uses: float, after_s: float) -> float:
    """What is left of a count of uses after so long without one."""
    return uses * math.exp2(-max(after_s, 0.0) / HALF_LIFE_S)


def victims(kept: Iterable[Kept], need_bytes: int) -> list[str] | None:
    """Digests to drop, least regretted byte first, none of them needlessly. None when all together are not enough."""
    chosen: list[Kept] = []
    freed = 0
    for model in sorted(kept, key=lambda k: (k.regret / max(k.size, 1), k.digest)):
        if freed >= need_bytes:
            break
        chosen.append(model)
        freed += model.size
    if freed < need_bytes:
        return None
    for model in sorted(chosen, key=lambda k: -k.regret):  # a large one taken last may have made earlier ones needless
        if freed - model.size >= need_bytes:
            chosen.remove(model)
            freed -= model.size
    return [model.digest for model in chosen]
