"""Continuous batching of one model: admit and cancel between steps, one forward pass per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from llmos.clock import Clock
from llmos.errors import InternalError, InvalidRequest, PromptTooLong, Unavailable
from worker.backend import Attempt, Blocks, Failure, Output, Stage, StageDone, StepResult
from worker.engine.attention import KVRow
from worker.engine.batch import Batch, plan
from worker.engine.kv import BLOCK_TOKENS, BlockAllocator, block_bytes
from worker.engine.paged import Servable
from worker.engine.run import Choice, Run
from worker.engine.sampling import Pick, SamplingRow, sample

_WORKSPACE_BYTES = 32 << 20
"""Set aside for the activations of a step, besides its logits."""
_LOGIT_ROWS = 64
"""Rows of logits (and as many of noise, in float64) that are set aside for."""


def kv_blocks(decoder: Servable, memory_budget: int) -> int:
    """KV blocks that fit beside weights and workspace in `memory_budget` bytes. Raises Unavailable if none does."""
    per_block = block_bytes(decoder.layers, decoder.kv_dtype)
    fixed = decoder.weight_bytes + _WORKSPACE_BYTES + _LOGIT_ROWS * decoder.vocabulary * 4
    count = (memory_budget - fixed) // per_block
    if count < 1:
        raise Unavailable(f"The model needs at least {fixed + per_block} bytes of memory, not {memory_budget}.")
    return count


class Engine:
    """Owns a model, its KV memory and its attempts. Called by one thread."""

    def __init__(self, decoder: Servable, blocks: int, clock: Clock) -> None:
        self._decoder = decoder
        self._clock = clock
        self._allocator = BlockAllocator(blocks)
        self._paged = decoder.with_memory(blocks)
        self._waiting: deque[Run] = deque()
        self._running: dict[str, Run] = {}

    def blocks(self) -> Blocks:
        """KV blocks, as of now."""
        return Blocks(self._allocator.total, self._allocator.free, BLOCK_TOKENS)

    def busy(self) -> bool:
        """Whether any attempt waits or runs."""
        return bool(self._waiting or self._running)

    def epoch(self, request_id: str) -> tuple[int, int] | None:
        """Epoch of the request's attempt here, if there is one."""
        run = self._find(request_id)
        return None if run is None else run.epoch

    def admit(self, attempt: Attempt) -> None:
        """Queue an attempt of a request that has none here. Raises InvalidRequest, PromptTooLong or Unavailable."""
        _check(attempt, self._decoder)
        run = Run(attempt, self._decoder.end_tokens)
        if run.blocks_needed > self._allocator.total:
            raise Unavailable("The request needs more KV blocks than this worker has.")
        self._waiting.append(run)

    def cancel(self, request_id: str, choice: int | None, keep_until: int | None) -> None:
        """See `Backend.cancel`."""
        run = self._find(request_id)
        if run is None:
            return
        if choice is None:
            self._forget(run)
        elif choice in run.choices:
            run.choices[choice].keep_until = keep_until or 0
            run.drop_kept()
            if not run.choices:
                self._forget(run)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Start what fits, compute one batch, pick tokens."""
        outputs = self._start_waiting()
        batch = plan(self._running.values())
        if not batch.rows:
            return StepResult(outputs)
        picks = self._compute(batch)
        self._advance(batch)
        stages = [done for run in list(self._running.values()) if (done := self._prefill_done(run))]
        failed = {run.attempt.request_id: run for (run, _, _), pick in zip(batch.picks, picks, strict=True) if not pick}
        for run in failed.values():
            self._forget(run)
        for (run, choice, _), pick in zip(batch.picks, picks, strict=True):
            if pick and run.attempt.request_id not in failed:
                outputs.append(_deliver(run, choice, pick))
        stages.extend(self._end_runs())
        return StepResult(outputs, [_failure(run) for run in failed.values()], stages)

    def _start_waiting(self) -> list[Output]:
        """Let attempts run in order of arrival; the first that does not fit holds back those behind it."""
        outputs: list[Output] = []
        while self._waiting and self._waiting[0].blocks_needed <= self._allocator.free:
            run = self._waiting.popleft()
            for choice, reason in run.ended():
                end = len(choice.tokens)
                outputs.append(Output(run.attempt.request_id, run.attempt.epoch, choice.number, end, (), finish=reason))
                del run.choices[choice.number]
            if run.choices:
                run.start(self._allocator, self._paged.memory)
                run.since_s = self._clock.monotonic()
                self._running[run.attempt.request_id] = run
        return outputs

    def _compute(self, batch: Batch) -> list[Pick | None]:
        logits = self._paged.forward(
            [run.token(choice, position) for run, choice, position in batch.rows],
            [position for _, _, position in batch.rows],
            [KVRow(_slots(choice), position + 1) for _, choice, position in batch.rows],
            [row for _, _, row in batch.picks],
        )
        if not batch.picks:
            return []
        wanted = [
            SamplingRow(run.attempt.sampling, choice.number, run.prompt, choice.tokens, run.barred(choice))
            for run, choice, _ in batch.picks
        ]
        return sample(logits, wanted)

    def _advance(self, batch: Batch) -> None:
        """Note which positions have been computed; hand finished prompts to all choices."""
        prefilling = [run for run in self._running.values() if not run.prompt_done]
        for run, choice, position in batch.rows:
            choice.computed += 1
            run.prefill_tokens += run.prefills(choice, position)
        for run in prefilling:
            if run.prompt_done:
                run.fork(self._paged.memory)

    def _prefill_done(self, run: Run) -> StageDone | None:
        if (
            run.prefilled
            or not run.prompt_done
            or any(run.prefills(choice, choice.computed) for choice in run.choices.values())
        ):
            return None
        run.prefilled = True
        return self._stage(run, Stage.PREFILL, run.prefill_tokens)

    def _stage(self, run: Run, stage: Stage, tokens: int) -> StageDone:
        start, run.since_s = run.since_s, self._clock.monotonic()
        return StageDone(run.attempt.request_id, run.attempt.epoch, stage, start, run.since_s, tokens)

    def _end_runs(self) -> Iterable[StageDone]:
        for run in list(self._running.values()):
            run.drop_kept()
            if not run.choices:
                self._forget(run)
                yield self._stage(run, Stage.DECODE, run.produced)

    def _find(self, request_id: str) -> Run | None:
        queued = (run for run in self._waiting if run.attempt.request_id == request_id)
        return self._running.get(request_id) or next(queued, None)

    def _forget(self, run: Run) -> None:
        if self._running.pop(run.attempt.request_id, None) is None:
            self._waiting.remove(run)
        else:
            run.release(self._allocator)


def _slots(choice: Choice) -> torch.Tensor:
    if choice.slots is None:
        raise InternalError("a choice without KV slots was planned")
    return choice.slots


def _deliver(run: Run, choice: Choice, pick: Pick) -> Output:
    """Append the token to its choice; an ended choice leaves the run."""
    index = len(choice.tokens)
    choice.tokens.append(pick.token_id)
    run.produced += 1
    reason = run.finish(choice)
    if reason is not None:
        run.choices.pop(choice.number, None)
    logprobs = () if pick.logprob is None else (pick.logprob,)
    attempt = run.attempt
    return Output(attempt.request_id, attempt.epoch, choice.number, index, (pick.token_id,), logprobs, reason)


def _failure(run: Run) -> Failure:
    message = "The model gave logits that are not numbers."
    return Failure(run.attempt.request_id, run.attempt.epoch, InternalError.code, message)


def _check(attempt: Attempt, decoder: Servable) -> None:
    """What would break a step for everybody must not get into one."""
    if not attempt.prompt:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    if attempt.max_tokens < 1 or attempt.choices < 1:
        raise InvalidRequest("At least one token and one choice must be asked for.", param="max_tokens")
    limit = decoder.context_length
    if limit is not None and len(attempt.prompt) + attempt.max_tokens > limit:
        raise PromptTooLong(f"Prompt and max_tokens exceed the context of {limit} tokens.", param="max_tokens")
    if any(len(tokens) > attempt.max_tokens for tokens in attempt.resume.values()):
        raise InvalidRequest("More tokens are resumed than max_tokens allows.", param="max_tokens")
    sources = (attempt.prompt, attempt.stop_token_ids, attempt.sampling.logit_bias, *attempt.resume.values())
    for source in sources:
        if source and (min(source) < 0 or max(source) >= decoder.vocabulary):
            raise InvalidRequest(f"Token ids lie between 0 and {decoder.vocabulary - 1}.", param="token_ids")
