"""What is billed and what is not."""

from dataclasses import replace

import pytest

from tidegate.domain.usage import CountSource, Outcome, UsageRecord

RECORD = UsageRecord(
    id="r", gateway="g", tenant="t", key="k", endpoint="t/e", model="m", mode="dedicated_serverless", region="local",
    replica="x", api="chat", outcome=Outcome.COMPLETED, input_tokens=3, cached_tokens=0, output_tokens=2,
    count_source=CountSource.ENGINE_USAGE, arrived_ms=0, first_token_ms=1, ended_ms=2, queue_ms=0, activation_ms=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "output_tokens", "billed"),
    [
        (Outcome.COMPLETED, 2, True),
        (Outcome.COMPLETED, 0, True),
        (Outcome.CLIENT_ABORTED, 1, True),
        (Outcome.CLIENT_ABORTED, 0, False),
        (Outcome.ENGINE_LOST, 1, True),
        (Outcome.ENGINE_LOST, 0, False),
        (Outcome.GATEWAY_LOST, 1, True),
        (Outcome.GATEWAY_LOST, 0, False),
        (Outcome.OPEN, 5, False),
        (Outcome.REFUSED, 0, False),
    ],
)
def test_billable(outcome: Outcome, output_tokens: int, billed: bool) -> None:
    assert replace(RECORD, outcome=outcome, output_tokens=output_tokens).billable is billed


def test_every_outcome_has_a_rule() -> None:
    assert {type(replace(RECORD, outcome=o).billable) for o in Outcome} == {bool}
