"""What one step has to say: tokens by choice, failures, stages that ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmos.errors import LlmosError
from worker.backend import CacheChange, Failure, FinishReason, Output, Stage, StageDone, StepResult, TokenLogprob
from worker.engine.run import Choice, Run
from worker.engine.sampling import Pick


@dataclass(slots=True)
class _Piece:
    run: Run
    choice: int
    index: int
    cached_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None

    def output(self) -> Output:
        attempt = self.run.attempt
        return Output(
            attempt.request_id,
            attempt.epoch,
            self.choice,
            self.index,
            tuple(self.tokens),
            tuple(self.logprobs),
            self.finish,
            cached_tokens=self.cached_tokens,
        )


class Report:
    """Collects a step's results. A run that fails takes back what it said in this step."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, int], _Piece] = {}
        self._failures: list[Failure] = []
        self._stages: list[StageDone] = []

    def token(self, run: Run, choice: Choice, pick: Pick, finish: FinishReason | None) -> None:
        """A choice has got a token, which is already among its own."""
        piece = self._piece(run, choice, len(choice.tokens) - 1)
        piece.tokens.append(pick.token_id)
        if pick.logprob is not None:
            piece.logprobs.append(pick.logprob)
        piece.finish = finish

    def end(self, run: Run, choice: Choice, finish: FinishReason) -> None:
        """A choice has ended without another token."""
        self._piece(run, choice, len(choice.tokens)).finish = finish

    def fail(self, run: Run, error: LlmosError) -> None:
        """A run is given up."""
        self._pieces = {key: piece for key, piece in self._pieces.items() if piece.run is not run}
        attempt = run.attempt
        self._failures.append(Failure(attempt.request_id, attempt.epoch, error.code, error.message, error.param or ""))

    def stage(self, run: Run, stage: Stage, tokens: int, now: float) -> None:
        """A stage of the run ends now; the next one begins."""
        start = now if run.since_s is None else run.since_s
        run.since_s = now
        self._stages.append(StageDone(run.attempt.request_id, run.attempt.epoch, stage, start, now, tokens))

    def result(self, cache: Sequence[CacheChange] = ()) -> StepResult:
        """All of it."""
        return StepResult([piece.output() for piece in self._pieces.values()], self._failures, self._stages, cache)

    def _piece(self, run: Run, choice: Choice, index: int) -> _Piece:
        key = (run.attempt.request_id, choice.number)
        if key not in self._pieces:
            self._pieces[key] = _Piece(run, choice.number, index, run.take_cached())
        return self._pieces[key]
