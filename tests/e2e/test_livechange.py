"""A live endpoint is changed under load: nothing fails, nothing is lost, nothing is billed twice."""

import pytest

from bench import livechange

KINDS = ("slots", "mode_dedicated", "model", "canary", "rollback_of_the_canary")


@pytest.mark.e2e
def test_changes_under_load_fail_no_request() -> None:
    figures = livechange.run(rate_s=8, seconds=2.5, kinds=lambda kind: kind in KINDS)
    assert set(figures["changes"]) == set(KINDS)
    assert {kind: change["errors"] for kind, change in figures["changes"].items() if change["failed"]} == {}
    assert figures["ledger"]["in_ledger"] == figures["ledger"]["answered"]
