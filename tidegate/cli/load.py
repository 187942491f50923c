"""Real load on an endpoint: as many streams at once as asked for, for as long as asked for, timed from outside."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

REQUEST_S_MAX = 300.0
WORDS = ["how", "many", "words", "make", "a", "long", "sound", "and", "what", "is", "the", "water", "for"]


@dataclass(slots=True)
class Seen:
    """What the streams of one run saw. Times in ms; `tokens` were generated between `began` and `ended` (seconds)."""

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0
    began: float = 0.0
    ended: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.ended - self.began) if self.ended > self.began else 0.0

    def percentile(self, values: list[float], percentile: int) -> float:
        """The nearest rank; the largest of few, 0 of none."""
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, len(ordered) * percentile // 100)] if ordered else 0.0


def offer(
    url: str, key: str, endpoint: str, *, streams: int, seconds: float, prompt_tokens: int, output_tokens: int
) -> Seen:
    """Keeps `streams` requests running for `seconds`; a stream whose answer ends begins another."""
    import httpx

    seen, lock = Seen(began=time.monotonic()), threading.Lock()
    until = seen.began + seconds
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_S_MAX) as http:

        def stream(number: int) -> None:
            turn = 0
            while time.monotonic() < until:
                turn += 1
                prompt = " ".join(WORDS[(number + turn + i) % len(WORDS)] for i in range(prompt_tokens))
                found = _one(http, endpoint, prompt, output_tokens)
                with lock:
                    _add(seen, found)

        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(stream, range(streams)))
    seen.ended = time.monotonic()
    return seen


def _one(http: Any, endpoint: str, prompt: str, output_tokens: int) -> tuple[float, float, int] | None:
    """(TTFT ms, time per output token ms, tokens) of one stream; None where it failed."""
    import httpx

    body = {"model": endpoint, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    began, first, last, tokens = time.monotonic(), 0.0, 0.0, 0
    try:
        with http.stream("POST", "/v1/completions", json=asked) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("choices"):
                    last = time.monotonic()
                    first = first or last
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.TransportError:
        return None
    if response.status_code != 200 or not tokens:
        return None
    return (first - began) * 1_000, (last - first) * 1_000 / max(1, tokens - 1), tokens


def _add(seen: Seen, found: tuple[float, float, int] | None) -> None:
    if found is None:
        seen.failed += 1
        return
    seen.ttft_ms.append(found[0])
    seen.tpot_ms.append(found[1])
    seen.tokens += found[2]
