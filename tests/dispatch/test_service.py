"""Whether a request was served as promised."""

import pytest

from tests.money import usage
from tidegate.dispatch.service import UNAVAILABLE, within
from tidegate.domain.endpoint import Slo
from tidegate.domain.errors import REFUSALS

SLO = Slo(ttft_ms=1_000, tpot_ms=50)


@pytest.mark.parametrize(
    ("first_ms", "ended_ms", "tokens", "streamed", "good"),
    [
        (1_000, 1_450, 10, True, True),
        (1_001, 1_100, 10, True, False),
        (900, 1_351, 10, True, False),
        (900, 900, 1, True, True),
        (1_450, 1_450, 10, False, True),
        (1_451, 1_451, 10, False, False),
        (1_000, 1_000, 0, False, True),
    ],
)
def test_within(first_ms: int, ended_ms: int, tokens: int, streamed: bool, good: bool) -> None:
    record = usage(
        "a", arrived_ms=5_000, first_token_ms=5_000 + first_ms, ended_ms=5_000 + ended_ms, output_tokens=tokens
    )
    assert within(SLO, record, streamed=streamed) is good


def test_what_counts_as_unavailable_are_refusals() -> None:
    assert REFUSALS.keys() >= UNAVAILABLE
