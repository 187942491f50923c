"""Stop strings over a stream of text pieces that were cut anywhere."""

from collections.abc import Sequence


class StopMatcher:
    """Holds back text that may be the beginning of a stop string; never lets a stop string or a part of one through."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that is safe to send, whether a stop string was met). After True nothing may be pushed."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        hits = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)], True
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """What was held back, once no more text comes: it was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
