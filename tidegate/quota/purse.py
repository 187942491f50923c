"""What one gateway may spend of one budget: never more than it was leased, whatever else happens. Pure."""

from dataclasses import dataclass

from tidegate.domain.errors import LimitHit, Refusal
from tidegate.domain.limits import Budget, Lease, Scope, Spending, Window
from tidegate.domain.units import usd
from tidegate.quota.windows import NEVER_MS, bounds

WINDOWS_KEPT_MAX = 3  # the one before (requests that began in it still run), this one, and the next
ASK_AGAIN_MS = 1_000

_SPAN = {Window.DAY: "today", Window.MONTH: "this month", Window.TOTAL: "in all"}


@dataclass(slots=True)
class Allowance:
    """One window: `used` is settled and reserved together, at most `cap` while every request costs what it may."""

    start_ms: int
    cap: int = 0
    used: int = 0


class Purse:
    """`until_ms` is how long the word of control is good."""

    __slots__ = ("_allowances", "_ends_ms", "budget", "scope", "subject", "until_ms")

    def __init__(self, scope: Scope, subject: str, budget: Budget) -> None:
        self.scope = scope
        self.subject = subject
        self.budget = budget
        self.until_ms = 0
        self._allowances: dict[int, Allowance] = {}
        self._ends_ms: tuple[int, int] = (0, 0)

    def check(self, cost_nano_usd: int, now_ms: int) -> Allowance:
        """The allowance that pays `cost_nano_usd` (tokens, of a contract); nothing is taken yet.

        Refusal insufficient_quota where it would go over, budget_unavailable where control must be asked first.
        """
        start_ms, end_ms = self._bounds(now_ms)
        allowance = self._allowances.get(start_ms)
        if allowance is None or now_ms >= self.until_ms:
            text = f"{self._name}: what is left of it is not known here yet"
            raise Refusal("budget_unavailable", text, retry_after_ms=ASK_AGAIN_MS)
        left = allowance.cap - allowance.used
        if cost_nano_usd > max(0, left):
            raise self._refusal(cost_nano_usd, max(0, left), end_ms - now_ms)
        return allowance

    def leased(self, lease: Lease) -> None:
        """A cap below what is used already takes effect as that: what was promised to a request is kept."""
        start_ms = lease.of.start_ms
        allowance = self._allowances.get(start_ms)
        if allowance is None:
            allowance = self._allowances[start_ms] = Allowance(start_ms)
            while len(self._allowances) > WINDOWS_KEPT_MAX:
                del self._allowances[min(self._allowances)]
        allowance.cap = max(lease.cap_nano_usd, allowance.used)

    def leases(self) -> list[Lease]:
        window, _, since_ms = self.budget
        return [
            Lease(Spending(self.scope, self.subject, window, since_ms, a.start_ms), a.cap, a.used)
            for a in self._allowances.values()
        ]

    @property
    def _name(self) -> str:
        return f"{self.scope.value} {self.subject}"

    def _bounds(self, now_ms: int) -> tuple[int, int]:
        if not self._ends_ms[0] <= now_ms < self._ends_ms[1]:
            self._ends_ms = bounds(self.budget.window, now_ms)
        return self._ends_ms

    def _refusal(self, cost_nano_usd: int, left: int, reset_ms: int) -> Refusal:
        window, full, _ = self.budget
        if self.scope is Scope.CONTRACT:
            text = f"{self._name}: of {full} prepaid tokens {left} are left, and this request may use {cost_nano_usd}"
        else:
            text = (
                f"{self._name}: the budget of {usd(full)} USD {_SPAN[window]} leaves {usd(left)} USD, "
                f"and this request may cost {usd(cost_nano_usd)} USD"
            )
        hit = LimitHit("contract" if self.scope is Scope.CONTRACT else "budget", full - left, full)
        never = window is Window.TOTAL or reset_ms > NEVER_MS // 2
        return Refusal(
            "insufficient_quota",
            text,
            retry_after_ms=None if never else reset_ms,
            limit=hit,
            headers={"x-should-retry": "false"},
        )
