"""The replicas a gateway may send to, and the fences of those that drain."""

from tidegate.dispatch.events import ConfirmFence, Effect
from tidegate.dispatch.lane import Lane, Seat
from tidegate.domain.plan import Target


class Seats:
    """Every replica listed by a route or still serving something."""

    def __init__(self) -> None:
        self._seats: dict[str, Seat] = {}

    def replace(self, lane: Lane, targets: tuple[Target, ...]) -> None:
        """From now on `targets` serve the lane."""
        for seat in lane.seats:
            seat.listed = False
        before, lane.seats = lane.seats, [self._list(target) for target in targets]
        for seat in before:
            self.forget_if_done(seat)

    def _list(self, target: Target) -> Seat:
        seat = self._seats.get(target.replica)
        if seat is None:
            seat = self._seats[target.replica] = Seat(target)
        if seat.target.address != target.address:
            seat.suspect_until_ms = 0
        seat.target, seat.listed = target, True
        if seat.fenced:
            # Control lists it after it had its fence: it went to sleep and is back.
            seat.draining = seat.fenced = False
        return seat

    def drain(self, replica: str, effects: list[Effect]) -> None:
        seat = self._seats.get(replica)
        if seat is None:
            effects.append(ConfirmFence(replica))
            return
        seat.draining, seat.fenced = True, False
        self.fence(seat, effects)

    def resume(self, replica: str) -> bool:
        """Whether it is known here."""
        seat = self._seats.get(replica)
        if seat is not None:
            seat.draining = seat.fenced = False
        return seat is not None

    def restart(self) -> None:
        """A new link to control: what it lists is not draining."""
        for seat in self._seats.values():
            seat.fenced = seat.draining

    def fence(self, seat: Seat, effects: list[Effect]) -> None:
        if seat.draining and seat.in_flight == 0:
            seat.fenced = True
            effects.append(ConfirmFence(seat.target.replica))
        self.forget_if_done(seat)

    def forget_if_done(self, seat: Seat) -> None:
        if not seat.listed and seat.in_flight == 0:
            self._seats.pop(seat.target.replica, None)
