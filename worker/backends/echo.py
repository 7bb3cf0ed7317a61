"""A backend without a model: token i of a choice is a hash of (prompt, seed, choice, i).

For tests and benches: a stream's every token can be verified by machine, and memory is accounted block by block as a
real engine does it, with a queue, growth and preemption by recomputation.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llmos.clock import Clock, SystemClock
from llmos.errors import PromptTooLong, Unavailable, UnsupportedFeature
from worker.backend import (
    Attempt,
    Blocks,
    FinishReason,
    Footprint,
    ModelSpec,
    Output,
    Stage,
    StageDone,
    StepResult,
    TokenLogprob,
)

BLOCK_TOKENS = 64
CONTEXT_LENGTH = 8192
VOCABULARY = 256
"""One token per byte of UTF-8."""
KV_BYTES_PER_TOKEN = 1024
FIRST_TOKEN, ALPHABET = 32, 95
"""Printable ASCII, 32 to 126."""
FINGERPRINT = "echo-1"
"""Changes whenever `echo_token` does."""
_PLACE = struct.Struct("<QII")
_SLICE_S = 0.02
"""Longest sleep of one step: orders are heard, and the step counter moves, at least this often."""


def prompt_digest(prompt: Sequence[int]) -> bytes:
    """32 bytes that stand for the prompt's token ids."""
    return hashlib.blake2b(struct.pack(f"<{len(prompt)}I", *prompt), digest_size=32).digest()


def echo_token(digest: bytes, seed: int, choice: int, index: int, banned: Collection[int] = ()) -> int:
    """Token `index` of `choice`: printable ASCII, by a hash keyed with the `prompt_digest`.

    `banned` are the stop tokens while `min_tokens` is not reached: the next printable one outside them is taken.
    """
    word = hashlib.blake2b(_PLACE.pack(seed, choice, index), digest_size=8, key=digest).digest()
    first = int.from_bytes(word, "little") % ALPHABET
    if not banned:
        return FIRST_TOKEN + first
    candidates = (FIRST_TOKEN + (first + step) % ALPHABET for step in range(ALPHABET))
    return next((token for token in candidates if token not in banned), FIRST_TOKEN + first)


def echo_logprob(token: int, count: int) -> TokenLogprob:
    """Likelihoods 1/2, 1/4, ... for the token and those that follow it in the alphabet; `count` likeliest ones."""
    ranked = (FIRST_TOKEN + (token - FIRST_TOKEN + rank) % ALPHABET for rank in range(min(count, ALPHABET)))
    top = [(other, -(rank + 1) * math.log(2)) for rank, other in enumerate(ranked)]
    return TokenLogprob(token, -math.log(2), top)


@dataclass(slots=True)
class _Sequence:
    """One choice that is not finished. `length` is the number of its tokens, and the next index."""

    choice: int
    length: int
    ended_before: bool
    """Its resume is complete already; only the finish is missing."""
    keep_until: int | None = None
    blocks: int = 0


@dataclass(slots=True)
class _Run:
    """An admitted attempt, waiting or running. Waiting ones hold no blocks."""

    attempt: Attempt
    digest: bytes
    sequences: dict[int, _Sequence]
    running: bool = False
    since_s: float = 0.0
    """Begin of the present stage."""
    prefilled: bool = False
    produced: int = 0


@dataclass(slots=True)
class _Pool:
    """A loaded model: its block count and its attempts in order of arrival."""

    spec: ModelSpec
    total: int
    free: int
    context: int
    runs: dict[str, _Run] = field(default_factory=dict)


