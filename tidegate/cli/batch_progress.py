"""The line that shows how far a batch is, from the first byte of its upload to its end."""

import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from tidegate.cli.output import size

PACE_S = 10.0  # what counts as the present
WORDS = 11  # the longest status, so that the bar stays where it is


class Pace:
    """Lines and output tokens a second, lately: a batch waits, is preempted, and goes on; an average over all of it
    would say nothing of how long the rest takes. Counts come in jumps (the platform writes them down once a second).
    """

    def __init__(self) -> None:
        self._jumps: deque[tuple[float, int, int]] = deque()
        self._looked_s = 0.0

    def seen(self, now_s: float, lines: int, tokens: int) -> tuple[float, float]:
        jumps = self._jumps
        if not jumps or (lines, tokens) != jumps[-1][1:]:
            if jumps and jumps[-1][0] < now_s - PACE_S:  # it goes on after a pause, which is no part of its pace
                self._jumps = jumps = deque([(self._looked_s, *jumps[-1][1:])])
            jumps.append((now_s, lines, tokens))
        self._looked_s = now_s
        while len(jumps) > 2 and jumps[1][0] <= now_s - PACE_S:
            jumps.popleft()
        since, last = jumps[0], jumps[-1]
        # Until the next jump is due, the last one is the present; after that, silence counts.
        took_s = max(last[0] - since[0], now_s - since[0] - 2.0)
        if took_s <= 0 or last[0] < now_s - PACE_S:
            return 0.0, 0.0
        return (last[1] - since[1]) / took_s, (last[2] - since[2]) / took_s


class Progress:
    """One line on stderr: a bar, lines, tokens a second, time left, cost so far. Nothing when `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._pace = Pace()

    def __enter__(self) -> Self:
        if not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[more]}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("uploading".ljust(WORDS), total=None, more="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def uploading(self, done: int, total: int) -> None:
        self._tell("uploading", done, total, f"{size(done)} of {size(total)}")

    def show(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        pace = self._pace.seen(time.monotonic(), done, batch["usage"]["output_tokens"])
        self._tell(batch["status"].replace("_", " "), done, counts["total"], describe(batch, pace))

    def _tell(self, what: str, done: int, total: int, more: str) -> None:
        if self._bar is not None:
            description = what.ljust(WORDS)
            self._bar.update(self._task, description=description, completed=done, total=total or None, more=more)


def describe(batch: dict[str, Any], pace: tuple[float, float]) -> str:
    """``12/600 · 1 failed · 83 tokens/s · 4 min left · $0.0123``; what is not known yet is left out."""
    counts = batch["request_counts"]
    done = counts["completed"] + counts["failed"]
    left = counts["total"] - done
    parts = [f"{done}/{counts['total']}"] if counts["total"] else []
    if counts["failed"]:
        parts.append(f"{counts['failed']} failed")
    if batch["status"] == "in_progress" and pace[1] > 0:
        parts.append(f"{pace[1]:.0f} tokens/s")
    if batch["status"] == "in_progress" and left:
        parts.append(f"{_duration(left / pace[0])} left" if pace[0] > 0 else "waiting for an idle accelerator")
    if batch.get("cost_nano_usd"):
        parts.append(f"${batch['cost_nano_usd'] / 1e9:.4f}")
    if batch["status"] == "completed" and batch["in_progress_at"]:
        parts.append(f"in {_duration(batch['completed_at'] - batch['in_progress_at'])}")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"
