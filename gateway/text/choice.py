"""The text of one choice: tokens in, certain text out, ended by a stop string or by whoever produces the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.text.detokenizer import Detokenizer
from gateway.text.stops import StopMatcher


@dataclass(slots=True)
class Piece:
    """What some tokens added."""

    text: str
    taken: int
    """Tokens that belong to the choice: all of them, or those up to the one that completed a stop string."""
    stopped: bool
    """A stop string was completed; the choice has ended."""
    parts: Sequence[str] = ()
    """The text by token: of those that were taken."""


class ChoiceText:
    """Detokenizer and stop strings in a row. Takes tokens singly, so the text doesn't depend on their grouping."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self._has_stops = any(stops)

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Add tokens. Nothing may be added after a piece that is `stopped`."""
        if not self._has_stops:
            parts = [self._detokenizer.push(token_id) for token_id in token_ids]
            return Piece(parts[0] if len(parts) == 1 else "".join(parts), len(parts), False, parts)
        parts = []
        for taken, token_id in enumerate(token_ids, start=1):
            parts.append(self._stops.push(self._detokenizer.push(token_id)))
            if self._stops.matched:
                return Piece("".join(parts), taken, True, parts)
        return Piece("".join(parts), len(token_ids), False, parts)

    def end(self) -> Piece:
        """Everything held back, because no more tokens come. Even this may complete a stop string."""
        text = self._stops.push(self._detokenizer.flush())
        if not self._stops.matched:
            text += self._stops.flush()
        return Piece(text, 0, self._stops.matched)
