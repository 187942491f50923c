"""Budgets shared out to gateways as leases, so that admission needs no database and their sum is never more. Pure.

For each budget and window, and at every instant: what the ledger has of gateways that are gone, plus for each gateway
that may still spend the largest cap it can be acting on, is at most the budget. A cap counts what a gateway spends *in
all* in that window, so messages may be repeated, and what the ledger later learns of the same spending changes nothing.
A cap that was lowered counts in full until the gateway has said that it acts on the lower one. A gateway that is gone
keeps its part until its journal has been read to the end; from then on only what it really spent counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tidegate.domain.limits import Lease, Limits, Spending
from tidegate.quota.windows import bounds

AHEAD_MS = 60_000  # the next window is leased this early, so that its first request finds a lease
SHARES = 4  # a cap is lowered only when it is off by this part of a fair share: not at every request


@dataclass(frozen=True, slots=True)
class Spent:
    """What the ledger knows: nano-USD by gateway of each budget it has looked at (of others nothing is known yet).
    `closed` are gateways whose journals are read to the end; `open` those whose are not.
    """

    by_gateway: Mapping[Spending, Mapping[str, int]]
    closed: frozenset[str]
    open: frozenset[str]


@dataclass(slots=True)
class _Held:
    """One gateway's part. `at` is the cap it was told last (None: never any), `cap` the one it said it acts on,
    `unconfirmed` those sent since (number → cap).
    """

    at: int | None = None
    cap: int = 0
    used: int = 0
    unconfirmed: dict[int, int] = field(default_factory=dict)

    def most(self, known: int) -> int:
        """What it may come to spend, of which the ledger knows `known`."""
        return max(self.cap, self.used, known, *self.unconfirmed.values())


class Treasury:
    """`until_ms`: before this instant no gateway that has not reported may be leased around."""

    def __init__(self, until_ms: int) -> None:
        self._until_ms = until_ms
        self._budgets: dict[Spending, int] = {}
        self._held: dict[Spending, dict[str, _Held]] = {}
        self._live: set[str] = set()
        self._number = 0

    def joined(self, gateway: str) -> None:
        self._live.add(gateway)

    def left(self, gateway: str) -> None:
        """Its link ended. What it holds stays its own until its journal is closed; what was under way may be lost, so
        on its next link it is told again.
        """
        self._live.discard(gateway)
        for held in self._held.values():
            if gateway in held:
                held[gateway].at = None

    def reported(self, gateway: str, number: int, leases: Iterable[Lease]) -> None:
        """`gateway` acts on these caps and no others, having received everything up to message `number`."""
        leases = list(leases)
        told = {lease.of for lease in leases}
        for of, parts in self._held.items():
            # It did not know that budget yet: it is told again.
            if of not in told and gateway in parts and all(n <= number for n in parts[gateway].unconfirmed):
                parts[gateway] = _Held()
        for lease in leases:
            held = self._held.setdefault(lease.of, {}).setdefault(gateway, _Held())
            held.cap, held.used = lease.cap_nano_usd, lease.used_nano_usd
            held.unconfirmed = {n: cap for n, cap in held.unconfirmed.items() if n > number}
            if not held.unconfirmed:
                held.at = held.cap

    def lease(self, limits: Iterable[Limits], spent: Spent, now_ms: int) -> dict[str, tuple[int, tuple[Lease, ...]]]:
        """New caps, by gateway: (number of the message, leases). Nothing for whom nothing changes."""
        self._forget(limits, spent, now_ms)
        silent = spent.open - self._live - {gateway for held in self._held.values() for gateway in held}
        if silent and now_ms < self._until_ms:
            return {}
        changed: dict[str, list[Lease]] = {}
        for of, full in self._budgets.items():
            known = spent.by_gateway.get(of)
            for gateway, cap in self._share(of, full, known) if known is not None else ():
                changed.setdefault(gateway, []).append(Lease(of, cap))
        if not changed:
            return {}
        self._number += 1
        for gateway, leases in changed.items():
            for lease in leases:
                part = self._held[lease.of][gateway]
                part.at = part.unconfirmed[self._number] = lease.cap_nano_usd
        return {gateway: (self._number, tuple(leases)) for gateway, leases in changed.items()}

    def committed(self, of: Spending, spent: Spent) -> int:
        """What may come to be spent of a budget at the most, as things stand: never more than the budget."""
        known = spent.by_gateway.get(of, {})
        held = self._held.get(of, {})
        gone = sum(amount for gateway, amount in known.items() if gateway not in held)
        return gone + sum(part.most(known.get(gateway, 0)) for gateway, part in held.items())

    def _forget(self, limits: Iterable[Limits], spent: Spent, now_ms: int) -> None:
        """Which budgets and windows there are now; gateways whose journals are closed leave."""
        self._budgets = spendings(limits, now_ms)
        self._held = {of: held for of, held in self._held.items() if of in self._budgets}
        for held in self._held.values():
            for gateway in spent.closed.intersection(held) - self._live:
                del held[gateway]

    def _share(self, of: Spending, full: int, known: Mapping[str, int]) -> list[tuple[str, int]]:
        """Equal parts of what is free, to those that are there; as far as there is room beside what is out already."""
        held = self._held.setdefault(of, {})
        for gateway in self._live:
            held.setdefault(gateway, _Held())
        most = {gateway: part.most(known.get(gateway, 0)) for gateway, part in held.items()}
        used = {gateway: max(part.used, known.get(gateway, 0)) for gateway, part in held.items()}
        gone = sum(amount for gateway, amount in known.items() if gateway not in held)
        room = full - gone - sum(most.values())
        free = full - gone - sum(used[g] if g in self._live else most[g] for g in held)
        share = max(0, free // max(1, len(self._live)))
        slack = share // SHARES if len(self._live) > 1 else 0
        changes = []
        for gateway in sorted(self._live):
            at = held[gateway].at
            cap = min(used[gateway] + share, most[gateway] + max(0, room))
            if at is None or abs(cap - at) > slack:
                room -= max(0, cap - most[gateway])
                changes.append((gateway, cap))
        return changes


def spendings(limits: Iterable[Limits], now_ms: int) -> dict[Spending, int]:
    """Every budget in its present window, and in the next one when that is near, with its nano-USD."""
    found = {}
    for rule in limits:
        for window, full, since_ms in rule.budgets:
            start_ms, end_ms = bounds(window, now_ms)
            found[Spending(rule.scope, rule.subject, window, since_ms, start_ms)] = full
            if end_ms - now_ms <= AHEAD_MS:
                found[Spending(rule.scope, rule.subject, window, since_ms, end_ms)] = full
    return found
