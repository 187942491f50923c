"""Who had the accelerators, who paid, what it was worth: sums of one period, an endpoint at a time. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tidegate.domain.ledger import StateSum, TimeState, TimeSum, UsageKey, UsageSum
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import accelerator_time_nano_usd
from tidegate.money.hours import READY, platform_cost, worth_nano_usd

PriceOf = Callable[[str, int], PriceVersion | None]
"""(endpoint, instant) → the version whose accelerator-hour it would pay as dedicated; no endpoint: the platform's."""


@dataclass(slots=True)
class Account:
    """One endpoint's, or with an empty name nobody's. Durations are microseconds, amounts nano-USD."""

    states_us: dict[TimeState, int] = field(default_factory=dict)
    ready_us: int = 0
    lent_us: int = 0
    borrowed_us: int = 0
    tokens: int = 0
    drawn: int = 0
    time: int = 0
    worth: int = 0

    @property
    def brought_in(self) -> int:
        return self.tokens + self.drawn + self.time


@dataclass(frozen=True, slots=True)
class MachineCost:
    """What the operator pays for an hour of an accelerator, used or not, in nano-USD; `kinds` that cost something else
    are named.
    """

    hour_nano_usd: int
    kinds: Mapping[str, int]

    def of(self, time_us: Mapping[str, int]) -> int:
        """Kind → microseconds of wall time, in nano-USD."""
        hours = self.kinds
        return sum(
            accelerator_time_nano_usd(us // 1_000, hours.get(kind, self.hour_nano_usd)) for kind, us in time_us.items()
        )


@dataclass(frozen=True, slots=True)
class Economics:
    """`lent_us`: (lender, borrower) → microseconds. `costs`: what platform accounts cost at the platform's price."""

    accounts: Mapping[str, Account]
    lent_us: Mapping[tuple[str, str], int]
    costs: Mapping[str, int]


def economics(
    states: Sequence[StateSum],
    usage: Iterable[tuple[UsageKey, UsageSum]],
    times: Iterable[TimeSum],
    price_of: PriceOf,
) -> Economics:
    accounts: dict[str, Account] = {}
    lent_us: dict[tuple[str, str], int] = {}
    hours: dict[tuple[str, int], dict[str, int]] = {}
    costs: dict[tuple[str, int], dict[str, int]] = {}
    for cell in states:
        account = accounts.setdefault(cell.endpoint, Account())
        us = cell.held_us if cell.state is TimeState.ASLEEP else cell.share_us
        account.states_us[cell.state] = account.states_us.get(cell.state, 0) + us
        account.ready_us += cell.held_us if cell.state in READY else 0
        if cell.lender:
            account.borrowed_us += us
            accounts.setdefault(cell.lender, Account()).lent_us += us
            between = (cell.lender, cell.endpoint)
            lent_us[between] = lent_us.get(between, 0) + us
        _add(hours, (cell.endpoint, cell.hour_ms), cell.kind, cell.share_us)
        _add(costs, (platform_cost(cell), cell.hour_ms), cell.kind, cell.share_us)
    for (endpoint, hour_ms), kinds in hours.items():
        accounts[endpoint].worth += worth_nano_usd(kinds, price_of(endpoint, hour_ms))
    for key, used in usage:
        account = accounts.setdefault(key.endpoint, Account())
        account.tokens += used.total_nano_usd
        account.drawn += used.drawn_nano_usd
    for charged in times:
        accounts.setdefault(charged.endpoint, Account()).time += charged.nano_usd
    worth: dict[str, int] = {}
    for (name, hour_ms), kinds in costs.items():
        worth[name] = worth.get(name, 0) + worth_nano_usd(kinds, price_of("", hour_ms))
    return Economics(accounts, lent_us, worth)


def _add(sums: dict[tuple[str, int], dict[str, int]], place: tuple[str, int], kind: str, share_us: int) -> None:
    kinds = sums.setdefault(place, {})
    kinds[kind] = kinds.get(kind, 0) + share_us
