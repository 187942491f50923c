"""What a WebSocket session's place is worth: time to the first token of its responses, beside plain requests.

Run: ``python -m bench.sessions [--rounds N] [--load N]``. The platform is real and asked over HTTP by the OpenAI SDK.
`quiet`: nobody else asks. `busy`: `--load` streams are under way at any time on an endpoint of four slots, so that a
plain request waits its turn; a session has its slot already. `evicted`: the endpoint sleeps, for another one had its
accelerator; a plain request waits for its wake, an open session would have prevented it.
"""

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from bench import main
from bench.batch import TIGHT, _apply, _config
from tests.e2e.platform import Platform, running

HELLO: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the water"}]}
TOKENS = 24
SLOTS = 4


def _plain_ms(sdk: openai.OpenAI) -> float:
    started = time.perf_counter()
    messages: Any = [{"role": "user", "content": "the water"}]
    stream = sdk.chat.completions.create(model="live", messages=messages, max_tokens=TOKENS, stream=True)
    first = 0.0
    for event in stream:
        if not first and event.choices and event.choices[0].delta.content:
            first = time.perf_counter()
    return ((first or time.perf_counter()) - started) * 1000


def _session_ms(session: Any) -> float:
    started = time.perf_counter()
    session.response.create(response={"input": [HELLO], "max_output_tokens": TOKENS, "conversation": "none"})
    first = 0.0
    for event in session:
        assert event.type != "error", event
        if event.type == "response.output_text.delta" and not first:
            first = time.perf_counter()
        if event.type == "response.done":
            assert event.response.status in ("completed", "incomplete"), event
            break
    return ((first or time.perf_counter()) - started) * 1000


@contextlib.contextmanager
def _loaded(sdk: openai.OpenAI, streams: int) -> Iterator[None]:
    """`streams` requests under way at any time."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            _plain_ms(sdk)

    threads = [threading.Thread(target=ask) for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _ask_other(sdk: openai.OpenAI) -> None:
    sdk.completions.create(model="other", prompt="the", max_tokens=2)


def run(rounds: int = 30, load: int = 12) -> dict[str, Any]:
    """Medians in ms, and their ratio, of `rounds` requests in each of three situations."""
    with (
        tempfile.TemporaryDirectory(prefix="tidegate-sessions-") as folder,
        running(Path(folder), config=_config(1, TIGHT)) as platform,
    ):
        return _measure(platform, rounds, load)


def _measure(platform: Platform, rounds: int, load: int) -> dict[str, Any]:
    key = _apply(platform, "live", "other", slots=SLOTS)
    sdk = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key=key, max_retries=0)
    evicted = []
    for _ in range(max(3, rounds // 5)):
        _ask_other(sdk)
        time.sleep(0.5)  # more than the residency it must have had
        evicted.append(_plain_ms(sdk))
    with sdk.realtime.connect(model="live") as session:
        assert session.recv().type == "session.created"
        _session_ms(session)
        quiet = [_plain_ms(sdk) for _ in range(rounds)], [_session_ms(session) for _ in range(rounds)]
        with _loaded(sdk, load):
            busy = [_plain_ms(sdk) for _ in range(rounds)], [_session_ms(session) for _ in range(rounds)]
    figures = {"quiet": quiet, "busy": busy, "evicted": (evicted, quiet[1])}
    return {"rounds": rounds, "load": load, "slots": SLOTS} | {
        name: {
            "plain_p50_ms": round(statistics.median(plain), 1),
            "session_p50_ms": round(statistics.median(pinned), 1),
            "session_over_plain": round(statistics.median(pinned) / statistics.median(plain), 2),
        }
        for name, (plain, pinned) in figures.items()
    }


if __name__ == "__main__":
    main(run)
