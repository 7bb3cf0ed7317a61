"""Continuous batching of one model: admit and cancel between steps, one forward pass per step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmos.clock import Clock
from llmos.errors import (
    InternalError,
    InvalidConstraint,
    InvalidRequest,
    PromptTooLong,
    Unavailable,
    UnsoundOutput,
    UnsupportedFeature,
)
from worker.backend import Attempt, Blocks, CacheChange, Footprint, Stage, StepResult, Task
from worker.engine.attention import KVRow
from worker.engine.batch import PREFILL_TOKENS, Batch, Picker, plan
from worker.engine.blocks import BlockManager
from worker.engine.draft import Drafting
from worker.engine.footprint import fixed_bytes
from worker.engine.grammar.grammars import Grammars
from worker.engine.kv import BLOCK_TOKENS, block_bytes
from worker.engine.lora import Adapter, Adapters
from worker.engine.paged import Servable
from worker.engine.preparing import Preparing
from worker.engine.report import Report
from worker.engine.roster import Roster
from worker.engine.run import Run
from worker.engine.sampling import Pick, SamplingRow, sample

_VERDICT_S = 0.01
"""How long a step that has nothing to compute waits for a constraint."""


def kv_blocks(decoder: Servable, memory_budget: int) -> int:
    """KV blocks that fit beside weights and workspace in `memory_budget` bytes. Raises Unavailable if none does."""
    per_block = block_bytes(decoder.layers, decoder.kv_dtype)
    fixed = decoder.weight_bytes + decoder.workspace_bytes
    count = (memory_budget - fixed) // per_block
    if count < 1:
        raise Unavailable(f"The model needs at least {fixed + per_block} bytes of memory, not {memory_budget}.")
    return count


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the step loop works. Nothing of it changes what a request yields."""

    max_running: int = 64
    """Most choices that run at once; a single attempt may have more."""
    drafting: bool = True
    """Guess tokens that repeat earlier text, where that pays."""


