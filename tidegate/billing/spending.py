"""What has been spent of each budget, as the ledger grows: read once from it, then carried along with what is posted.

Owned by the ingest's thread; `known` is a picture of the whole that others may read at any time.
"""

from collections.abc import Collection, Iterable, Mapping

from tidegate.domain.ledger import RatedUsage
from tidegate.domain.limits import Limits, Scope, Spending
from tidegate.domain.money_ports import Ledger
from tidegate.quota.treasury import Spent, spendings
from tidegate.quota.windows import bounds


class SpendingFold:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sums: dict[Spending, dict[str, int]] = {}
        self._closed: set[str] = set()
        self.known: Spent | None = None

    def watch(self, limits: Iterable[Limits], boots: Collection[str], now_ms: int) -> None:
        """Looks at budgets and windows not watched yet, and forgets the others. Raises StoreFault."""
        wanted = spendings(limits, now_ms)
        kept = {of: sums for of, sums in self._sums.items() if of in wanted}
        for of in wanted.keys() - kept.keys():
            kept[of] = dict(self._ledger.spent(of, bounds(of.window, of.start_ms)[1], boots))
        self._sums = kept

    def posted(self, page: Iterable[RatedUsage]) -> None:
        """A page whose records were all new."""
        if not self._sums:
            return
        by_subject: dict[tuple[Scope, str], list[Spending]] = {}
        for of in self._sums:
            by_subject.setdefault((of.scope, of.subject), []).append(of)
        for rated in page:
            cost = -sum(entry.amount for entry in rated.entries if entry.account.startswith("revenue/"))
            record = rated.record
            spent = [((Scope.KEY, record.key), cost), ((Scope.TENANT, record.tenant), cost)]
            spent += [((Scope.ENDPOINT, record.endpoint), cost), *_drawn(rated)]
            for subject, amount in spent:
                for of in by_subject.get(subject, ()) if amount else ():
                    if of.start_ms <= record.arrived_ms < bounds(of.window, of.start_ms)[1]:
                        sums = self._sums[of]
                        boot = record.gateway if record.arrived_ms >= of.since_ms else ""
                        sums[boot] = sums.get(boot, 0) + amount

    def forget(self) -> None:
        """What is carried along is no longer certain: everything is read again."""
        self._sums = {}

    def closed(self, boot: str) -> None:
        self._closed.add(boot)

    def settle(self, boots: Collection[str]) -> None:
        """The end of a turn that read every journal to its end: from now on this is what is known."""
        sums: Mapping[Spending, Mapping[str, int]] = {of: dict(sums) for of, sums in self._sums.items()}
        self.known = Spent(sums, frozenset(self._closed), frozenset(boots) - self._closed)


def _drawn(rated: RatedUsage) -> list[tuple[tuple[Scope, str], int]]:
    """The tokens a request has taken from contracts."""
    named = ((entry, entry.account.partition("/")) for entry in rated.entries)
    return [((Scope.CONTRACT, contract), e.quantity) for e, (kind, _, contract) in named if kind == "commitment"]
