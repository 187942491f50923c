"""Where an activation goes: the accelerators with the least (time to ready + regret of the victims + neighbours)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tidegate.policy.book import Place
from tidegate.policy.eviction import Candidate, choose


class Offer(NamedTuple):
    """One accelerator: what may be promised on it, what is free at once, who could leave, and how long the way takes.

    `ready_ms` is the activation time from the nearest tier on that node, waiting for its link included. `crowd_ms`:
    what it is worth not to compute beside each replica there.
    """

    place: Place
    headroom_bytes: int
    free_bytes: int
    candidates: Sequence[Candidate]
    ready_ms: int
    crowd_ms: Mapping[str, float]


class Placement(NamedTuple):
    places: tuple[Place, ...]
    victims: tuple[str, ...]
    regret_ms: float
    ready_ms: int
    score_ms: float


def pick(offers: Sequence[Offer], need_bytes: int, count: int, drain_ms: int) -> Placement | None:
    """The best `count` accelerators of one node, each giving `need_bytes`; None when there are not enough.

    `drain_ms` is added where memory is not free at once. One at a time, the cheapest next: a victim that spans several
    accelerators is paid for once and frees its bytes on all of them. So is a neighbour: beside it on two accelerators
    is no worse than on one, and spares those on another. Who leaves counts as one still: what was asked much a moment
    ago will be back, and must not draw the taker to its place.
    """
    left, taken, beside = dict(enumerate(offers)), dict[str, Candidate](), dict[str, float]()
    places, asked = list[Place](), dict[int, tuple[Candidate, ...] | None]()
    ready_ms = wait_ms = 0
    while len(places) < count:
        best: tuple[float, int, tuple[Candidate, ...]] | None = None
        for index, offer in left.items():
            freed = sum(c.nbytes for c in offer.candidates if c.replica in taken) if taken else 0
            rest = [c for c in offer.candidates if c.replica not in taken] if freed else offer.candidates
            if freed or index not in asked:
                asked[index] = choose(rest, need_bytes - offer.headroom_bytes - freed)
            if (victims := asked[index]) is None:
                continue
            wait = 0 if offer.free_bytes >= need_bytes else drain_ms
            crowd_ms = sum([ms for replica, ms in offer.crowd_ms.items() if replica not in beside])
            score = sum(v.regret_ms for v in victims) + wait + offer.ready_ms + crowd_ms
            if best is None or score < best[0]:
                best = (score, index, victims)
        if best is None:
            return None
        offer = left.pop(best[1])
        taken.update((v.replica, v) for v in best[2])
        beside.update(offer.crowd_ms)
        places.append(offer.place)
        ready_ms = max(ready_ms, offer.ready_ms)
        wait_ms = max(wait_ms, 0 if offer.free_bytes >= need_bytes else drain_ms)
    regret_ms = sum(v.regret_ms for v in taken.values())
    score_ms = ready_ms + wait_ms + regret_ms + sum(beside.values())
    return Placement(tuple(places), tuple(taken), regret_ms, ready_ms + wait_ms, score_ms)
