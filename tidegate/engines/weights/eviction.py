"""Which models leave a full disk cache: enough bytes at the least total regret. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """One model on the disk: its size, and how long ago it was last used."""

    digest: str
    size: int
    unused_s: float

    @property
    def regret(self) -> float:
        """What letting it go is expected to cost: bytes to fetch again × how likely that is. The rate of return of
        something unused for t seconds is taken as 1 / t, which needs no history and is wrong by little either way.
        """
        return self.size / max(self.unused_s, 1.0)


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
