"""Prompt look-up drafting: guess that what followed the last tokens before follows them again.

The guessed tokens are computed as further rows of the step, and each is kept only if it is the token that the row
before it yields anyway, so a guess never changes a result. How far to guess is weighed per step: a row costs time, and
brings a token as often as guesses have come true. Guesses are also made where none is computed, so that the estimate
knows when they begin to come true; that costs a look-up. (Prompt look-up decoding, Saxena 2023; speculative decoding,
Leviathan et al. 2023, arXiv:2211.17192.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from worker.demand import LOGIT_ROWS
from worker.engine.lookup import Lookup, followers
from worker.engine.run import Choice, Run

_MARGIN = 1.25
"""A row must bring this many times what it costs: estimates are rough, and other requests wait too."""
_FORGETTING = 0.98
"""Weight of a step relative to the one after it."""
_ROW_SHARE = 0.15
"""What a further row costs relative to a step of none, until steps of different size have been seen."""
_SETTLED = 10.0
_OUTLIER = 1.5
"""Steps that took longer than this many times what was expected count as that."""


@dataclass(slots=True)
class StepCost:
    """Seconds of a step by its number of rows: a line through the steps of late."""

    base: float = 1.0
    per_row: float = _ROW_SHARE
    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        if seconds <= 0:
            return
        if self._weight > _SETTLED:
            # What else runs on the machine makes single steps long.
            seconds = min(seconds, _OUTLIER * self.of(rows))
        share = self.per_row / self.base
        keep = _FORGETTING
        self._weight = keep * self._weight + 1
        step = 1 / self._weight
        off_rows, off_seconds = rows - self._rows, seconds - self._seconds
        self._rows += step * off_rows
        self._seconds += step * off_seconds
        self._sums[0] = keep * self._sums[0] + off_rows * (rows - self._rows)
        self._sums[1] = keep * self._sums[1] + off_rows * (seconds - self._seconds)
        spread, together = self._sums
        if spread > 1:
            least = 0.01 * self._seconds / max(self._rows, 1)
            self.per_row = min(max(together / spread, least), self._seconds / max(self._rows, 1))
        else:
            self.per_row = share * self._seconds / (1 + share * self._rows)
        self.base = max(self._seconds - self.per_row * self._rows, 1e-9)

    def of(self, rows: int) -> float:
        """Seconds of a step."""
        return self.base + self.per_row * rows


class Drafting:
    """How far to guess, weighed over a step. Owned by one engine."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._rows = 0
        self._room = 0
        self._tokens = 0.0

    def begin(self, runs: Iterable[Run], prefill_limit: int) -> None:
        """A step of these runs is planned, of which at most `prefill_limit` rows go to prompts."""
        decoding = prefilling = 0
        for run in runs:
            pending = [run.pending(choice) for choice in run.choices.values()] if run.prompt_done else [len(run.prompt)]
            decoding += pending.count(1)
            prefilling += sum(pending) - pending.count(1)
        self._rows, self._tokens = decoding + min(prefilling, prefill_limit), float(decoding)
        # Logits of guesses are as large as the others, and no result needs them.
        self._room = LOGIT_ROWS - decoding

    def propose(self, run: Run, choice: Choice) -> Sequence[int]:
        """Tokens to compute after those of a decoding choice. See `worker.engine.batch.Drafter`."""
        if not self._worth(1.0):
            return ()
        if choice.lookup is None:
            if run.prompt_index is None:
                run.prompt_index = followers(run.prompt)
            choice.lookup = Lookup(run.prompt, run.prompt_index)
        choice.lookup.learn(choice.tokens)
        limit = run.attempt.max_tokens if choice.keep_until is None else choice.keep_until
        return self._choose(choice.lookup.guess()[: max(0, limit - len(choice.tokens) - 1)], choice.lookup.estimate)

    def _choose(self, guess: Sequence[int], estimate: float) -> Sequence[int]:
        """The part of a guess that is worth its rows."""
        taken, chance = 0, estimate
        while taken < len(guess) and self._worth(chance):
            taken += 1
            self._rows += 1
            self._room -= 1
            self._tokens += chance
            chance *= estimate
        return guess[:taken]

    def _worth(self, chance: float) -> bool:
        """Whether there is room for a row that brings a token with this chance, and it pays in tokens per second."""
        return self._room > 0 and chance * self.cost.of(self._rows) > _MARGIN * self.cost.per_row * self._tokens
