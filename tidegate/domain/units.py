"""Quantities and their exact conversions.

Conventions used everywhere: instants are integer milliseconds since the Unix epoch (`*_ms` on an event is an instant or
a duration, its docstring says which), memory is integer bytes, tokens are integers, money is integer nano-USD
(1 USD = 1,000,000,000 nano-USD). There is no float near money.
"""

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

NANO_USD_PER_USD = 1_000_000_000
TOKENS_PER_MILLION = 1_000_000
MS_PER_HOUR = 3_600_000
MS_PER_DAY = 24 * MS_PER_HOUR
GIB = 1 << 30
MIB = 1 << 20
USD_MAX = 1_000_000_000


def nano_usd(usd: str) -> int:
    """Exact nano-USD of a decimal USD amount given as text, e.g. ``"3.99"`` → ``3990000000``.

    Raises ValueError when the text is not a finite, non-negative decimal or is finer than one nano-USD.
    """
    return _exact(usd, Decimal(NANO_USD_PER_USD), "USD")


def nano_usd_per_token(usd_per_million_tokens: str) -> int:
    """Exact nano-USD per token of a price in USD per million tokens: ``"0.20"`` → ``200``.

    The finest price is 0.001 USD per million tokens. Raises ValueError below that or for a malformed amount.
    """
    return _exact(usd_per_million_tokens, Decimal(NANO_USD_PER_USD // TOKENS_PER_MILLION), "USD per million tokens")


def accelerator_time_nano_usd(duration_ms: int, nano_usd_per_hour: int) -> int:
    """Price of one accelerator held for `duration_ms`, rounded half to even to whole nano-USD."""
    exact = Decimal(duration_ms) * nano_usd_per_hour / MS_PER_HOUR
    return int(exact.to_integral_value(rounding=ROUND_HALF_EVEN))


def usd(nano: int) -> str:
    """Human form of an amount: ``1234567890`` → ``"1.234567890"``; never rounded, so it can be added up again."""
    sign = "-" if nano < 0 else ""
    whole, fraction = divmod(abs(nano), NANO_USD_PER_USD)
    return f"{sign}{whole}.{fraction:09d}"


def _exact(text: str, factor: Decimal, unit: str) -> int:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a decimal amount of {unit}") from None
    if not amount.is_finite() or amount < 0:
        raise ValueError(f"{text!r} must be a finite, non-negative amount of {unit}")
    if amount >= USD_MAX:  # before scaling: "1e999999999" would otherwise become an integer of a billion digits
        raise ValueError(f"{text!r} must be below {USD_MAX} {unit}")
    scaled = amount * factor
    if scaled != scaled.to_integral_value():
        raise ValueError(f"{text!r} is finer than the smallest amount of {unit} that can be billed ({1 / factor})")
    return int(scaled)
