"""Which rows a step computes: one per decoding choice, then prefill chunks. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from worker.engine.kv import BLOCK_TOKENS
from worker.engine.run import Choice, Run

PREFILL_TOKENS = 128
"""Most prefill rows of a step: a long prompt does not hold up running streams for longer than that."""


@dataclass(slots=True)
class Batch:
    """Rows of one step. `picks` are the choices that get a token, each from the logits of a row."""

    rows: list[tuple[Run, Choice, int]] = field(default_factory=list)
    """Run, choice and position of each row."""
    picks: list[tuple[Run, Choice, int]] = field(default_factory=list)
    """Run, choice and row number."""

    def chunk(self, run: Run, choice: Choice, end: int) -> None:
        """Add rows from what is computed up to position `end`."""
        self.rows.extend((run, choice, position) for position in range(choice.computed, end))


def plan(runs: Iterable[Run]) -> Batch:
    """The next step of running attempts, in order of arrival."""
    batch = Batch()
    runs = list(runs)
    for run in runs:
        if run.prompt_done:
            for choice in run.choices.values():
                if run.pending(choice) == 1:
                    batch.chunk(run, choice, choice.computed + 1)
                    batch.picks.append((run, choice, len(batch.rows) - 1))
    budget = PREFILL_TOKENS
    for run in runs:
        for choice in [run.leader] if not run.prompt_done else list(run.choices.values()):
            budget = _prefill(batch, run, choice, budget)
            if not budget:
                return batch
    return batch


def _prefill(batch: Batch, run: Run, choice: Choice, budget: int) -> int:
    """Add the choice's next chunks, which end at multiples of a block. Returns what is left of the budget."""
    prompt = len(run.prompt)
    if run.prompt_done and run.pending(choice) <= 1:
        return budget
    known = prompt + len(choice.tokens) if run.prompt_done else prompt
    end = choice.computed
    while end < known:
        following = min(known, (end // BLOCK_TOKENS + 1) * BLOCK_TOKENS)
        if following - choice.computed > budget:
            break
        end = following
    budget = budget - (end - choice.computed) if end == known else 0
    batch.chunk(run, choice, end)
    if end == known:
        fresh = [choice] if run.prompt_done else [other for other in run.choices.values() if not other.tokens]
        batch.picks.extend((run, other, len(batch.rows) - 1) for other in fresh)
    return budget
