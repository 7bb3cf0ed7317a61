"""What is left of a stream for a client that has its beginning: every delta is cut to what that client lacks. Pure.

Tokens and characters are both counted, since text may lag behind its tokens; a choice's text depends on its tokens
alone, so that both cut at the same place, whatever the deltas' sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gateway.types import Delta, Held
from llmos.errors import InvalidRequest


@dataclass(slots=True)
class _Left:
    held: Held
    chars: int
    """Characters of what the client has that have not come again yet."""


class Remainder:
    """Owned by one stream."""

    def __init__(self, held: Iterable[Held], choices: int, max_tokens: int) -> None:
        """Raises InvalidRequest if nobody can hold that of such a request."""
        self._left: dict[int, _Left] = {}
        for one in held:
            if one.choice >= choices or one.tokens > max_tokens or one.choice in self._left:
                raise InvalidRequest("The stream never had such a position.", param="last-event-id")
            self._left[one.choice] = _Left(one, one.chars)

    def tokens_of(self, choice: int) -> int:
        """Tokens that the client has of a choice."""
        left = self._left.get(choice)
        return left.held.tokens if left is not None else 0

    @property
    def is_over(self) -> bool:
        """The client has been caught up with in every choice."""
        return not self._left

    def cut(self, delta: Delta) -> Delta | None:
        """What the client lacks of a delta; None if it has all of it."""
        left = self._left.get(delta.choice)
        if left is None:
            return delta
        if left.held.ended:
            return None
        count = len(delta.token_ids)
        known = min(count, max(0, left.held.tokens - delta.index))
        chars = min(left.chars, len(delta.text))
        left.chars -= chars
        if not left.chars and delta.index + count >= left.held.tokens:
            del self._left[delta.choice]
        if known == count and chars == len(delta.text) and delta.finish is None:
            return None
        parts = delta.parts[known:] if sum(map(len, delta.parts[:known])) == chars else ()
        return replace(
            delta,
            index=delta.index + known,
            text=delta.text[chars:],
            token_ids=delta.token_ids[known:],
            logprobs=delta.logprobs[known:],
            parts=parts,
        )