class Engine:
    """Owns a model, its KV memory and its attempts. Called by one thread.

    `name` is the model's, for what is reported; `grammars` its own, None if its output cannot be constrained.
    """

    def __init__(
        self,
        decoder: Servable,
        blocks: int,
        clock: Clock,
        *,
        name: str = "",
        options: EngineOptions | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        options = options or EngineOptions()
        self._decoder = decoder
        self._clock = clock
        self._name = name
        self._manager = BlockManager(blocks)
        self._paged = decoder.with_memory(blocks)
        self._adapters = Adapters(decoder)
        self._roster = Roster(self._manager, self._paged.memory, options.max_running)
        self._drafting = Drafting() if options.drafting else None
        self._grammars = grammars
        self._preparing = Preparing()
        self._arrivals = itertools.count()
        self._changes = itertools.count(1)

    @property
    def preemptions(self) -> int:
        """How often an attempt had to give way and wait again."""
        return self._roster.preemptions

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Make an adapter usable, in place of one of the same name. Raises SourceError if it does not fit the model."""
        self.drop_adapter(name)
        self._adapters.load(name, adapter)

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; its attempts are cancelled. An unknown name is ignored."""
        for run in [*self._roster.runs, *self._preparing.runs]:
            if run.attempt.adapter == name:
                self._forget(run)
        self._adapters.drop(name)

    def footprint(self, grown: int) -> Footprint:
        """What it takes, if loading it made the process larger by `grown` bytes."""
        decoder = self._decoder
        weights = fixed_bytes(getattr(decoder, "model", None), decoder.weight_bytes, grown)
        return Footprint(weights + decoder.workspace_bytes, block_bytes(decoder.layers, decoder.kv_dtype))

    def blocks(self) -> Blocks:
        """KV blocks, as of now. Those that only the prefix cache keeps are free."""
        return Blocks(self._manager.total, self._manager.free, BLOCK_TOKENS)

    def busy(self) -> bool:
        """Whether any attempt waits or runs."""
        return bool(self._roster or self._preparing)

    @property
    def computing(self) -> bool:
        """Whether a step has something to compute, and not only verdicts on constraints to wait for."""
        return bool(self._roster)

    def epoch(self, request_id: str) -> tuple[int, int] | None:
        """Epoch of the request's attempt here, if there is one."""
        run = self._find(request_id)
        return None if run is None else run.epoch

    def admit(self, attempt: Attempt) -> None:
        """Queue an attempt of a request that has none here. Raises InvalidRequest (or a leaf of it) or Unavailable."""
        _check(attempt, self._decoder)
        self._adapters.check(attempt.adapter)
        run = Run(attempt, self._decoder.end_tokens, next(self._arrivals))
        if run.blocks_at(attempt.max_tokens) > self._manager.total:
            raise Unavailable("The request needs more KV blocks than this worker has.")
        if attempt.constraint is None:
            self._roster.add(run)
        elif self._grammars is None:
            raise UnsupportedFeature("This model's output cannot be constrained.", param="constraint")
        else:
            self._preparing.add(run, self._grammars.prepare(attempt, attempt.constraint))

    def cancel(self, request_id: str, choice: int | None, keep_until: int | None) -> None:
        """See `Backend.cancel`."""
        run = self._find(request_id)
        if run is None:
            return
        if choice is None:
            self._forget(run)
        elif choice in run.choices:
            run.choices[choice].keep_until = keep_until or 0
            run.drop_satisfied(run.choices[choice])
            if not run.choices:
                self._forget(run)

    def set_priority(self, request_id: str, priority: int) -> None:
        """See `Backend.set_priority`."""
        if (run := self._roster.find(request_id)) is not None:
            self._roster.set_priority(run, priority)
        elif (run := self._preparing.find(request_id)) is not None:
            run.set_priority(priority)

    def close(self) -> None:
        """Nothing more is asked of it."""
        if self._grammars is not None:
            self._grammars.close()

    @torch.inference_mode()
    def step(self, *, patient: bool = True) -> StepResult:
        """Start what fits, compute one batch, pick tokens.

        `patient`: if there is nothing to compute, wait a moment for verdicts on constraints.
        """
        report = Report()
        self._queue_prepared(report, patient)
        begun = self._clock.monotonic()
        self._start_waiting(report)
        batch = self._plan()
        if batch.spans:
            pickers = list(batch.pickers())
            logits = self._forward(batch, [row for picker in pickers for row in picker.rows])
            batch.computed()
            self._end_prefills(report)
            self._pick(pickers, logits, report)
            self._end_runs(report)
            if self._drafting is not None and batch.decodes:
                self._drafting.cost.add(logits.shape[0], self._clock.monotonic() - begun)
        return report.result(self._cache_changes())

    def _queue_prepared(self, report: Report, patient: bool) -> None:
        if patient and not self.computing:
            self._preparing.wait(_VERDICT_S)
        for run, error in self._preparing.ready():
            if error is None:
                self._roster.add(run)
            else:
                report.fail(run, error)

    def _start_waiting(self, report: Report) -> None:
        for run in self._roster.start():
            if run.since_s is None:
                run.since_s = self._clock.monotonic()
            for choice, reason in run.ended():
                report.end(run, choice, reason)
                run.drop(choice)
            if not run.choices:
                self._roster.forget(run)

    def _plan(self) -> Batch:
        running = self._roster.running
        for run in running:
            run.adopt()
        if self._drafting is None:
            batch = plan(running)
        else:
            self._drafting.begin(running, PREFILL_TOKENS)
            batch = plan(running, self._drafting.propose)
        self._roster.make_room(batch)
        return batch

    def _forward(self, batch: Batch, wanted: Sequence[int]) -> Tensor:
        spans = batch.spans
        return self._paged.forward(
            [token for span in spans for token in span.tokens],
            [position for span in spans for position in range(span.first, span.end)],
            [KVRow(span.kv.slots, position + 1) for span in spans for position in range(span.first, span.end)],
            wanted,
            self._adapters.rows(span.run.attempt.adapter for span in spans for _ in range(span.first, span.end)),
        )

    def _pick(self, pickers: Sequence[Picker], logits: Tensor, report: Report) -> None:
        """Give each choice its token, and the following ones for as long as they are what was guessed."""
        starts = itertools.accumulate((len(picker.rows) for picker in pickers), initial=0)
        going = list(zip(starts, pickers, strict=False))
        depth = 0
        while going:
            rows = [start + depth for start, _ in going]
            # Indexing copies, which a step without drafts can do without.
            picks = sample(
                logits if len(rows) == logits.shape[0] else logits[rows], [_sampling_row(picker) for _, picker in going]
            )
            going = [
                entry
                for entry, pick in zip(going, picks, strict=True)
                if self._take(entry[1], pick, report) and entry[1].guessed(depth, pick)
            ]
            depth += 1

    def _take(self, picker: Picker, pick: Pick | None, report: Report) -> bool:
        """Give a choice a token. Returns whether it goes on."""
        run, choice = picker.run, picker.choice
        if self._roster.find(run.attempt.request_id) is not run:
            return False
        try:
            if pick is None:
                raise UnsoundOutput("The model gave logits that are not numbers.")
            run.append(choice, pick.token_id)
        except (UnsoundOutput, InternalError, InvalidConstraint) as error:
            report.fail(run, error)
            self._roster.forget(run)
            return False
        reason = run.finish(choice)
        report.token(run, choice, pick, reason)
        if reason is not None:
            run.drop(choice)
        return reason is None and not run.drop_satisfied(choice)

    def _find(self, request_id: str) -> Run | None:
        return self._roster.find(request_id) or self._preparing.find(request_id)

    def _forget(self, run: Run) -> None:
        if self._preparing.find(run.attempt.request_id) is run:
            self._preparing.forget(run)
        else:
            self._roster.forget(run)

    def _end_prefills(self, report: Report) -> None:
        for run in self._roster.running:
            if not run.prefilled and not run.catching_up:
                run.prefilled = True
                report.stage(run, Stage.PREFILL, run.prefill_tokens, self._clock.monotonic())

    def _end_runs(self, report: Report) -> None:
        for run in self._roster.running:
            if not run.choices:
                self._roster.forget(run)
                report.stage(run, Stage.DECODE, run.produced, self._clock.monotonic())

    def _cache_changes(self) -> Sequence[CacheChange]:
        stored, removed = self._manager.take_changes()
        return [CacheChange(self._name, next(self._changes), stored, removed)] if stored or removed else ()


def _sampling_row(picker: Picker) -> SamplingRow:
    run, choice = picker.run, picker.choice
    row = SamplingRow(run.attempt.sampling, choice.number, run.prompt, choice.tokens, run.barred(choice))
    return row if choice.matcher is None else replace(row, allowed=choice.matcher.allowed(row.barred), barred=())


def _check(attempt: Attempt, decoder: Servable) -> None:
    """What would break a step for everybody must not get into one."""
    if attempt.task is not Task.GENERATE:
        raise UnsupportedFeature(f"The model does not {attempt.task.value}.", param="model")
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
