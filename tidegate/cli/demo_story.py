"""What happens in the guided minute, as it happens, and its sum."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

HELD_MS_MIN = 10  # an answer whose head says it waited longer than this had no replica ready for it


@dataclass(slots=True)
class Asked:
    """One question and what came of it. `ttft_ms` is what the client saw, `held_ms` of it was waiting."""

    endpoint: str
    ttft_ms: float = 0.0
    held_ms: int = 0
    right: bool = False
    failed: str = ""
    question: str = ""
    answer: str = ""


@dataclass(slots=True)
class Story:
    """Everything the view shows and the end sums up."""

    began: float = field(default_factory=time.monotonic)
    asked: list[Asked] = field(default_factory=list)
    in_flight: int = 0
    nodes: list[dict[str, Any]] = field(default_factory=list)
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    activity: list[dict[str, Any]] = field(default_factory=list)
    invoices: list[dict[str, Any]] = field(default_factory=list)
    swaps: int = 0
    over: bool = False


def summary(story: Story) -> dict[str, Any]:
    """What the minute showed, for `-o json` and the closing lines."""
    answered = [asked for asked in story.asked if not asked.failed]
    held = [asked.ttft_ms for asked in answered if asked.held_ms > HELD_MS_MIN]
    ready = [asked.ttft_ms for asked in answered if asked.held_ms <= HELD_MS_MIN]
    return {
        "requests": len(story.asked),
        "answered": len(answered),
        "by_the_right_model": sum(asked.right for asked in answered),
        "failed": len(story.asked) - len(answered),
        "swaps": story.swaps,
        "ttft_ms_ready_p50": round(median(ready)) if ready else None,
        "ttft_ms_held_p50": round(median(held)) if held else None,
        "bills": [
            {
                "tenant": invoice["tenant"],
                "tokens": sum(line["quantity"] for line in invoice["lines"] if line["item"].endswith("tokens")),
                "usd": invoice["total_usd"],
                "dedicated_usd": invoice["dedicated_total_usd"],
            }
            for invoice in story.invoices
        ],
    }
