"""Guesses what follows the last tokens of a sequence: what followed them before. Pure."""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 2
"""Tokens that must recur before what followed them is guessed."""
LONGEST = 10
"""Most tokens of a guess."""
_FIRST_ESTIMATE = 0.5
_LEARNING_RATE = 0.2

Gram = tuple[int, ...]


def followers(tokens: Sequence[int], first: int = GRAM) -> dict[Gram, int]:
    """For every run of `GRAM` tokens, where what followed it last begins; positions from `first` on."""
    return {tuple(tokens[at - GRAM : at]): at for at in range(max(first, GRAM), len(tokens))}


class Lookup:
    """Guesses for one choice. `prompt_index` are the followers of its prompt, which choices share."""

    def __init__(self, prompt: Sequence[int], prompt_index: dict[Gram, int]) -> None:
        self._tokens = list(prompt)
        self._prompt_length = len(prompt)
        self._prompt_index = prompt_index
        self._index: dict[Gram, int] = {}
        self._guess: Sequence[int] = ()
        self.estimate = _FIRST_ESTIMATE
        """How likely a guessed token is right, given that those before it are."""

    def learn(self, answer: Sequence[int]) -> None:
        """Take in what the choice has produced since the last call, and whether it had been guessed."""
        fresh = answer[len(self._tokens) - self._prompt_length :]
        for guessed, token in zip(self._guess, fresh, strict=False):
            self.estimate += _LEARNING_RATE * ((guessed == token) - self.estimate)
            if guessed != token:
                break
        first = len(self._tokens)
        self._tokens.extend(fresh)
        self._index.update(followers(self._tokens, first))
        self._guess = ()

    def guess(self) -> Sequence[int]:
        """What may come next, at most `LONGEST` tokens."""
        gram = tuple(self._tokens[-GRAM:])
        at = self._index.get(gram) or self._prompt_index.get(gram)
        self._guess = () if at is None else self._tokens[at : at + LONGEST]
        return self._guess
