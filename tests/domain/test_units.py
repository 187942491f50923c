"""Money and quantities are exact."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.domain.units import MS_PER_HOUR, accelerator_time_nano_usd, nano_usd, nano_usd_per_token, usd


@pytest.mark.parametrize(
    ("text", "nano"),
    [("0", 0), ("3.99", 3_990_000_000), ("0.000000001", 1), ("5.49", 5_490_000_000), ("1e2", 100_000_000_000)],
)
def test_amounts(text: str, nano: int) -> None:
    assert nano_usd(text) == nano


@pytest.mark.parametrize(("text", "nano"), [("0.20", 200), ("0.001", 1), ("15.25", 15_250), ("0", 0)])
def test_token_prices(text: str, nano: int) -> None:
    assert nano_usd_per_token(text) == nano


@pytest.mark.parametrize("text", ["", "x", "-1", "NaN", "Infinity", "0.0000000001", "1,5", "1e9", "1e999999999"])
def test_bad_amounts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="USD"):
        nano_usd(text)


def test_a_price_finer_than_a_nano_usd_per_token_is_refused() -> None:
    with pytest.raises(ValueError, match="finer"):
        nano_usd_per_token("0.0005")


@given(st.integers(min_value=-(10**20), max_value=10**20))
def test_shown_amounts_are_never_rounded(amount: int) -> None:
    assert Decimal(usd(amount)) * 10**9 == amount


@given(st.integers(0, 10**10), st.integers(0, 10**12))
def test_accelerator_time_is_within_half_a_nano_usd(duration_ms: int, per_hour: int) -> None:
    exact = Decimal(duration_ms) * per_hour / MS_PER_HOUR
    assert abs(accelerator_time_nano_usd(duration_ms, per_hour) - exact) <= Decimal("0.5")
