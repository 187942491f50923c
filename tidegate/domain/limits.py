"""What a key, a tenant or an endpoint may do: rates, and money."""

from dataclasses import dataclass
from enum import StrEnum, auto


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
