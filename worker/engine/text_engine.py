"""The step loop of an encoder: texts of many requests side by side, a bounded number of tokens a step."""

from __future__ import annotations

import heapq
import math

import torch

from llmos.clock import Clock
from llmos.errors import InvalidRequest, PromptTooLong, Unavailable, UnsoundOutput, UnsupportedFeature
from worker.backend import Attempt, Blocks, Failure, FinishReason, Footprint, Output, Stage, StageDone, StepResult
from worker.demand import workspace_bytes
from worker.engine.encoder import Encoder, Text
from worker.engine.footprint import fixed_bytes
from worker.engine.kv import BLOCK_TOKENS

STEP_TOKENS = 512
"""Most tokens of a step, unless one text alone has more: other models' streams wait for it."""
QUEUE_BLOCKS = 128
"""Blocks of 64 tokens that may wait here. An encoder keeps nothing per token: this bounds what a worker is handed, so
that the rest waits in the scheduler, in its order."""


class TextEngine:
    """Owns an encoder and the attempts at it. Called by one thread."""

    def __init__(self, encoder: Encoder, clock: Clock) -> None:
        self._encoder = encoder
        self._clock = clock
        self._waiting: dict[str, Attempt] = {}
        self._order: list[tuple[int, int, str]] = []
        self._arrivals = 0
        self._total = max(QUEUE_BLOCKS, 2 * _blocks(encoder.context_length))
        self._held = 0

    def close(self) -> None:
        """Nothing outside of this process is held."""

    def footprint(self, grown: int) -> Footprint:
        """What it takes, if loading it made the process larger by `grown` bytes."""
        return Footprint(fixed_bytes(self._encoder.base, self._encoder.weight_bytes, grown) + _workspace(self._encoder))

    def blocks(self) -> Blocks:
        """Room for texts, as of now."""
        return Blocks(self._total, max(0, self._total - self._held), BLOCK_TOKENS)

    def busy(self) -> bool:
        """Whether any text waits."""
        return bool(self._waiting)

    @property
    def computing(self) -> bool:
        """Whether a step has something to compute."""
        return self.busy()

    def epoch(self, request_id: str) -> tuple[int, int] | None:
        """Epoch of the request's attempt here, if there is one."""
        attempt = self._waiting.get(request_id)
        return None if attempt is None else (attempt.epoch.term, attempt.epoch.attempt)

    def admit(self, attempt: Attempt) -> None:
        """Queue an attempt of a request that has none here. Raises a ClientError."""
        _check(attempt, self._encoder)
        self._waiting[attempt.request_id] = attempt
        self._held += _blocks(len(attempt.prompt))
        self._arrivals += 1
        heapq.heappush(self._order, (attempt.priority, self._arrivals, attempt.request_id))

    def cancel(self, request_id: str, choice: int | None, keep_until: int | None) -> None:
        """See `Backend.cancel`. The one output is wanted or not: there is nothing between."""
        if request_id in self._waiting and not keep_until:
            self._take(request_id)
            self._order = [entry for entry in self._order if entry[2] != request_id]
            heapq.heapify(self._order)

    def set_priority(self, request_id: str, priority: int) -> None:
        """See `Backend.set_priority`."""
        self._order = [
            (priority, arrival, queued) if queued == request_id else (before, arrival, queued)
            for before, arrival, queued in self._order
        ]
        heapq.heapify(self._order)

    @torch.inference_mode()
    def step(self, *, patient: bool = True) -> StepResult:
        """Compute the values of the texts that come first; there is never anything to wait for."""
        start = self._clock.monotonic()
        attempts = self._next()
        values = self._encoder.values([Text(attempt.prompt, attempt.first_text_tokens) for attempt in attempts])
        end = self._clock.monotonic()
        outputs, failures, stages = [], [], []
        for attempt, found in zip(attempts, values, strict=True):
            if all(map(math.isfinite, found)):
                outputs.append(
                    Output(attempt.request_id, attempt.epoch, 0, 0, (), finish=FinishReason.STOP, values=found)
                )
            else:
                failures.append(_failure(attempt))
            tokens = len(attempt.prompt)
            stages.append(StageDone(attempt.request_id, attempt.epoch, Stage.PREFILL, start, end, tokens))
        return StepResult(outputs, failures, stages)

    def _next(self) -> list[Attempt]:
        chosen: list[Attempt] = []
        left = STEP_TOKENS
        while self._order:
            request_id = self._order[0][2]
            left -= len(self._waiting[request_id].prompt)
            if chosen and left < 0:
                break
            heapq.heappop(self._order)
            chosen.append(self._take(request_id))
        return chosen

    def _take(self, request_id: str) -> Attempt:
        attempt = self._waiting.pop(request_id)
        self._held -= _blocks(len(attempt.prompt))
        return attempt


def encoder_fits(encoder: Encoder, memory_budget: int) -> None:
    """Raises Unavailable if weights and workspace do not fit in `memory_budget` bytes."""
    needed = encoder.weight_bytes + _workspace(encoder)
    if needed > memory_budget:
        raise Unavailable(f"The model needs at least {needed} bytes of memory, not {memory_budget}.")


def _workspace(encoder: Encoder) -> int:
    return workspace_bytes(0, cuda=encoder.device.type == "cuda")


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _check(attempt: Attempt, encoder: Encoder) -> None:
    if attempt.task not in encoder.tasks:
        raise UnsupportedFeature(f"The model does not {attempt.task.value}.", param="model")
    if not attempt.prompt:
        raise InvalidRequest("The text is empty.", param="prompt")
    if len(attempt.prompt) > encoder.context_length:
        raise PromptTooLong(f"The text is longer than {encoder.context_length} tokens.", param="prompt")
    if min(attempt.prompt) < 0 or max(attempt.prompt) >= encoder.vocabulary:
        raise InvalidRequest(f"Token ids lie between 0 and {encoder.vocabulary - 1}.", param="token_ids")
    if not 0 <= attempt.first_text_tokens <= len(attempt.prompt):
        raise InvalidRequest("The first of two texts is longer than both.", param="prompt")


def _failure(attempt: Attempt) -> Failure:
    message = "The model gave values that are not numbers."
    return Failure(attempt.request_id, attempt.epoch, UnsoundOutput.code, message)
