"""The part of the admin API that says where accelerator time went. Pure.

Durations are milliseconds of one accelerator; amounts are nano-USD, and the same as decimal text.
"""

from msgspec import Struct


class StateTime(Struct, frozen=True, kw_only=True):
    """What one accelerator did. The states add up to `wall_ms` (but for rounding down to a millisecond each)."""

    node: str
    accelerator: str
    kind: str
    wall_ms: int
    states_ms: dict[str, int]


class LentTime(Struct, frozen=True, kw_only=True):
    """Time `lender` was away from home and `borrower` used its room."""

    lender: str
    borrower: str
    duration_ms: int


class EndpointTime(Struct, frozen=True, kw_only=True):
    """One endpoint. `states_ms` are its shares of accelerators, `asleep` in host memory; `ready_ms` is how long its
    replicas stood ready, undivided: what dedicated pays for.

    Brought in: `tokens_usd` and `time_usd` were charged, `drawn_usd` was taken from commitments. `worth_usd` is what
    the accelerator time it had (borrowed time too) would have brought as dedicated at its own price; `margin_usd` is
    what was brought in less that. `dedicated_usd` is what holding its accelerators all the time would have cost its
    tenant.
    """

    endpoint: str
    tenant: str
    states_ms: dict[str, int]
    ready_ms: int
    lent_ms: int
    borrowed_ms: int
    tokens_usd: str
    time_usd: str
    drawn_usd: str
    dedicated_usd: str
    worth_usd: str
    margin_usd: str
    margin_nano_usd: int


class PlatformTime(Struct, frozen=True, kw_only=True):
    """The whole. `idle_usd` (nobody's time, and time that stood ready unpaid), `boot_usd` (activating, draining) and
    `unreported_usd` are what those cost the platform; `margin_usd` is all that was brought in less the worth of all
    wall time at the price of the plan `default`. Where it is configured what machines cost, `machines_usd` is that of
    all wall time, and `profit_usd` what was brought in less that.
    """

    wall_ms: int
    states_ms: dict[str, int]
    brought_in_usd: str
    worth_usd: str
    idle_usd: str
    boot_usd: str
    unreported_usd: str
    margin_usd: str
    margin_nano_usd: int
    machines_usd: str | None
    profit_usd: str | None
    profit_nano_usd: int | None


class TimeView(Struct, frozen=True, kw_only=True):
    """Accelerator time of the hours that begin in the period, as far as it was reported. `platform` and `accelerators`
    are an administrator's to see.
    """

    start_ms: int
    end_ms: int
    endpoints: list[EndpointTime]
    lent: list[LentTime]
    accelerators: list[StateTime]
    platform: PlatformTime | None
