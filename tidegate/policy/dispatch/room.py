"""Who gets which replica, and who waits: the waiting room of one gateway.

`Dispatch.handle(event, now_ms) -> [effect]` is the only way in. Per endpoint it is first come, first served; a request
is held while no target has a free slot, at most until its deadline and only while fewer than `queued_max` wait. A
draining replica never gets another request, and its fence is confirmed when the last one it has is over. An engine
that did not serve a request is left alone for `SUSPECT_MS`, and the request goes back to the head of the queue, once
for each cause.

The live gateway feeds real events; the simulator feeds the same on a virtual clock. Every event costs O(targets of the
endpoint) plus O(log held) for its deadline.
"""

import heapq
from typing import assert_never

from tidegate.domain.errors import LimitHit
from tidegate.domain.plan import Drain, EndpointRemoved, Resume, Route, Target
from tidegate.policy.dispatch.events import (
    Arrived,
    ConfirmFence,
    Deadline,
    Demand,
    Effect,
    Ended,
    Event,
    Grant,
    Refuse,
    ReportDemand,
    Returned,
    SessionStarted,
)
from tidegate.policy.dispatch.lane import CLOSED, SUSPECT_MS, Lane, Request, Seat


class Dispatch:
    """`region` is the gateway's: targets there come before any other."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._lanes: dict[str, Lane] = {}
        self._seats: dict[str, Seat] = {}
        self._requests: dict[str, Request] = {}
        self._held = 0
        # (instant, request): when a hold ends; (instant, ""): when a suspect replica may be tried again.
        self._deadlines: list[tuple[int, str, str]] = []

    # --- what can be read ---------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        return self._held

    @property
    def in_flight(self) -> int:
        return len(self._requests) - self._held

    def endpoints(self) -> tuple[str, ...]:
        """Every endpoint that ever had a request or a route."""
        return tuple(self._lanes)

    def held_at(self, endpoint: str) -> int:
        lane = self._lanes.get(endpoint)
        return len(lane.waiting) if lane else 0

    def in_flight_at(self, endpoint: str) -> int:
        lane = self._lanes.get(endpoint)
        return lane.in_flight if lane else 0

    def demand(self, endpoint: str, now_ms: int) -> Demand:
        """The endpoint's demand now. Reading it arms the next `ReportDemand`."""
        lane = self._lanes.get(endpoint)
        if lane is None:
            return Demand(0, 0, 0, 0)
        lane.reported = True
        oldest = next(iter(lane.waiting.values()), None)
        wait_ms = max(0, now_ms - oldest.arrived_ms) if oldest else 0
        return Demand(len(lane.waiting), lane.in_flight, lane.arrivals, wait_ms)

    def next_deadline_ms(self) -> int | None:
        """When `Deadline` is due, if ever."""
        return self._deadlines[0][0] if self._deadlines else None

    # --- the one way in -----------------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case Arrived():
                self._arrived(event, now_ms, effects)
            case Ended():
                self._ended(event.request, now_ms, effects)
            case Returned():
                self._returned(event, now_ms, effects)
            case Route():
                self._routed(event, now_ms, effects)
            case Drain():
                self._drained(event.replica, effects)
            case Resume():
                self._resumed(event, now_ms, effects)
            case EndpointRemoved():
                self._removed(event.endpoint, now_ms, effects)
            case SessionStarted():
                for lane in self._lanes.values():
                    lane.version = -1
                for seat in self._seats.values():
                    seat.fenced = seat.draining
            case Deadline():
                self._expired(now_ms, effects)
            case _:
                assert_never(event)
        return effects

    def _arrived(self, event: Arrived, now_ms: int, effects: list[Effect]) -> None:
        assert event.request not in self._requests, "a request arrives once"
        lane = self._lane(event.endpoint)
        lane.arrivals += 1
        request = Request(event.request, lane, now_ms, event.deadline_ms)
        seat = None if lane.waiting else self._free_seat(lane, now_ms)
        if seat is not None:
            self._requests[event.request] = request
            self._grant(request, seat, now_ms, effects)
        elif (refusal := self._refuse_arrival(event, lane, now_ms)) is not None:
            effects.append(refusal)
        else:
            self._requests[event.request] = request
            self._hold(request, now_ms, effects, first=False)
        self._report(lane, effects)

    def _refuse_arrival(self, event: Arrived, lane: Lane, now_ms: int) -> Refuse | None:
        if code := self._closed(lane):
            return Refuse(event.request, code, lane.reason, self._retry_after_ms(lane, now_ms))
        if event.deadline_ms <= now_ms:
            return Refuse(event.request, "capacity", lane.reason, self._retry_after_ms(lane, now_ms), _capacity(lane))
        if len(lane.waiting) >= event.queued_max:
            limit = LimitHit("queue", len(lane.waiting), event.queued_max)
            return Refuse(event.request, "queue_full", "", self._retry_after_ms(lane, now_ms), limit)
        return None

    def _ended(self, request_id: str, now_ms: int, effects: list[Effect]) -> None:
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        lane = request.lane
        if request.seat is None:
            self._unhold(request)
        else:
            # An estimate for Retry-After only: one eighth of the news, seven eighths of what was known.
            service_ms = now_ms - request.granted_ms
            lane.service_ms = (lane.service_ms * 7 + service_ms) // 8 if lane.service_ms else service_ms
            self._release(request, effects)
            self._grant_waiting(lane, now_ms, effects)
            if lane.removed and lane.in_flight == 0:
                self._lanes.pop(lane.endpoint, None)
                return
        self._report(lane, effects)

    def _returned(self, event: Returned, now_ms: int, effects: list[Effect]) -> None:
        request = self._requests[event.request]
        lane, seat = request.lane, request.seat
        assert seat is not None, "only a granted request can come back"
        seat.suspect_until_ms = now_ms + SUSPECT_MS
        heapq.heappush(self._deadlines, (seat.suspect_until_ms, "", lane.endpoint))
        self._release(request, effects)
        code = self._closed(lane)
        if code is None and not self._may_try_again(request, event.lost, now_ms):
            code = "engine_error" if event.lost else "capacity"
        if code is not None:
            self._refuse(request, code, now_ms, effects)
        else:
            self._hold(request, now_ms, effects, first=True)
        self._grant_waiting(lane, now_ms, effects)
        self._report(lane, effects)

    def _may_try_again(self, request: Request, lost: bool, now_ms: int) -> bool:
        if lost:
            request.lost_left -= 1
        else:
            request.unserved_left -= 1
        if request.lost_left < 0 or request.unserved_left < 0:
            return False
        return request.deadline_ms > now_ms or self._free_seat(request.lane, now_ms) is not None

    # --- routes and fences --------------------------------------------------------------------------------------------

    def _routed(self, route: Route, now_ms: int, effects: list[Effect]) -> None:
        lane = self._lane(route.endpoint)
        if route.version <= lane.version:
            return
        had_seats = bool(lane.seats)
        lane.removed = False
        lane.version, lane.state, lane.reason = route.version, route.state, route.reason
        lane.ready_at_ms = now_ms + route.eta_ms
        for seat in lane.seats:
            seat.listed = False
        before, lane.seats = lane.seats, [self._list(target) for target in route.targets]
        for seat in before:
            self._forget_if_done(seat)
        if lane.seats and not had_seats:
            lane.ready_ms = now_ms
        self._grant_waiting(lane, now_ms, effects)
        if code := self._closed(lane):
            self._refuse_all(lane, code, now_ms, effects)
        self._report(lane, effects)

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

    def _drained(self, replica: str, effects: list[Effect]) -> None:
        seat = self._seats.get(replica)
        if seat is None:
            effects.append(ConfirmFence(replica))
            return
        seat.draining, seat.fenced = True, False
        self._fence(seat, effects)

    def _resumed(self, event: Resume, now_ms: int, effects: list[Effect]) -> None:
        seat = self._seats.get(event.replica)
        if seat is None:
            return
        seat.draining = seat.fenced = False
        lane = self._lane(event.endpoint)
        self._grant_waiting(lane, now_ms, effects)
        self._report(lane, effects)

    def _fence(self, seat: Seat, effects: list[Effect]) -> None:
        if seat.draining and seat.in_flight == 0:
            seat.fenced = True
            effects.append(ConfirmFence(seat.target.replica))
        self._forget_if_done(seat)

    def _forget_if_done(self, seat: Seat) -> None:
        if not seat.listed and seat.in_flight == 0:
            self._seats.pop(seat.target.replica, None)

    def _removed(self, endpoint: str, now_ms: int, effects: list[Effect]) -> None:
        lane = self._lanes.get(endpoint)
        if lane is None:
            return
        self._refuse_all(lane, "model_not_found", now_ms, effects)
        for seat in lane.seats:
            seat.listed = False
            self._forget_if_done(seat)
        lane.seats = []
        lane.removed = True
        if lane.in_flight == 0:
            del self._lanes[endpoint]

    # --- holding, granting, refusing ----------------------------------------------------------------------------------

    def _closed(self, lane: Lane) -> str | None:
        """Why nothing of this endpoint should wait, if so."""
        if lane.removed:
            return "model_not_found"
        return None if lane.seats else CLOSED.get(lane.state)

    def _lane(self, endpoint: str) -> Lane:
        lane = self._lanes.get(endpoint)
        if lane is None:
            lane = self._lanes[endpoint] = Lane(endpoint)
        return lane

    def _free_seat(self, lane: Lane, now_ms: int) -> Seat | None:
        """The least loaded target that can take one more, in this region if there is one."""
        best: Seat | None = None
        best_rank = (True, 0.0)
        for seat in lane.seats:
            target = seat.target
            if seat.draining or seat.in_flight >= target.slots or seat.suspect_until_ms > now_ms:
                continue
            rank = (target.region != self._region, seat.in_flight / target.slots)
            if best is None or rank < best_rank:
                best, best_rank = seat, rank
        return best

    def _grant(self, request: Request, seat: Seat, now_ms: int, effects: list[Effect]) -> None:
        assert not seat.draining, "no grant to a draining replica"
        request.seat = seat
        request.granted_ms = now_ms
        seat.in_flight += 1
        request.lane.in_flight += 1
        held_ms = now_ms - request.arrived_ms
        activation_ms = min(held_ms, max(0, request.lane.ready_ms - request.arrived_ms))
        effects.append(Grant(request.id, seat.target, held_ms, activation_ms))

    def _grant_waiting(self, lane: Lane, now_ms: int, effects: list[Effect]) -> None:
        while lane.waiting and (seat := self._free_seat(lane, now_ms)) is not None:
            _, request = lane.waiting.popitem(last=False)
            self._held -= 1
            self._grant(request, seat, now_ms, effects)

    def _hold(self, request: Request, now_ms: int, effects: list[Effect], *, first: bool) -> None:
        lane = request.lane
        urgent = not lane.seats and not lane.waiting
        lane.waiting[request.id] = request
        if first:
            lane.waiting.move_to_end(request.id, last=False)
        self._held += 1
        if len(self._deadlines) > 2 * self._held + 64:
            self._compact(now_ms)
        heapq.heappush(self._deadlines, (request.deadline_ms, request.id, lane.endpoint))
        if urgent:
            lane.reported = False
            effects.append(ReportDemand(lane.endpoint, urgent=True))

    def _compact(self, now_ms: int) -> None:
        """Granted requests leave their deadline behind: the heap would grow with the hold, not with the queue."""
        self._deadlines = [entry for entry in set(self._deadlines) if self._is_due(entry, now_ms)]
        heapq.heapify(self._deadlines)

    def _is_due(self, entry: tuple[int, str, str], now_ms: int) -> bool:
        at_ms, request_id, _ = entry
        if not request_id:
            return at_ms > now_ms
        request = self._requests.get(request_id)
        return request is not None and request.seat is None

    def _unhold(self, request: Request) -> None:
        del request.lane.waiting[request.id]
        self._held -= 1

    def _release(self, request: Request, effects: list[Effect]) -> None:
        seat = request.seat
        assert seat is not None
        request.seat = None
        seat.in_flight -= 1
        request.lane.in_flight -= 1
        assert seat.in_flight >= 0
        self._fence(seat, effects)

    def _refuse(self, request: Request, code: str, now_ms: int, effects: list[Effect]) -> None:
        """Refuses a request that neither waits nor runs any more."""
        del self._requests[request.id]
        lane = request.lane
        limit = _capacity(lane) if code in ("capacity", "hold_expired") else None
        held_ms = max(0, now_ms - request.arrived_ms)
        effects.append(Refuse(request.id, code, lane.reason, self._retry_after_ms(lane, now_ms), limit, held_ms))

    def _refuse_all(self, lane: Lane, code: str, now_ms: int, effects: list[Effect]) -> None:
        for request in list(lane.waiting.values()):
            self._unhold(request)
            self._refuse(request, code, now_ms, effects)

    def _expired(self, now_ms: int, effects: list[Effect]) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, request_id, endpoint = heapq.heappop(self._deadlines)
            lane = self._lanes.get(endpoint)
            if lane is None:
                continue
            if not request_id:
                self._grant_waiting(lane, now_ms, effects)
            elif (request := lane.waiting.get(request_id)) is not None:
                self._unhold(request)
                self._refuse(request, "hold_expired", now_ms, effects)
            self._report(lane, effects)

    def _retry_after_ms(self, lane: Lane, now_ms: int) -> int:
        """What is left of control's estimate while there is no capacity; from how long requests take while there is."""
        slots = sum(seat.target.slots for seat in lane.seats)
        if not slots:
            return max(0, lane.ready_at_ms - now_ms)
        return lane.service_ms * (len(lane.waiting) + 1) // slots

    def _report(self, lane: Lane, effects: list[Effect]) -> None:
        if lane.reported:
            lane.reported = False
            effects.append(ReportDemand(lane.endpoint, urgent=False))


def _capacity(lane: Lane) -> LimitHit:
    return LimitHit("capacity", lane.in_flight, sum(seat.target.slots for seat in lane.seats))
