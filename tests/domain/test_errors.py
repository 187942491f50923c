"""Refusals carry a status a client can act on."""

import pytest

from tidegate.domain.errors import REFUSALS, LimitHit, Refusal


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_each_code_has_a_client_visible_status(code: str) -> None:
    refusal = Refusal(code, "because")
    assert 400 <= refusal.status < 600
    assert refusal.type.endswith("error") or refusal.type == "insufficient_quota"
    assert str(refusal) == "because"


def test_a_code_nobody_documented_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Refusal("teapot", "no")


def test_a_limit_says_which_and_how_full() -> None:
    refusal = Refusal("queue_full", "busy", limit=LimitHit("queue", 512, 512), retry_after_ms=1500)
    assert refusal.limit == LimitHit(kind="queue", current=512, full=512)
    assert refusal.retry_after_ms == 1500
