"""Prepaid token commitments."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Contract:
    """`tokens` bought for `price_nano_usd`, spendable by requests that arrive in [starts_ms, expires_ms) on any of
    `models` and `modes` (empty: all).

    Of several, the lowest `priority` number is drawn down first, then the one that expires first, then the oldest. Of
    what is unspent at expiry, `rollover_percent` stays spendable for `rollover_ms` more; the rest lapses, by an entry
    that says so. What no commitment covers is charged at the plan `overage_plan`, or as without a contract when that
    is empty. In each whole UTC calendar month of it the tenant pays at least `minimum_month_nano_usd` for tokens.
    Alerts go to `alert_url`, signed with `alert_secret`. Where it `refuses`, admission reserves its tokens and refuses
    what it does not cover.
    """

    id: str
    tenant: str
    tokens: int
    price_nano_usd: int
    starts_ms: int
    expires_ms: int
    created_ms: int = 0
    priority: int = 100
    models: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    rollover_percent: int = 0
    rollover_ms: int = 0
    overage_plan: str = ""
    alert_url: str = ""
    alert_secret: str = ""
    minimum_month_nano_usd: int = 0
    refuses: bool = False

    def takes(self, model: str, mode: str) -> bool:
        """Whether requests of that model and mode, billed by the token, may be paid with it."""
        return model in (self.models or (model,)) and mode in (self.modes or (mode,))


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens taken from a contract by requests that arrived before its expiry (`used`), by later ones (`rolled`), and
    lapsed.
    """

    used: int = 0
    rolled: int = 0
    lapsed: int = 0

    @property
    def total(self) -> int:
        return self.used + self.rolled + self.lapsed


@dataclass(frozen=True, slots=True)
class Alert:
    """A contract has used up `percent` of its tokens; tried again at `next_ms` until it has ended in some way."""

    contract: str
    percent: int
    at_ms: int
    attempts: int = 0
    next_ms: int = 0
    ended_ms: int | None = None
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Rerate:
    """Requests that arrived in [start_ms, end_ms) were rated again at `at_ms`; taken back at `reversed_ms`."""

    id: str
    start_ms: int
    end_ms: int
    at_ms: int
    reversed_ms: int | None = None
