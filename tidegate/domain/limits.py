"""What a key, a tenant or an endpoint may do: rates, and money."""

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import NamedTuple


class Scope(StrEnum):
    """Whose limit it is. A request is subject to those of its key, of its tenant and of the endpoint it calls."""

    KEY = auto()
    TENANT = auto()
    ENDPOINT = auto()


class Window(StrEnum):
    """What a budget is spent in: a UTC day, a UTC calendar month, or all time."""

    DAY = auto()
    MONTH = auto()
    TOTAL = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit. `subject` is a key's id, a tenant's or an endpoint's name; budgets are nano-USD charged for
    tokens, by their window.
    """

    scope: Scope
    subject: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    budgets: tuple[tuple[Window, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """How much of a budget one gateway may spend itself: `cap_nano_usd` in all, in the window that began at `start_ms`,
    of which it has spent or reserved `used_nano_usd`.
    """

    scope: Scope
    subject: str
    window: Window
    start_ms: int
    cap_nano_usd: int
    used_nano_usd: int = 0

    @property
    def of(self) -> "Spending":
        return Spending(self.scope, self.subject, self.window, self.start_ms)


class Spending(NamedTuple):
    """One budget in one window."""

    scope: Scope
    subject: str
    window: Window
    start_ms: int
