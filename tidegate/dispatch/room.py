"""Who gets which replica, and who waits: the waiting room of one gateway.

`Dispatch.handle(event, now_ms) -> [effect]` is the only way in. A request is held while no target of its endpoint has a
free slot, at most until its deadline and only while fewer than `queued_max` wait; whose turn it is, `queue` says. A
draining replica never gets another request, and its fence is confirmed when the last one it has is over. An engine
that did not serve a request is left alone for `SUSPECT_MS`, and the request goes back to the head of the queue, once
for each cause. A request whose endpoint is busy or fails goes to another where its owner allows it (`elsewhere`), once;
what is not served there either comes home.

The live gateway feeds real events; the simulator feeds the same on a virtual clock. Every event costs O(targets of the
endpoint + tenants waiting there) plus O(log held) for its deadline.
"""

from typing import assert_never

from tidegate.dispatch import elsewhere
from tidegate.dispatch.deadlines import Deadlines
from tidegate.dispatch.events import (
    Arrived,
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
from tidegate.dispatch.lane import SUSPECT_MS, Lane, Request, Seat
from tidegate.dispatch.seats import Seats
from tidegate.domain.plan import Drain, EndpointRemoved, Resume, Route


class Dispatch:
    """`region` is the gateway's: targets there come before any other."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._lanes: dict[str, Lane] = {}
        self._seats = Seats()
        self._requests: dict[str, Request] = {}
        self._held = 0
        self._deadlines = Deadlines(self._is_held, lambda: self._held)
        self.prompt = False
        """Whether it is told at once that a replica begins or ends to work: batch may stand still for it."""

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
        oldest_ms = lane.waiting.oldest_ms()
        wait_ms = max(0, now_ms - oldest_ms) if oldest_ms is not None else 0
        busy = tuple([seat.target.replica for seat in lane.seats if seat.in_flight])
        return Demand(len(lane.waiting), lane.in_flight, lane.arrivals, wait_ms, busy)

    def next_deadline_ms(self) -> int | None:
        """When `Deadline` is due, if ever."""
        return self._deadlines.next_ms()

    # --- the one way in -----------------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case Arrived():
                self._arrived(event, now_ms, effects)
            case Ended():
                self._ended(event, now_ms, effects)
            case Returned():
                self._returned(event, now_ms, effects)
            case Route():
                self._routed(event, now_ms, effects)
            case Drain():
                self._seats.drain(event.replica, effects)
            case Resume():
                if self._seats.resume(event.replica):
                    lane = self._lane(event.endpoint)
                    self._grant_waiting(lane, now_ms, effects)
                    self._report(lane, effects)
            case EndpointRemoved():
                self._removed(event.endpoint, now_ms, effects)
            case SessionStarted():
                for lane in self._lanes.values():
                    lane.version = -1
                self._seats.restart()
            case Deadline():
                self._expired(now_ms, effects)
            case _:
                assert_never(event)
        return effects

    def _arrived(self, event: Arrived, now_ms: int, effects: list[Effect]) -> None:
        assert event.request not in self._requests, "a request arrives once"
        lane = self._lane(event.endpoint)
        lane.arrivals += 1
        request = self._requests[event.request] = Request(event, lane, now_ms)
        seat = self._next_seat(lane, now_ms)
        if why := self._why_leave(request, seat, now_ms):
            self._leave(request, *why, now_ms, effects)
        if request.lane is lane:
            if seat is not None:
                self._grant(request, seat, now_ms, effects)
            elif code := lane.closed():
                self._refuse(request, code, now_ms, effects)
            elif event.deadline_ms <= now_ms:
                self._refuse(request, "capacity", now_ms, effects)
            elif self._has_place(request, now_ms, effects):
                self._hold(request, now_ms, effects, first=False)
            else:
                self._refuse(request, "queue_full", now_ms, effects)
        self._report(lane, effects)

    def _has_place(self, request: Request, now_ms: int, effects: list[Effect]) -> bool:
        """A place in the queue. A full one makes room for whoever has the fewest waiting."""
        lane = request.lane
        if len(lane.waiting) < request.queued_max:
            return True
        crowded_out = lane.waiting.crowded_out(request.tenant)
        if crowded_out is not None:
            self._unhold(crowded_out)
            self._refuse(crowded_out, "queue_full", now_ms, effects)
        return len(lane.waiting) < request.queued_max

    def _ended(self, event: Ended, now_ms: int, effects: list[Effect]) -> None:
        request = self._requests.pop(event.request, None)
        if request is None:
            return
        lane = request.lane
        if request.seat is None:
            self._unhold(request)
        else:
            # An estimate for Retry-After only: one eighth of the news, seven eighths of what was known.
            service_ms = now_ms - request.granted_ms
            lane.service_ms = (lane.service_ms * 7 + service_ms) // 8 if lane.service_ms else service_ms
            if event.first_byte_ms:
                lane.breaker.worked()
                lane.ttft.seen(event.first_byte_ms - request.granted_ms, now_ms)
            lane.waiting.settle(request, event.tokens)
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
        # Taken from it on purpose (batch gives way at once): no failure of the replica, and no try of the request.
        preempted = seat.draining and lane is request.home
        if not preempted:
            lane.breaker.failed(now_ms)
        seat.suspect_until_ms = now_ms + SUSPECT_MS
        self._deadlines.push(seat.suspect_until_ms, "", lane.endpoint, now_ms)
        self._release(request, effects)
        code = lane.closed()
        again = preempted or (lane is request.home and self._may_try_again(request, event.lost, now_ms))
        if code is None and not again:
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
        return request.deadline_ms > now_ms or request.lane.free_seat(self._region, now_ms) is not None

    # --- routes -------------------------------------------------------------------------------------------------------

    def _routed(self, route: Route, now_ms: int, effects: list[Effect]) -> None:
        lane = self._lane(route.endpoint)
        if route.version <= lane.version:
            return
        had_seats = bool(lane.seats)
        lane.removed = False
        lane.version, lane.state = route.version, route.state
        lane.reason, lane.refusal = route.reason, route.refusal
        lane.ready_at_ms = now_ms + route.eta_ms
        self._seats.replace(lane, route.targets)
        if lane.seats and not had_seats:
            lane.ready_ms = now_ms
        self._grant_waiting(lane, now_ms, effects)
        if code := lane.closed():
            self._refuse_all(lane, code, now_ms, effects)
        elif not lane.seats:
            for request in list(lane.waiting):
                if why := self._why_leave(request, None, now_ms):
                    self._leave(request, *why, now_ms, effects)
        self._report(lane, effects)

    def _removed(self, endpoint: str, now_ms: int, effects: list[Effect]) -> None:
        lane = self._lanes.get(endpoint)
        if lane is None:
            return
        lane.removed, lane.version = True, -1  # who numbers its routes next may begin anew
        self._seats.replace(lane, ())
        self._refuse_all(lane, "model_not_found", now_ms, effects)
        if lane.in_flight == 0:
            del self._lanes[endpoint]

    # --- going elsewhere ----------------------------------------------------------------------------------------------

    def _why_leave(self, request: Request, seat: Seat | None, now_ms: int) -> tuple[str, str] | None:
        """(endpoint, reason) when the one it was sent to should not serve it."""
        allowed, lane = request.elsewhere, request.lane
        if allowed is None or lane.version < 0:  # what control has not told yet is not a failure
            return None
        if allowed.fallback and allowed.resident and not lane.seats:
            return allowed.fallback, "no_replica"
        if allowed.fallback and not lane.breaker.allows(now_ms):
            return allowed.fallback, "breaker_open"
        if allowed.overflow is not None:
            load = lane.in_flight + len(lane.waiting)
            wait_ms = 0 if seat is not None else lane.retry_after_ms(now_ms)
            if reason := elsewhere.overflow_reason(allowed.overflow, load, wait_ms, lane.ttft.recent_ms(now_ms)):
                return allowed.overflow.to, reason
        return None

    def _leave(self, request: Request, to: str, reason: str, now_ms: int, effects: list[Effect]) -> bool:
        """Hands it over to the endpoint `to`. False, and nothing changed: nobody there would serve it."""
        lane = self._lane(to)
        seat = self._next_seat(lane, now_ms)
        hopeless = seat is None and (request.deadline_ms <= now_ms or len(lane.waiting) >= request.queued_max)
        if lane.closed() or hopeless or not lane.breaker.allows(now_ms):
            return False
        if request.held:
            self._unhold(request)
        request.elsewhere, request.lane, request.reason = None, lane, reason
        lane.arrivals += 1
        if seat is not None:
            self._grant(request, seat, now_ms, effects)
        else:
            self._hold(request, now_ms, effects, first=False)
        self._report(lane, effects)
        return True

    def _come_home(self, request: Request, now_ms: int, effects: list[Effect]) -> bool:
        """Not served elsewhere: back to the endpoint it was sent to, before the others. False: not served there."""
        home = request.lane = request.home
        request.reason = ""
        seat = self._next_seat(home, now_ms)
        if seat is not None:
            self._grant(request, seat, now_ms, effects)
        elif home.closed() or request.deadline_ms <= now_ms:
            return False
        else:
            self._hold(request, now_ms, effects, first=True)
        return True

    # --- holding, granting, refusing ----------------------------------------------------------------------------------

    def _lane(self, endpoint: str) -> Lane:
        lane = self._lanes.get(endpoint)
        if lane is None:
            lane = self._lanes[endpoint] = Lane(endpoint)
        return lane

    def _next_seat(self, lane: Lane, now_ms: int) -> Seat | None:
        """For a newcomer: those who wait come first."""
        return None if lane.waiting else lane.free_seat(self._region, now_ms)

    def _grant(self, request: Request, seat: Seat, now_ms: int, effects: list[Effect]) -> None:
        assert not seat.draining, "no grant to a draining replica"
        lane = request.lane
        request.seat = seat
        request.granted_ms = now_ms
        seat.in_flight += 1
        lane.stirred = lane.stirred or seat.in_flight == 1
        lane.in_flight += 1
        held_ms = now_ms - request.arrived_ms
        activation_ms = min(held_ms, max(0, lane.ready_ms - request.arrived_ms))
        effects.append(Grant(request.id, seat.target, held_ms, activation_ms, lane.endpoint, request.reason))

    def _grant_waiting(self, lane: Lane, now_ms: int, effects: list[Effect]) -> None:
        while lane.waiting and (seat := lane.free_seat(self._region, now_ms)) is not None:
            request = lane.waiting.pop(now_ms)
            request.held = False
            self._held -= 1
            self._grant(request, seat, now_ms, effects)

    def _hold(self, request: Request, now_ms: int, effects: list[Effect], *, first: bool) -> None:
        lane = request.lane
        urgent = not lane.seats and not lane.waiting
        lane.waiting.push(request, first=first)
        request.held = True
        self._held += 1
        self._deadlines.push(request.deadline_ms, request.id, lane.endpoint, now_ms)
        if request.elsewhere is not None and (hold := request.elsewhere.hold) is not None:
            self._deadlines.push(max(request.arrived_ms + hold[0], now_ms), request.id, lane.endpoint, now_ms)
        if urgent:
            lane.reported = False
            effects.append(ReportDemand(lane.endpoint, urgent=True))

    def _is_held(self, request_id: str) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.held

    def _unhold(self, request: Request) -> None:
        request.lane.waiting.remove(request)
        request.held = False
        self._held -= 1

    def _release(self, request: Request, effects: list[Effect]) -> None:
        seat = request.seat
        assert seat is not None
        request.seat = None
        seat.in_flight -= 1
        request.lane.in_flight -= 1
        request.lane.stirred = request.lane.stirred or not seat.in_flight
        assert seat.in_flight >= 0
        self._seats.fence(seat, effects)

    def _refuse(self, request: Request, code: str, now_ms: int, effects: list[Effect]) -> None:
        """Neither waits nor runs any more: it comes home, or goes to the fallback, or is refused."""
        if request.lane is not request.home:
            if self._come_home(request, now_ms, effects):
                return
            code = request.home.closed() or code
        elif (allowed := request.elsewhere) and allowed.fallback and code in elsewhere.FALLS_BACK:  # noqa: SIM102
            if self._leave(request, allowed.fallback, code, now_ms, effects):
                return
        del self._requests[request.id]
        lane = request.lane
        held_ms = max(0, now_ms - request.arrived_ms)
        retry_ms = lane.retry_after_ms(now_ms)
        effects.append(Refuse(request.id, code, lane.reason, retry_ms, lane.limit(code, request.queued_max), held_ms))

    def _refuse_all(self, lane: Lane, code: str, now_ms: int, effects: list[Effect]) -> None:
        for request in list(lane.waiting):
            self._unhold(request)
            self._refuse(request, code, now_ms, effects)

    def _expired(self, now_ms: int, effects: list[Effect]) -> None:
        while (due := self._deadlines.pop(now_ms)) is not None:
            _, request_id, endpoint = due
            request = self._requests.get(request_id)
            lane = self._lanes.get(endpoint) if request is None else request.lane
            if lane is None:
                continue
            if request is None:
                self._grant_waiting(lane, now_ms, effects)
            elif request.held and request.deadline_ms <= now_ms:
                self._unhold(request)
                self._refuse(request, "hold_expired", now_ms, effects)
            elif request.held:
                self._held_long_enough(request, now_ms, effects)
            self._report(lane, effects)

    def _held_long_enough(self, request: Request, now_ms: int, effects: list[Effect]) -> None:
        allowed = request.elsewhere
        if allowed is None or allowed.overflow is None or allowed.hold is None:
            return
        if not self._leave(request, allowed.overflow.to, allowed.hold[1], now_ms, effects):
            self._deadlines.push(now_ms + SUSPECT_MS, request.id, request.lane.endpoint, now_ms)

    def _report(self, lane: Lane, effects: list[Effect]) -> None:
        """At once where somebody may wait for the place, or the compute, of what has just become idle."""
        gone_idle = self._held > 0 and not lane.in_flight and not lane.waiting and bool(lane.seats)
        urgent = gone_idle or (self.prompt and lane.stirred)
        lane.stirred = False
        if lane.reported or urgent:
            lane.reported = False
            effects.append(ReportDemand(lane.endpoint, urgent))
