"""Where an activation goes: the accelerators with the least (time to ready + regret of the victims)."""

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.policy.book import Place
from tidegate.policy.eviction import Candidate, choose


@dataclass(frozen=True, slots=True)
class Offer:
    """One accelerator: what may be promised on it, what is free at once, who could leave, and how long the way takes.

    `ready_ms` is the activation time from the nearest tier on that node, waiting for its link included.
    """

    place: Place
    headroom_bytes: int
    free_bytes: int
    candidates: Sequence[Candidate]
    ready_ms: int


@dataclass(frozen=True, slots=True)
class Placement:
    places: tuple[Place, ...]
    victims: tuple[str, ...]
    regret_ms: float
    ready_ms: int

    @property
    def score_ms(self) -> float:
        return self.ready_ms + self.regret_ms


def pick(offers: Sequence[Offer], need_bytes: int, count: int, drain_ms: int) -> Placement | None:
    """The best `count` accelerators of one node, each giving `need_bytes`; None when there are not enough.

    `drain_ms` is added where memory is not free at once. A victim spread over several accelerators counts once.
    """
    scored: list[tuple[float, int, Offer, tuple[Candidate, ...]]] = []
    for index, offer in enumerate(offers):
        victims = choose(offer.candidates, need_bytes - offer.headroom_bytes)
        if victims is None:
            continue
        wait = 0 if offer.free_bytes >= need_bytes else drain_ms
        scored.append((sum(v.regret_ms for v in victims) + wait + offer.ready_ms, index, offer, victims))
    if len(scored) < count:
        return None
    scored.sort(key=lambda s: s[:2])
    best = scored[:count]
    victims_by_id = {v.replica: v.regret_ms for _, _, _, victims in best for v in victims}
    wait = max(0 if offer.free_bytes >= need_bytes else drain_ms for _, _, offer, _ in best)
    return Placement(
        places=tuple(offer.place for _, _, offer, _ in best),
        victims=tuple(victims_by_id),
        regret_ms=sum(victims_by_id.values()),
        ready_ms=max(offer.ready_ms for _, _, offer, _ in best) + wait,
    )
