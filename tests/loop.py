"""Runs an async test on an event loop of its own, and waits in it for what happens beside it."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
POLL_S = 0.005


def on_loop(test: Callable[P, Coroutine[object, object, None]]) -> Callable[P, None]:
    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(check: Callable[[], T], what: str = "what was waited for", seconds: float = 20.0) -> T:
    """Polls until `check` gives something true, and gives that; fails naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return found
