"""Rates and concurrency: what passes, what is told, what is given back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.money import NOVEMBER_MS
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Limits, Scope, Window
from tidegate.quota.buckets import MS_PER_MINUTE, Bucket
from tidegate.quota.gate import Demand, Gate, Hold, duration
from tidegate.quota.windows import bounds

T0 = NOVEMBER_MS
SMALL = Demand(40, 10, 0)  # 20 tokens


def gate(*rules: Limits, gateways: int = 1) -> Gate:
    made = Gate()
    made.set(rules, gateways, T0)
    return made


def ask(at: Gate, demand: Demand = SMALL, now_ms: int = T0, key: str = "k") -> Hold:
    return at.admit(at.chain(key, "acme", "acme/chat"), demand, now_ms)


def refused(at: Gate, demand: Demand = SMALL, now_ms: int = T0) -> Refusal:
    with pytest.raises(Refusal) as raised:
        ask(at, demand, now_ms)
    return raised.value


def test_without_limits_nothing_is_looked_at() -> None:
    assert not gate().active
    open_gate = gate(Limits(Scope.TENANT, "birch", requests_per_minute=1))
    assert open_gate.active
    assert open_gate.chain("k", "acme", "acme/chat") == []


def test_requests_a_minute() -> None:
    at = gate(Limits(Scope.KEY, "k", requests_per_minute=3))
    left = [dict(ask(at).headers)[b"x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == [b"2", b"1", b"0"]
    no = refused(at)
    assert (no.code, no.limit and (no.limit.kind, no.limit.current, no.limit.full)) == (
        "rate_limit_exceeded", ("rpm", 3, 3),
    )  # fmt: skip
    assert (no.retry_after_ms, no.headers["x-ratelimit-reset-requests"]) == (20_000, "1m0s")
    assert refused(at, now_ms=T0 + 19_999).retry_after_ms == 1
    ask(at, now_ms=T0 + 20_000)


def test_tokens_are_settled_with_what_was_used() -> None:
    at = gate(Limits(Scope.TENANT, "acme", tokens_per_minute=50))
    first = ask(at)
    ask(at)
    no = refused(at)
    assert (no.limit.kind, no.limit.current, no.retry_after_ms) == ("tpm", 40, 12_000)
    at.settle(first, 5, 0, T0)
    assert dict(ask(at).headers)[b"x-ratelimit-remaining-tokens"] == b"5"
    at.settle(first, 120, 0, T0)
    assert refused(at).limit.current > 50, "more than was asked for is owed"


def test_a_request_larger_than_the_limit_is_told_so_and_not_to_come_back() -> None:
    no = refused(gate(Limits(Scope.ENDPOINT, "acme/chat", tokens_per_minute=50)), Demand(40, 41, 0))
    assert (no.param, no.retry_after_ms, no.headers["x-should-retry"]) == ("max_tokens", None, "false")


def test_concurrency_ends_with_the_request() -> None:
    at = gate(Limits(Scope.ENDPOINT, "acme/chat", concurrency=2))
    first, _ = ask(at), ask(at)
    no = refused(at)
    assert (no.limit.kind, no.limit.current, no.limit.full, no.retry_after_ms) == ("concurrency", 2, 2, 1_000)
    at.settle(first, 0, 0, T0)
    ask(at)


def test_a_refused_request_takes_nothing_anywhere() -> None:
    at = gate(
        Limits(Scope.KEY, "k", requests_per_minute=9, tokens_per_minute=900, concurrency=9),
        Limits(Scope.ENDPOINT, "acme/chat", concurrency=1),
    )
    ask(at)
    for _ in range(20):
        assert refused(at).limit.kind == "concurrency"
    (meter, _) = at.chain("k", "acme", "acme/chat")
    assert (meter.running, meter.requests.left(T0), meter.tokens.left(T0)) == (1, 8, 880)


def test_batch_lines_are_not_subject_to_rates() -> None:
    at = gate(Limits(Scope.KEY, "k", requests_per_minute=1, tokens_per_minute=1, concurrency=1))
    (meter,) = meters = at.chain("k", "acme", "acme/chat")
    for _ in range(3):
        hold = at.admit(meters, SMALL, T0, rates=False)
        assert hold.headers == []
    at.settle(hold, 20, 0, T0)
    assert (meter.running, meter.requests.left(T0), meter.tokens.left(T0)) == (0, 1, 1)


def test_the_headers_are_of_whatever_leaves_least() -> None:
    at = gate(Limits(Scope.KEY, "k", requests_per_minute=2), Limits(Scope.TENANT, "acme", requests_per_minute=100))
    assert dict(ask(at).headers) == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"30s",
    }


def test_new_rules_keep_what_was_used_and_share_it_among_gateways() -> None:
    at = gate(Limits(Scope.KEY, "k", requests_per_minute=10, concurrency=5))
    hold = ask(at)
    at.set([Limits(Scope.KEY, "k", requests_per_minute=10, concurrency=5)], 2, T0)
    (meter,) = at.chain("k", "acme", "acme/chat")
    assert (meter.requests.full, meter.requests.left(T0), meter.running, meter.running_max) == (5, 4, 1, 2)
    at.set([], 2, T0)
    assert at.chain("k", "acme", "acme/chat") == []
    at.settle(hold, 1, 1, T0)


@given(st.integers(1, 1_000), st.integers(1, 12))
def test_parts_of_a_limit_never_exceed_it(limit: int, gateways: int) -> None:
    parts = []
    for _ in range(gateways):
        at = gate(Limits(Scope.KEY, "k", requests_per_minute=limit), gateways=gateways)
        parts.append(at.chain("k", "acme", "acme/chat")[0].requests.full)
    assert sum(parts) <= max(limit, gateways)


@given(st.integers(1, 500), st.lists(st.tuples(st.integers(-50, 5_000), st.integers(1, 9)), max_size=200))
def test_within_any_minute_at_most_twice_the_limit_passes(full: int, asked: list[tuple[int, int]]) -> None:
    bucket, now_ms, taken = Bucket(full, 0), 0, []
    for step_ms, units in asked:
        now_ms += step_ms
        if bucket.left(now_ms) >= units:
            assert bucket.wait_ms(units) == 0
            bucket.take(units)
            taken.append((now_ms, units))
        else:
            wait_ms = bucket.wait_ms(units)
            assert wait_ms > 0 or units > full
    start = max(0, *(at for at, _ in taken), 0)
    for begin_ms, _ in taken:
        assert sum(units for at, units in taken if begin_ms <= at < begin_ms + MS_PER_MINUTE) <= 2 * full or start < 0


@given(st.integers(0, 4_000_000_000_000), st.sampled_from(Window))
def test_windows_follow_each_other_without_a_gap(at_ms: int, window: Window) -> None:
    start_ms, end_ms = bounds(window, at_ms)
    assert start_ms <= at_ms < end_ms
    if window is not Window.TOTAL:
        assert bounds(window, end_ms)[0] == end_ms
        assert bounds(window, end_ms - 1) == bounds(window, start_ms) == (start_ms, end_ms)


@pytest.mark.parametrize(("ms", "text"), [(0, "0ms"), (120, "120ms"), (999, "999ms"), (1_001, "2s"), (360_000, "6m0s")])
def test_durations_are_written_as_openai_does(ms: int, text: str) -> None:
    assert duration(ms) == text
