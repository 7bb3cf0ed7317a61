"""An admitted attempt: what is known of each choice, what has been computed, where its KV lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from worker.backend import Attempt, FinishReason
from worker.engine.kv import BLOCK_TOKENS, BlockAllocator, blocks_needed
from worker.engine.paged import KVMemory


@dataclass(slots=True)
class Choice:
    """One choice of an attempt that still runs."""

    number: int
    tokens: list[int]
    """Tokens of the answer so far, resumed ones included."""
    resumed: int
    """How many of them were there when the attempt came."""
    computed: int = 0
    """Positions, prompt included, whose keys and values are stored."""
    keep_until: int | None = None
    tail: list[int] = field(default_factory=list)
    """Blocks of its own: from the prompt's last, partial block on."""
    slots: Tensor | None = None


class Run:
    """An attempt, waiting or running. Owns the blocks that it allocated until `release`."""

    def __init__(self, attempt: Attempt, end_tokens: frozenset[int]) -> None:
        self.attempt = attempt
        self.prompt = list(attempt.prompt)
        self.stops = attempt.stop_token_ids | (frozenset() if attempt.ignore_eos else end_tokens)
        self.choices = {
            number: Choice(number, list(known := attempt.resume.get(number, ())), len(known))
            for number in range(attempt.choices)
            if number not in attempt.finished_choices
        }
        self.prefilled = False
        self.prefill_tokens = 0
        self.produced = 0
        self.since_s = 0.0
        """Begin of the present stage."""
        self._blocks: list[int] = []
        self._leader: Choice | None = None

    @property
    def epoch(self) -> tuple[int, int]:
        """In order of age."""
        return self.attempt.epoch.term, self.attempt.epoch.attempt

    def start(self, allocator: BlockAllocator, memory: KVMemory) -> None:
        """Take blocks; the caller has seen that they are free."""
        self._blocks = allocator.allocate(self.blocks_needed)
        shared = len(self.prompt) // BLOCK_TOKENS
        each = (len(self._blocks) - shared) // len(self.choices)
        for order, choice in enumerate(self.choices.values()):
            first = shared + order * each
            choice.tail = self._blocks[first : first + each]
            choice.slots = memory.slots([*self._blocks[:shared], *choice.tail])

    def release(self, allocator: BlockAllocator) -> None:
        """Give all blocks back."""
        allocator.release(self._blocks)
        self._blocks = []

    @property
    def blocks_needed(self) -> int:
        """Blocks that `start` takes."""
        return blocks_needed(len(self.prompt), self.attempt.max_tokens, len(self.choices))

    @property
    def leader(self) -> Choice:
        """The choice in whose blocks the prompt is computed. It may have been cancelled meanwhile."""
        if self._leader is None:
            self._leader = next(iter(self.choices.values()))
        return self._leader

    @property
    def prompt_done(self) -> bool:
        """Whether keys and values of the whole prompt are stored."""
        return self.leader.computed >= len(self.prompt)

    def fork(self, memory: KVMemory) -> None:
        """Give the leader's prompt to the other choices: full blocks are shared, a partial one is copied."""
        for choice in self.choices.values():
            if choice is not self.leader:
                if len(self.prompt) % BLOCK_TOKENS:
                    memory.copy_block(self.leader.tail[0], choice.tail[0])
                choice.computed = len(self.prompt)

    def prefills(self, choice: Choice, position: int) -> bool:
        """Whether a position was known when the attempt came."""
        return position < len(self.prompt) + choice.resumed

    def pending(self, choice: Choice) -> int:
        """Known tokens of a choice that have not been computed."""
        return len(self.prompt) + len(choice.tokens) - choice.computed

    def token(self, choice: Choice, position: int) -> int:
        """Token at a position of prompt and answer."""
        inside = position - len(self.prompt)
        return self.prompt[position] if inside < 0 else choice.tokens[inside]

    def barred(self, choice: Choice) -> Sequence[int]:
        """Tokens that must not be picked next."""
        return sorted(self.stops) if len(choice.tokens) < self.attempt.min_tokens else ()

    def finish(self, choice: Choice) -> FinishReason | None:
        """Whether, and why, a choice has ended with its present tokens."""
        if choice.tokens and choice.tokens[-1] in self.stops and len(choice.tokens) > self.attempt.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(choice.tokens) >= self.attempt.max_tokens else None

    def drop_kept(self) -> None:
        """Forget choices that have reached their `keep_until`."""
        for choice in list(self.choices.values()):
            if choice.keep_until is not None and len(choice.tokens) >= choice.keep_until:
                del self.choices[choice.number]

    def ended(self) -> Iterator[tuple[Choice, FinishReason]]:
        """Choices that have ended already, as an attempt may be resumed right before its end."""
        for choice in list(self.choices.values()):
            reason = self.finish(choice)
            if reason is not None:
                yield choice, reason
