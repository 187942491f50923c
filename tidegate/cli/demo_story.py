"""What happens in the guided minute, as it happens, and its sum."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WOKEN_MS_MIN = 1  # an answer whose head says it waited at least this long for its endpoint was woken for


@dataclass(slots=True)
class Asked:
    """One question and what came of it. `ttft_ms` is what the client saw."""

    endpoint: str
    ttft_ms: float = 0.0
    activation_ms: int = 0
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
    woken = [asked.ttft_ms for asked in answered if asked.activation_ms >= WOKEN_MS_MIN]
    warm = [asked.ttft_ms for asked in answered if asked.activation_ms < WOKEN_MS_MIN]
    return {
        "requests": len(story.asked),
        "answered": len(answered),
        "by_the_right_model": sum(asked.right for asked in answered),
        "failed": len(story.asked) - len(answered),
        "swaps": story.swaps,
        "ttft_ms_ready_p50": round(median(warm)) if warm else None,
        "ttft_ms_woken_p50": round(median(woken)) if woken else None,
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
