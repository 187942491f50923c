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


Terms = tuple[str, str, str, str, str]
"""(plan, endpoint, tenant, model, mode): in the order of precedence behind the plan."""


_DEFAULT: Terms = (DEFAULT_PLAN, "", "", "", "")


class PriceTable:
    """Finding a version costs a binary search for each shape of terms in the book, of which there are few."""

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

    def in_force(self, plan: str, at_ms: int, sold: Sold = PLAN_ONLY) -> PriceVersion | None:
        """The version that prices `sold`, of an endpoint with that plan, at `at_ms`."""
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