class EchoBackend:
    """Implements `worker.backend.Backend`. One tick gives each running choice one token.

    `tokens_per_second` is the speed of one stream; 0: as fast as possible. `load_s` is how long loading a model takes;
    `leak_bytes` are lost with every tick.
    """

    def __init__(
        self,
        *,
        tokens_per_second: float = 0.0,
        load_s: float = 0.0,
        leak_bytes: int = 0,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._period_s = 1.0 / tokens_per_second if tokens_per_second > 0 else 0.0
        self._load_s = load_s
        self._leak_bytes = leak_bytes
        self._leaked: list[bytes] = []
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._pools: dict[str, _Pool] = {}
        self._due_s = 0.0

    def load(self, spec: ModelSpec, memory_budget: int) -> Blocks:
        """See `Backend`. Raises Unavailable if not one block fits beside the declared weights."""
        bytes_per_block = BLOCK_TOKENS * (spec.kv_bytes_per_token or KV_BYTES_PER_TOKEN)
        total = (memory_budget - spec.weight_bytes) // bytes_per_block
        if total < 1:
            raise Unavailable(f"{spec.name} needs {spec.weight_bytes + bytes_per_block} bytes, not {memory_budget}.")
        if self._load_s:
            self._sleep(self._load_s)
        self._pools[spec.name] = _Pool(spec, total, total, spec.context_length or CONTEXT_LENGTH)
        return Blocks(total, total, BLOCK_TOKENS)

    def unload(self, name: str) -> None:
        """See `Backend`."""
        self._pools.pop(name, None)

    def footprint(self, name: str) -> Footprint:
        """See `Backend`: what is declared, as nothing is really taken."""
        pool = self._pools.get(name)
        if pool is None:
            return Footprint()
        return Footprint(pool.spec.weight_bytes, BLOCK_TOKENS * (pool.spec.kv_bytes_per_token or KV_BYTES_PER_TOKEN))

    def blocks(self) -> Mapping[str, Blocks]:
        """See `Backend`."""
        return {name: Blocks(pool.total, pool.free, BLOCK_TOKENS) for name, pool in self._pools.items()}

    def admit(self, attempt: Attempt) -> None:
        """See `Backend`."""
        pool = self._pools.get(attempt.model)
        if pool is None:
            raise Unavailable(f"The model {attempt.model} is not loaded here.")
        older = next((p.runs[attempt.request_id] for p in self._pools.values() if attempt.request_id in p.runs), None)
        if older is not None:
            if not attempt.epoch.after(older.attempt.epoch):
                return
            self.cancel(attempt.request_id)
        if attempt.constraint is not None:
            raise UnsupportedFeature("The echo backend cannot constrain its output.", param="constraint")
        sequences = _sequences(attempt)
        _check_fits(attempt, len(sequences), pool)
        pool.runs[attempt.request_id] = _Run(attempt, prompt_digest(attempt.prompt), sequences)

    def cancel(self, request_id: str, choice: int | None = None, keep_until: int | None = None) -> None:
        """See `Backend`."""
        for pool in self._pools.values():
            run = pool.runs.get(request_id)
            if run is None:
                continue
            if choice is None:
                _release(pool, run)
                del pool.runs[request_id]
            elif choice in run.sequences:
                run.sequences[choice].keep_until = keep_until or 0
                _drop_kept(pool, run)

    def set_priority(self, request_id: str, priority: int) -> None:
        """See `Backend`. Classes change nothing here: attempts run in order of arrival."""

    def busy(self) -> bool:
        """See `Backend`."""
        return any(pool.runs for pool in self._pools.values())

    def step(self) -> StepResult:
        """See `Backend`. Paced: sleeps a little and gives nothing while the next tick is not due."""
        if not self.busy() or not self._tick_is_due():
            return StepResult()
        if self._leak_bytes:
            self._leaked.append(b"\x01" * self._leak_bytes)
        outputs: list[Output] = []
        stages: list[StageDone] = []
        for pool in self._pools.values():
            _schedule(pool, self._clock.monotonic())
            _grow(pool)
            for run in [run for run in pool.runs.values() if run.running]:
                _advance(pool, run, outputs)
                _drop_kept(pool, run)
                if not run.prefilled or not run.sequences:
                    stages.extend(_stages(run, self._clock.monotonic()))
        return StepResult(outputs, (), stages)

    def _tick_is_due(self) -> bool:
        if self._period_s == 0.0:
            return True
        now = self._clock.monotonic()
        wait_s = self._due_s - now
        if wait_s > 0:
            self._sleep(min(wait_s, _SLICE_S))
            now = self._clock.monotonic()
            if now < self._due_s:
                return False
        # A little late is made up for, so that the mean speed holds; a pause is not.
        late = now - self._due_s < self._period_s
        self._due_s = (self._due_s if late else now) + self._period_s
        return True


def _sequences(attempt: Attempt) -> dict[int, _Sequence]:
    found = {}
    for choice in range(attempt.choices):
        if choice in attempt.finished_choices:
            continue
        done = attempt.resume.get(choice, ())
        ended = len(done) >= attempt.max_tokens or (
            len(done) > attempt.min_tokens and done[-1] in attempt.stop_token_ids
        )
        found[choice] = _Sequence(choice, len(done), ended)
    return found


def _check_fits(attempt: Attempt, sequences: int, pool: _Pool) -> None:
    longest = len(attempt.prompt) + attempt.max_tokens
    if longest > pool.context:
        raise PromptTooLong(f"Prompt and max_tokens exceed the context of {pool.context} tokens.", param="max_tokens")
    if sequences * _blocks_for(longest) > pool.total:
        raise Unavailable("The request needs more KV blocks than this worker has.")


def _blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _needed(run: _Run, sequence: _Sequence) -> int:
    return _blocks_for(len(run.attempt.prompt) + sequence.length + 1)


def _release(pool: _Pool, run: _Run) -> None:
    for sequence in run.sequences.values():
        pool.free += sequence.blocks
        sequence.blocks = 0
    run.running = False


def _schedule(pool: _Pool, now: float) -> None:
    """Let waiting attempts run in order of arrival; the first that does not fit holds back those behind it."""
    for run in pool.runs.values():
        if run.running:
            continue
        needs = {sequence.choice: _needed(run, sequence) for sequence in run.sequences.values()}
        if sum(needs.values()) > pool.free:
            return
        for choice, count in needs.items():
            run.sequences[choice].blocks = count
            pool.free -= count
        run.running, run.prefilled, run.since_s = True, False, now


def _grow(pool: _Pool) -> None:
    """Give running sequences the block that their next token needs; the youngest attempts give way."""
    for run in list(pool.runs.values()):
        if not _must_grow(run):
            continue
        for sequence in _while_running(run):
            missing = _needed(run, sequence) - sequence.blocks
            while missing > pool.free and run.running:
                _release(pool, next(other for other in reversed(pool.runs.values()) if other.running))
            if run.running:
                sequence.blocks += missing
                pool.free -= missing


def _must_grow(run: _Run) -> bool:
    """Whether a sequence's next token lies in a block that it has not got."""
    if not run.running:
        return False
    prompt = len(run.attempt.prompt)
    return any(prompt + sequence.length >= sequence.blocks * BLOCK_TOKENS for sequence in run.sequences.values())


def _while_running(run: _Run) -> Iterator[_Sequence]:
    for sequence in run.sequences.values():
        if not run.running:
            return
        yield sequence


def _advance(pool: _Pool, run: _Run, outputs: list[Output]) -> None:
    """One token for each choice of a running attempt; finished choices give their blocks back."""
    attempt = run.attempt
    for sequence in list(run.sequences.values()):
        index = sequence.length
        tokens = [] if sequence.ended_before else [_next_token(run, sequence)]
        sequence.length += len(tokens)
        run.produced += len(tokens)
        finish = _finish(attempt, sequence, tokens)
        logprobs = attempt.sampling.logprobs
        entries = [echo_logprob(token, logprobs) for token in tokens] if logprobs is not None else ()
        outputs.append(Output(attempt.request_id, attempt.epoch, sequence.choice, index, tokens, entries, finish))
        if finish is not None:
            pool.free += sequence.blocks
            del run.sequences[sequence.choice]


def _next_token(run: _Run, sequence: _Sequence) -> int:
    attempt = run.attempt
    banned = attempt.stop_token_ids if sequence.length < attempt.min_tokens else ()
    return echo_token(run.digest, attempt.sampling.seed, sequence.choice, sequence.length, banned)


def _finish(attempt: Attempt, sequence: _Sequence, tokens: Sequence[int]) -> FinishReason | None:
    last = tokens[-1] if tokens else attempt.resume[sequence.choice][-1] if sequence.length else None
    if attempt.stop_token_ids and last in attempt.stop_token_ids and sequence.length > attempt.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.length >= attempt.max_tokens else None


def _stages(run: _Run, now: float) -> Iterator[StageDone]:
    """The prefill ends with the first tick; the decode with the last choice."""
    attempt = run.attempt
    if not run.prefilled:
        run.prefilled = True
        yield StageDone(attempt.request_id, attempt.epoch, Stage.PREFILL, run.since_s, now, len(attempt.prompt))
        run.since_s = now
    if not run.sequences:
        yield StageDone(attempt.request_id, attempt.epoch, Stage.DECODE, run.since_s, now, run.produced)


def _drop_kept(pool: _Pool, run: _Run) -> None:
    """Forget choices that have reached their `keep_until`, and the attempt with its last choice."""
    for sequence in tuple(run.sequences.values()):
        if sequence.keep_until is not None and sequence.length >= sequence.keep_until:
            pool.free += sequence.blocks
            del run.sequences[sequence.choice]
    if not run.sequences:
        pool.runs.pop(run.attempt.request_id, None)
