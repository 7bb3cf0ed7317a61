"""Which rows a step computes: one per decoding choice and draft token, then prefill chunks. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llmos.errors import InternalError
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.run import Choice, Run
from worker.engine.sampling import Pick
from worker.engine.sequence import SequenceKV

PREFILL_TOKENS = 128
"""Most prefill rows of a step: a long prompt does not hold up running streams for longer than that."""

Drafter = Callable[[Run, Choice], Sequence[int]]
"""Guesses tokens that follow those of a choice."""


@dataclass(slots=True)
class Span:
    """Rows of one sequence: the positions from `first` up to `end`."""

    run: Run
    choice: Choice | None
    """None: the prompt, for all choices."""
    first: int
    end: int
    draft: Sequence[int] = ()
    """Guessed tokens of the last positions."""

    @property
    def kv(self) -> SequenceKV:
        """Where its keys and values go."""
        kv = self.run.prompt_kv if self.choice is None else self.choice.kv
        if kv is None:
            raise InternalError("a prompt without KV was planned")
        return kv

    @property
    def tokens(self) -> list[int]:
        """One per row."""
        return self.run.tokens(self.choice, self.first, self.end - len(self.draft)) + list(self.draft)

    @property
    def pickers(self) -> list[Choice]:
        """Choices that get a token from the row before the draft."""
        end = self.end - len(self.draft)
        if self.choice is not None:
            return [self.choice] if end == self.run.known(self.choice) else []
        return [choice for choice in self.run.choices.values() if not choice.tokens and end == len(self.run.prompt)]

    def drop_draft(self) -> None:
        """Leave the draft's rows out."""
        self.end -= len(self.draft)
        self.draft = ()


@dataclass(frozen=True, slots=True)
class Picker:
    """A choice that gets a token from the logits of a row, and further ones for as long as they equal its draft."""

    run: Run
    choice: Choice
    rows: range
    """Row numbers: the one after whose token a token is wanted, then one per token of the draft."""
    draft: Sequence[int]

    def guessed(self, depth: int, pick: Pick | None) -> bool:
        """Whether the pick of that depth is what the next row was computed for."""
        return pick is not None and depth < len(self.draft) and self.draft[depth] == pick.token_id


@dataclass(slots=True)
class Batch:
    """Rows of one step."""

    spans: list[Span] = field(default_factory=list)

    def pickers(self) -> Iterator[Picker]:
        """Who gets tokens from which rows."""
        row = 0
        for span in self.spans:
            row += span.end - span.first
            for choice in span.pickers:
                yield Picker(span.run, choice, range(row - 1 - len(span.draft), row), span.draft)

    @property
    def decodes(self) -> bool:
        """Whether there are only decoding choices and their drafts."""
        return all(span.choice is not None and span.end - span.first == 1 + len(span.draft) for span in self.spans)

    def computed(self) -> None:
        """Keys and values of all rows are stored. Those of drafts do not count until the draft has proved right."""
        for span in self.spans:
            end = span.end - len(span.draft)
            span.run.count_prefill(span.choice, span.first, end)
            if span.choice is None:
                span.run.prompt_computed(end)
            else:
                span.choice.kv.computed = end


def _no_draft(run: Run, choice: Choice) -> Sequence[int]:
    return ()


def plan(runs: Iterable[Run], draft: Drafter = _no_draft) -> Batch:
    """The next step of running attempts; those that come first do so in the prefill too."""
    runs = list(runs)
    batch = Batch([span for run in runs for span in _decode(run, draft)])
    budget = PREFILL_TOKENS
    begun: set[int] = set()
    for run in runs:
        if run.prompt_done:
            for choice in run.choices.values():
                if run.pending(choice) > 1 and budget:
                    budget = _chunk(batch, run, choice, budget)
        elif budget and not _awaits(run, begun):
            budget = _chunk(batch, run, None, budget)
        if not run.prompt_done:
            begun.update(run.hashes)
    return batch


def _decode(run: Run, draft: Drafter) -> Iterator[Span]:
    if not run.prompt_done:
        return
    for choice in run.choices.values():
        if run.pending(choice) == 1:
            guess, at = draft(run, choice), choice.kv.computed
            yield Span(run, choice, at, at + 1 + len(guess), guess)


def _awaits(run: Run, begun: set[int]) -> bool:
    """Whether the prompt's next block is being computed for a run before this one, which then finds it cached."""
    kv, usable = run.prompt_kv, run.known_prompt
    if kv is None or kv.computed % BLOCK_TOKENS:
        return False
    number = kv.computed // BLOCK_TOKENS
    return number < len(usable) and usable[number] in begun


def _chunk(batch: Batch, run: Run, choice: Choice | None, budget: int) -> int:
    """Add the sequence's next chunks, which end at multiples of a block. Returns what is left of the budget."""
    span = Span(run, choice, 0, 0)
    first = span.first = end = span.kv.computed
    known = len(run.prompt) if choice is None else run.known(choice)
    while end < known:
        following = min(known, (end // BLOCK_TOKENS + 1) * BLOCK_TOKENS)
        if following - first > budget:
            break
        end = following
    span.end = end
    if end > first:
        batch.spans.append(span)
    return budget - (end - first) if end == known else 0
