"""What a key, a tenant or an endpoint may do: rates, and money."""

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import NamedTuple


class Scope(StrEnum):
    """Whose limit it is. A request is subject to those of its key, of its tenant and of the endpoint it calls, and of
    the contracts that pay for it: of these, amounts are tokens.
    """

    KEY = auto()
    TENANT = auto()
    ENDPOINT = auto()
    CONTRACT = auto()


class Window(StrEnum):
    """What a budget is spent in: a UTC day, a UTC calendar month, or all time."""

    DAY = auto()
    MONTH = auto()
    TOTAL = auto()


class Budget(NamedTuple):
    """Nano-USD a window. Requests that arrive from `since_ms` on reserve against it; earlier ones count as spent."""

    window: Window
    nano_usd: int
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit. `subject` is a key's id, a tenant's or an endpoint's name; `budgets` are of what tokens cost."""

    scope: Scope
    subject: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    budgets: tuple[Budget, ...] = ()


class Spending(NamedTuple):
    """One budget in the window that began at `start_ms`."""

    scope: Scope
    subject: str
    window: Window
    since_ms: int
    start_ms: int


class Lease(NamedTuple):
    """How much of a budget one gateway may spend itself: `cap_nano_usd` in all, of which it has spent or reserved
    `used_nano_usd`.
    """

    of: Spending
    cap_nano_usd: int
    used_nano_usd: int = 0
