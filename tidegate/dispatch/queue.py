"""Who waits at one endpoint, and whose turn it is: fair between tenants by the tokens each was served.

A virtual token counter a tenant (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the next
request is of the waiting tenant that was served least, oldest first within it. A tenant that joins starts at the
counter of whoever was granted last, so idling earns no credit; a tenant that is ahead stays ahead. Counters live while
somebody waits: without a queue there is nothing to share.

Within a tenant those come first that can still be served within the endpoint's SLO, oldest first; then those that no
longer can, oldest first. In an overload that goes on, strict turns would make everybody late; so those are late who
already were (adaptive LIFO serves the same end: Maurer, "Fail at Scale", ACM Queue 2015). A request's deadline bounds
its wait either way.

Bounds, with S slots and no request above L tokens: of two tenants that wait all the while, neither is served more than
S × L tokens beyond the other; and a request of a tenant that is not ahead is granted before anything of a tenant that
is, so a flood, however long, moves it by the wait for one freed slot.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

OUTPUT_WEIGHT = 2  # an output token costs an engine about twice an input token (the paper's weights)
COUNTERS_MAX = 256


class Waits(Protocol):
    """`tokens` is the estimate it is charged with when its turn comes; `charged` what it was."""

    id: str
    tenant: str
    arrived_ms: int
    tokens: int
    charged: int
    late_ms: int


R = TypeVar("R", bound=Waits)


def served_tokens(input_tokens: int, output_tokens: int) -> int:
    """What a request counts for."""
    return input_tokens + OUTPUT_WEIGHT * output_tokens


class Line(Generic[R]):
    """One tenant's. A request moves from `punctual` to `late` once, when its turn would have come."""

    __slots__ = ("late", "punctual")

    def __init__(self) -> None:
        self.punctual: OrderedDict[str, R] = OrderedDict()
        self.late: OrderedDict[str, R] = OrderedDict()

    def __len__(self) -> int:
        return len(self.punctual) + len(self.late)

    def __iter__(self) -> Iterator[R]:
        yield from self.late.values()
        yield from self.punctual.values()

    def push(self, request: R, *, first: bool) -> None:
        self.punctual[request.id] = request
        self.punctual.move_to_end(request.id, last=not first)

    def next(self, now_ms: int) -> R:
        while self.punctual:
            request = next(iter(self.punctual.values()))
            if not request.late_ms or request.late_ms > now_ms:
                return request
            del self.punctual[request.id]
            self.late[request.id] = request
        return next(iter(self.late.values()))

    def remove(self, request: R) -> None:
        if self.punctual.pop(request.id, None) is None:
            del self.late[request.id]

    def oldest_ms(self) -> int:
        return next(iter(self)).arrived_ms

    def newest(self) -> R:
        return next(reversed((self.punctual or self.late).values()))


class FairQueue(Generic[R]):
    """`pop` costs O(tenants that wait)."""

    __slots__ = ("_lines", "_served", "_size", "_turn")

    def __init__(self) -> None:
        self._lines: dict[str, Line[R]] = {}
        self._served: dict[str, int] = {}
        self._turn = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[R]:
        """Tenant by tenant, oldest first within each."""
        return (request for line in self._lines.values() for request in line)

    def oldest_ms(self) -> int | None:
        return min(line.oldest_ms() for line in self._lines.values()) if self._size else None

    def push(self, request: R, *, first: bool) -> None:
        """`first`: it had its turn and comes back, so it goes before the others of its tenant."""
        if not self._size:
            self._served.clear()
            self._turn = 0
        line = self._lines.get(request.tenant)
        if line is None:
            line = self._lines[request.tenant] = Line()
        line.push(request, first=first)
        self._size += 1

    def pop(self, now_ms: int) -> R:
        counter, _, tenant = min((self._counter(t), line.oldest_ms(), t) for t, line in self._lines.items())
        request = self._lines[tenant].next(now_ms)
        self._turn = counter
        request.charged = max(request.tokens, 1)
        self._served[tenant] = counter + request.charged
        if len(self._served) > COUNTERS_MAX:  # those least ahead are forgiven: without one a tenant starts at the turn
            ahead = sorted(self._served.items(), key=lambda item: -item[1])
            self._served = dict(ahead[: COUNTERS_MAX // 2])
        self.remove(request)
        return request

    def remove(self, request: R) -> None:
        line = self._lines[request.tenant]
        line.remove(request)
        if not line:
            del self._lines[request.tenant]
        self._size -= 1

    def settle(self, request: R, tokens: int) -> None:
        """It is over and counted for `tokens`; an estimate that was above that stays charged."""
        extra = tokens - request.charged
        if self._size and extra > 0:
            self._served[request.tenant] = self._counter(request.tenant) + extra

    def crowded_out(self, tenant: str) -> R | None:
        """Whom a newcomer of `tenant` may push out of a full queue: the newest of the longest line, if it is longer."""
        longest = max(self._lines.values(), key=len)
        own = self._lines.get(tenant)
        return longest.newest() if len(longest) > (len(own) if own is not None else 0) + 1 else None

    def _counter(self, tenant: str) -> int:
        return max(self._served.get(tenant, 0), self._turn)
