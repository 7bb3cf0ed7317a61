"""An admitted attempt: what is known of each choice, what has been computed, where its KV lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmos.errors import InternalError
from worker.backend import Attempt, FinishReason
from worker.engine.blocks import BlockManager
from worker.engine.grammar.matcher import Matcher
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.lookup import Gram, Lookup
from worker.engine.paged import KVMemory
from worker.engine.sequence import SequenceKV, blocks_of


@dataclass(slots=True)
class Choice:
    """One choice of an attempt that still runs."""

    number: int
    tokens: list[int]
    """Tokens of the answer so far, resumed ones included."""
    resumed: int
    """How many of them were there when the attempt came."""
    keep_until: int | None = None
    stored: SequenceKV | None = None
    """Its keys and values, once those of the prompt are computed."""
    lookup: Lookup | None = None
    """What guesses its next tokens, once something does."""
    matcher: Matcher | None = None
    """Where it stands in its grammar, if it has one."""

    @property
    def kv(self) -> SequenceKV:
        """`stored`, where it must be there."""
        if self.stored is None:
            raise InternalError("a choice was planned before its prompt was computed")
        return self.stored


class Run:
    """An attempt, waiting or running. Owns its KV from `start` until `release`.

    The prompt is computed once, in `prompt_kv`; then the choices go on from it, each in its own `kv`.
    """

    def __init__(self, attempt: Attempt, end_tokens: frozenset[int], arrival: int = 0) -> None:
        self.attempt = attempt
        self.order = (attempt.priority, arrival)
        """Who goes first: by class, then arrival."""
        self.prompt = list(attempt.prompt)
        self.hashes = tuple(attempt.prefix_hashes)[: len(self.prompt) // BLOCK_TOKENS]
        self.stops = attempt.stop_token_ids | (frozenset() if attempt.ignore_eos else end_tokens)
        self.choices = {
            number: Choice(number, list(known := attempt.resume.get(number, ())), len(known))
            for number in range(attempt.choices)
            if number not in attempt.finished_choices
        }
        self.prompt_kv: SequenceKV | None = None
        """Set while the prompt is computed."""
        self.prompt_done = False
        """Keys and values of the whole prompt are stored."""
        self.prompt_index: dict[Gram, int] | None = None
        """What its choices' look-ups share."""
        self.prefilled = False
        self.prefill_tokens = 0
        self.produced = 0
        self.since_s: float | None = None
        """Begin of the present stage."""
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache before any of them was computed for this run."""
        self._untold = True
        self._reached = 0

    @property
    def priority(self) -> int:
        """Its class, 0 the highest: that of the attempt, until it is moved to another."""
        return self.order[0]

    def set_priority(self, priority: int) -> None:
        """Move to another class. Who keeps it in order must sort it in anew."""
        self.order = (priority, self.order[1])

    @property
    def epoch(self) -> tuple[int, int]:
        """In order of age."""
        return self.attempt.epoch.term, self.attempt.epoch.attempt

    @property
    def known_prompt(self) -> tuple[int, ...]:
        """Hashes of the blocks that need not be computed if cached: at least the prompt's last token is."""
        return self.hashes[: (len(self.prompt) - 1) // BLOCK_TOKENS]

    def start(self, manager: BlockManager, memory: KVMemory) -> None:
        """Begin, or begin again after `release`: nothing is computed yet."""
        self.prompt_kv = SequenceKV(manager, memory)

    def release(self) -> None:
        """Give all blocks back. What has been produced stays known, so that it can be computed again."""
        for kv in self._kvs():
            kv.release()
        for choice in self.choices.values():
            choice.stored = None
        self.prompt_kv, self.prompt_done = None, False

    def drop(self, choice: Choice) -> None:
        """Forget a choice."""
        del self.choices[choice.number]
        if choice.stored is not None:
            choice.stored.release()

    @property
    def held(self) -> int:
        """Blocks that it holds."""
        return len({block for kv in self._kvs() for block in kv.blocks})

    def blocks_at(self, more: int) -> int:
        """Blocks that it holds when each choice has `more` tokens, or as many as it may have."""
        shared = len(self.prompt) // BLOCK_TOKENS
        ends = (
            len(self.prompt) + min(len(choice.tokens) + more, self.attempt.max_tokens)
            for choice in self.choices.values()
        )
        return shared + sum(blocks_of(end) - shared for end in ends)

    def adopt(self) -> None:
        """Take the prompt's next blocks from the prefix cache while they are there."""
        kv, usable = self.prompt_kv, self.known_prompt
        if kv is None or kv.computed % BLOCK_TOKENS:
            return
        while (number := kv.computed // BLOCK_TOKENS) < len(usable) and kv.adopt(usable[number]):
            if kv.computed > self._reached:
                self.cached_tokens += BLOCK_TOKENS
                self._reached = kv.computed

    def prompt_computed(self, end: int) -> None:
        """The prompt is computed up to `end`: cache the blocks that are full; at its end, the choices go on from it."""
        kv = self.prompt_kv
        if kv is None:
            raise InternalError("a prompt was computed twice")
        first, kv.computed = kv.computed // BLOCK_TOKENS, end
        self._reached = max(self._reached, end)
        for number in range(first, min(end // BLOCK_TOKENS, len(self.hashes))):
            kv.store(number, self.hashes[number])
        if end == len(self.prompt):
            for choice in self.choices.values():
                choice.stored = kv.fork()
            kv.release()
            self.prompt_kv, self.prompt_done = None, True

    def take_cached(self) -> int:
        """`cached_tokens`, the first time it is asked for."""
        cached, self._untold = self.cached_tokens if self._untold else 0, False
        return cached

    def pending(self, choice: Choice) -> int:
        """Known tokens of a choice that have not been computed."""
        return self.known(choice) - choice.kv.computed

    def known(self, choice: Choice) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(choice.tokens)

    def tokens(self, choice: Choice | None, first: int, end: int) -> list[int]:
        """Known tokens at the positions from `first` up to `end`."""
        at = len(self.prompt)
        answer = choice.tokens[max(0, first - at) : max(0, end - at)] if choice is not None else []
        return self.prompt[first:end] + answer

    def barred(self, choice: Choice) -> Sequence[int]:
        """Tokens that must not be picked next."""
        return sorted(self.stops) if len(choice.tokens) < self.attempt.min_tokens else ()

    def finish(self, choice: Choice) -> FinishReason | None:
        """Whether, and why, a choice has ended with its present tokens. A complete grammar overrides min_tokens."""
        if choice.matcher is not None and choice.matcher.complete:
            return FinishReason.STOP
        if choice.tokens and choice.tokens[-1] in self.stops and len(choice.tokens) > self.attempt.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(choice.tokens) >= self.attempt.max_tokens else None

    def append(self, choice: Choice, token: int) -> None:
        """Give a choice its next token, whose keys and values are yet to be computed. Raises InvalidConstraint."""
        if choice.matcher is not None:
            choice.matcher.advance((token,))
        choice.tokens.append(token)
        choice.kv.computed = self.known(choice) - 1
        self.produced += 1

    def drop_satisfied(self, choice: Choice) -> bool:
        """Forget a choice that has all that is still wanted of it; whether it had."""
        satisfied = choice.keep_until is not None and len(choice.tokens) >= choice.keep_until
        if satisfied:
            self.drop(choice)
        return satisfied

    def count_prefill(self, choice: Choice | None, first: int, end: int) -> None:
        """Count computed positions that were known when the attempt came."""
        if not self.prefilled:
            known = len(self.prompt) + (choice.resumed if choice is not None else 0)
            self.prefill_tokens += max(0, min(end, known) - first)

    @property
    def catching_up(self) -> bool:
        """Whether something that was known when the attempt came is yet to be computed."""
        return not self.prompt_done or any(
            choice.kv.computed < len(self.prompt) + choice.resumed for choice in self.choices.values()
        )

    def ended(self) -> Iterator[tuple[Choice, FinishReason]]:
        """Choices that have ended already, as an attempt may be resumed right before its end."""
        for choice in list(self.choices.values()):
            reason = self.finish(choice)
            if reason is not None:
                yield choice, reason

    def _kvs(self) -> Iterator[SequenceKV]:
        if self.prompt_kv is not None:
            yield self.prompt_kv
        for choice in self.choices.values():
            if choice.stored is not None:
                yield choice.stored
