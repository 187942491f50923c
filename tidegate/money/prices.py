"""The price book, arranged for finding the version in force. Pure.

Precedence (public): of all versions whose terms match, those that name the endpoint come first, then those that name
the tenant, then the model, then the mode (so endpoint + tenant beats endpoint, and tenant + model beats tenant); then
the endpoint's price plan, then the plan `default`. Terms that have ended, or have not begun, price nothing.
"""

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from tidegate.domain.price import PriceVersion

DEFAULT_PLAN = "default"


class Sold(NamedTuple):
    """What is to be priced, beside the plan of its endpoint: what terms may name."""

    tenant: str = ""
    endpoint: str = ""
    model: str = ""
    mode: str = ""


PLAN_ONLY = Sold()
FOUND_MAX = 20_000  # what was found is kept for so many combinations: most records are like one before
FOREVER_MS = 1 << 62

Terms = tuple[str, str, str, str, str]
"""(plan, endpoint, tenant, model, mode): in the order of precedence behind the plan."""

_DEFAULT: Terms = (DEFAULT_PLAN, "", "", "", "")


class PriceTable:
    """Finding a version costs a binary search for each shape of terms in the book, of which there are few; finding it
    again for the same terms and stretch of time costs a look into a table.
    """

    def __init__(self, versions: Iterable[PriceVersion]) -> None:
        self._chains: dict[Terms, tuple[list[int], list[PriceVersion]]] = {}
        self._by_id: dict[int, PriceVersion] = {}
        for version in sorted(versions, key=lambda v: (v.effective_ms, v.id)):
            starts, ordered = self._chains.setdefault(terms_of(version), ([], []))
            starts.append(version.effective_ms)
            ordered.append(version)
            self._by_id[version.id] = version
        shapes = {tuple(map(bool, terms[1:])) for terms in self._chains if not terms[0]}
        self._shapes = sorted(shapes, reverse=True)
        self._found: dict[tuple[str, Sold], tuple[int, int, PriceVersion | None]] = {}

    def in_force(self, plan: str, at_ms: int, sold: Sold = PLAN_ONLY) -> PriceVersion | None:
        """The version that prices `sold`, of an endpoint with that plan, at `at_ms`."""
        found = self._found.get((plan, sold))
        if found is None or not found[0] <= at_ms < found[1]:
            found = self.stretch(plan, at_ms, sold)
            if len(self._found) >= FOUND_MAX:
                self._found.clear()
            self._found[plan, sold] = found
        return found[2]

    def stretch(self, plan: str, at_ms: int, sold: Sold) -> tuple[int, int, PriceVersion | None]:
        """What prices `sold` in [from, until), a stretch around `at_ms` in which nothing in the book changes."""
        instants = [-FOREVER_MS, *self.changes(plan, -FOREVER_MS, FOREVER_MS, sold), FOREVER_MS]
        place = bisect_right(instants, at_ms)
        return instants[place - 1], instants[place], self._first(plan, at_ms, sold)

    def _first(self, plan: str, at_ms: int, sold: Sold) -> PriceVersion | None:
        for terms in self._candidates(plan, sold):
            if (version := self.newest(terms, at_ms)) is not None:
                return version
        return None

    def changes(self, plan: str, start_ms: int, end_ms: int, sold: Sold = PLAN_ONLY) -> list[int]:
        """Instants in (start_ms, end_ms) at which the price in force may change, ascending."""
        instants = {at for terms in self._candidates(plan, sold) for at in self._chains.get(terms, ([], []))[0]}
        return sorted(at for at in instants if start_ms < at < end_ms)

    def version(self, version_id: int) -> PriceVersion | None:
        return self._by_id.get(version_id)

    def _candidates(self, plan: str, sold: Sold) -> list[Terms]:
        plans: list[Terms] = [(plan, "", "", "", ""), _DEFAULT]
        if not self._shapes:
            return plans
        tenant, endpoint, model, mode = sold
        return [*(("", endpoint * e, tenant * t, model * m, mode * o) for e, t, m, o in self._shapes), *plans]

    def newest(self, terms: Terms, at_ms: int) -> PriceVersion | None:
        """The version with exactly these terms at that instant, if they have not ended."""
        starts, ordered = self._chains.get(terms, ([], []))
        found = bisect_right(starts, at_ms)
        if not found or ordered[found - 1].ends:
            return None
        return ordered[found - 1]


def terms_of(version: PriceVersion) -> Terms:
    """What a version prices: two with the same terms may not begin at the same instant."""
    return (version.plan, version.endpoint, version.tenant, version.model, version.mode)
