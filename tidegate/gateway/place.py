"""A place on a replica that outlives a request: what keeps a session's capacity warm.

To the waiting room it is one request in flight, so everything that holds for one holds for it: its endpoint is in
demand, its replica is no victim, a drain waits for it, and it goes to another replica when its own is lost. The
session's responses run within it, one at a time, on a slot that is theirs already.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from tidegate.dispatch import Grant, Refuse
from tidegate.domain.usage import UsageRecord
from tidegate.gateway.loop import Answer, Waiting
from tidegate.quota.gate import Hold
from tidegate.wire.internal import EndpointEntry

Arrival = tuple[EndpointEntry, int, int, str, int]
"""What a request arrives with: endpoint, instant, bound of its hold, tenant, tokens."""


class Room(Protocol):
    """The waiting room as a relay sees it: the gateway's loop, or a place that is held already."""

    @property
    def endpoints(self) -> Mapping[str, EndpointEntry]: ...

    def arrive(
        self, request: str, entry: EndpointEntry, arrived_ms: int, wait_ms: int, tenant: str, tokens: int
    ) -> Answer | Waiting: ...

    def returned(self, request: str, lost: bool) -> Answer | Waiting: ...

    def ended(self, request: str, first_byte_ms: int, tokens: int) -> None: ...

    def settled(self, hold: Hold, record: UsageRecord) -> None: ...


class Place:
    """A `Room` of one. `take` asks for it, `leave` gives it up; `refused` is told when nobody waits for the answer."""

    def __init__(self, name: str, room: Room, refused: Callable[[Answer], None]) -> None:
        self._name = name
        self._room = room
        self._refused = refused
        self._grant: Grant | None = None
        self._asked: Waiting | None = None
        self._waiter: Waiting | None = None
        self._tokens = 0
        self._call: Arrival | None = None  # what the response that runs has arrived with, until its place was lost

    def take(self, entry: EndpointEntry, arrived_ms: int, wait_ms: int, tenant: str) -> None:
        answer = self.arrive("", entry, arrived_ms, wait_ms, tenant, 0)
        if isinstance(answer, asyncio.Future):
            self._waiter = None
        else:
            self._grant = answer if isinstance(answer, Grant) else None
            if self._grant is None:
                self._refused(answer)

    def leave(self) -> None:
        """Gives the place up; harmless where there was none."""
        self._grant = None
        self._room.ended(self._name, 0, self._tokens)  # its first byte says nothing of how soon a request is served

    # --- what a relay asks of it --------------------------------------------------------------------------------------

    @property
    def endpoints(self) -> Mapping[str, EndpointEntry]:
        return self._room.endpoints

    def arrive(
        self, request: str, entry: EndpointEntry, arrived_ms: int, wait_ms: int, tenant: str, tokens: int
    ) -> Answer | Waiting:
        """Answers at once while the place is held; a place that was refused is asked for again."""
        self._call = (entry, arrived_ms, wait_ms, tenant, tokens)
        if self._grant is not None:
            # What was waited for the place is the first response's; those behind it wait for nothing.
            grant, self._grant = self._grant, replace(self._grant, held_ms=0, activation_ms=0)
            return grant
        if self._asked is not None:
            return self._wait()
        return self._hear(self._room.arrive(self._name, entry, arrived_ms, wait_ms, tenant, tokens))

    def returned(self, request: str, lost: bool) -> Answer | Waiting:
        """Its replica did not serve the response: another one is tried, once for each response."""
        self._grant = None
        answer = self._room.returned(self._name, lost)
        call, self._call = self._call, None
        if call is not None and isinstance(answer, Grant):
            return self._hear(answer)
        self._room.ended(self._name, 0, 0)
        if call is None:  # the second time in one response, which is told, like any request
            return Refuse(self._name, "engine_error" if lost else "capacity")
        # What the place may wait was counted from when the session began: this response waits from its own beginning.
        return self._hear(self._room.arrive(self._name, *call))

    def ended(self, request: str, first_byte_ms: int, tokens: int) -> None:
        """A response is over; the place is kept."""
        self._tokens += tokens
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def settled(self, hold: Hold, record: UsageRecord) -> None:
        self._room.settled(hold, record)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hear(self, answer: Answer | Waiting) -> Answer | Waiting:
        if isinstance(answer, asyncio.Future):
            self._asked = answer
            answer.add_done_callback(self._told)
            return self._wait()
        if isinstance(answer, Grant):
            self._grant = replace(answer, held_ms=0, activation_ms=0)
        return answer

    def _wait(self) -> Waiting:
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _told(self, asked: Waiting) -> None:
        self._asked = None
        answer = asked.result()
        if answer is None:  # it was left before it was had
            return
        waiter, self._waiter = self._waiter, None
        if isinstance(answer, Grant):
            self._grant = answer
        if waiter is not None and not waiter.done():
            if self._grant is not None:
                self._grant = replace(self._grant, held_ms=0, activation_ms=0)
            waiter.set_result(answer)
        elif self._grant is None:
            self._refused(answer)
