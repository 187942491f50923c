"""What limits cost a gateway a request, beside reading the request's own head.

Run: ``python -m bench.limits``. CPU time of one process, best of several rounds; only the ratios mean anything
elsewhere.

* head: what every request costs anyway: the digest of its key and the parsing of its body's head (the baseline).
* none: admission and settlement while nobody has limits.
* others: limits exist, but none of them for this request.
* rates: requests, tokens and concurrency of key, tenant and endpoint.
* budgets: the same with a daily and a monthly budget each: prices, bounds, reservation, settlement.
"""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from bench import main
from tests.money import NOVEMBER_MS, price, usage
from tidegate.domain.endpoint import Mode, ModelKind
from tidegate.domain.limits import Budget, Lease, Limits, Scope, Spending, Window
from tidegate.gateway.intake import Call
from tidegate.gateway.limiting import Limiter
from tidegate.quota.windows import bounds
from tidegate.wire.internal import BudgetLeases, EndpointEntry
from tidegate.wire.openai import parse_head

REQUESTS = 20_000
ROUNDS = 5
ENTRY = EndpointEntry("acme/chat", "acme", "m@1", ModelKind.GENERATIVE, Mode.SERVERLESS, 1, 4_096, 0)
BODY = json.dumps(
    {"model": "acme/chat", "max_tokens": 64, "messages": [{"role": "user", "content": "What is the tide? " * 8}]}
).encode()
SUBJECTS = ((Scope.KEY, "key-1"), (Scope.TENANT, "acme"), (Scope.ENDPOINT, "acme/chat"))


def run() -> dict[str, Any]:
    head_us = _best(_head)
    figures: dict[str, Any] = {"requests": REQUESTS, "head_us": round(head_us, 3)}
    for name, limiter in (
        ("none", _limiter(())),
        ("others", _limiter((Limits(Scope.TENANT, "birch", requests_per_minute=1),))),
        ("rates", _limiter(tuple(_rates(scope, subject) for scope, subject in SUBJECTS))),
        ("budgets", _limiter(tuple(_rates(scope, subject, budgets=True) for scope, subject in SUBJECTS))),
    ):
        cost_us = _best(lambda limiter=limiter: _ask(limiter))  # type: ignore[misc]
        figures[name] = {"us": round(cost_us, 3), "of_head": round(cost_us / head_us, 2)}
    return figures


def _rates(scope: Scope, subject: str, *, budgets: bool = False) -> Limits:
    kept = (Budget(Window.DAY, 10**15), Budget(Window.MONTH, 10**15)) if budgets else ()
    return Limits(scope, subject, 10**9, 10**12, 10**6, kept)


def _limiter(rules: tuple[Limits, ...]) -> Limiter:
    limiter = Limiter("bench")
    limiter.prices([price()])
    limiter.rules(rules, {ENTRY.endpoint: ENTRY}, NOVEMBER_MS)
    leases = tuple(
        Lease(Spending(rule.scope, rule.subject, window, since_ms, bounds(window, NOVEMBER_MS)[0]), full)
        for rule in rules
        for window, full, since_ms in rule.budgets
    )
    limiter.leased(BudgetLeases(1, 10**9, leases), NOVEMBER_MS)
    return limiter


def _head() -> None:
    for _ in range(REQUESTS):
        hashlib.sha256(b"tg-0123456789abcdefghijklmnopqrstuvwxyz").hexdigest()
        parse_head(BODY)


def _ask(limiter: Limiter) -> None:
    """As the gateway does: the flag, then what the request takes, then what it really was."""
    call = Call("r", "chat/completions", "key-1", "acme", ENTRY, BODY, False, False, NOVEMBER_MS, 0)
    head, record = parse_head(BODY), usage("r", input_tokens=40, output_tokens=64)
    for _ in range(REQUESTS):
        if limiter.gate.active:
            hold = limiter.admit(call, head)
            if hold is not None:
                limiter.settle(hold, record)


def _best(work: Callable[[], None]) -> float:
    """Microseconds a request, of the fastest round."""
    took = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        work()
        took.append(time.process_time() - begun)
    return min(took) / REQUESTS * 1e6


if __name__ == "__main__":
    main(run)
