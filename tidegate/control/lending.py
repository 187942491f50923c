"""Accelerator time lent: an endpoint is away from home and others use the memory it would have there.

An endpoint's *home* is where it was last ready. While it is away, it lends what is not free of the bytes it had there.
Times are handed in by the fleet loop; between two events nothing changes, so the sums are exact.
"""

from dataclasses import dataclass, field

Place = tuple[str, str]
"""An accelerator: (node id, accelerator id)."""


@dataclass(slots=True)
class Spot:
    """One accelerator. `residents`: replica → (endpoint, bytes held); `owners`: endpoint → its bytes when at home."""

    capacity: int
    residents: dict[str, tuple[str, int]] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    settled_ms: int = 0

    def lent(self) -> dict[str, float]:
        """Share of this accelerator that each owner who is away lends right now."""
        present = {endpoint for endpoint, _ in self.residents.values()}
        away = {endpoint: size for endpoint, size in self.owners.items() if endpoint not in present}
        owned = sum(away.values())
        used = sum(size for _, size in self.residents.values())
        lent = min(owned - max(self.capacity - used, 0), used)
        if lent <= 0 or not self.capacity:
            return {}
        return {endpoint: lent / self.capacity * size / owned for endpoint, size in away.items()}


class LentTime:
    """Accelerator-seconds lent by each endpoint."""

    def __init__(self) -> None:
        self._spots: dict[Place, Spot] = {}
        self._homes: dict[str, tuple[Place, ...]] = {}
        self._held: dict[str, tuple[Place, ...]] = {}
        self._seconds: dict[str, float] = {}

    def capacity(self, place: Place, memory_bytes: int) -> None:
        self._spots.setdefault(place, Spot(memory_bytes)).capacity = memory_bytes

    def resident(self, replica: str, endpoint: str, places: tuple[Place, ...], nbytes: int, now_ms: int) -> None:
        """`replica` holds `nbytes` on each of `places` from now on."""
        self.left(replica, now_ms)
        for place in places:
            self._settle(place, now_ms).residents[replica] = (endpoint, nbytes)
        self._held[replica] = places

    def left(self, replica: str, now_ms: int) -> None:
        for place in self._held.pop(replica, ()):
            del self._settle(place, now_ms).residents[replica]

    def at_home(self, endpoint: str, places: tuple[Place, ...], nbytes: int, now_ms: int) -> None:
        """Home is where an endpoint was last ready."""
        self._leave_home(endpoint, now_ms)
        for place in places:
            self._settle(place, now_ms).owners[endpoint] = nbytes
        self._homes[endpoint] = places

    def forget(self, endpoint: str, now_ms: int) -> None:
        self._leave_home(endpoint, now_ms)

    def seconds(self, now_ms: int) -> dict[str, float]:
        for place in self._spots:
            self._settle(place, now_ms)
        return dict(self._seconds)

    def _leave_home(self, endpoint: str, now_ms: int) -> None:
        for place in self._homes.pop(endpoint, ()):
            self._settle(place, now_ms).owners.pop(endpoint, None)

    def _settle(self, place: Place, now_ms: int) -> Spot:
        spot = self._spots.setdefault(place, Spot(0))
        passed_s = max(now_ms - spot.settled_ms, 0) / 1_000 if spot.settled_ms else 0.0
        for endpoint, share in spot.lent().items():
            if share:
                self._seconds[endpoint] = self._seconds.get(endpoint, 0.0) + share * passed_s
        spot.settled_ms = now_ms
        return spot
