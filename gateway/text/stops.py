"""Stop strings: the text before one is delivered, a possible beginning of one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in a choice's text.

    Of several, the one that is complete first ends the choice (the longer one if two end together), so that the outcome
    doesn't depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that is certain now. Once `matched` is set, the choice's text is complete and nothing may follow."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            return text[: min(found)[1]]
        cut = len(text) - self._possible_beginning(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What is still held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
