"""Between the wire and the backend: protobuf messages to `worker.backend` values and back. Pure."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.telemetry import REQUEST_ID
from llmos.v1 import fleet_pb2, inference_pb2
from worker.backend import (
    Attempt,
    Blocks,
    CacheChange,
    Constraint,
    Epoch,
    Failure,
    FinishReason,
    Footprint,
    ModelSpec,
    Output,
    Sampling,
    StageDone,
    Task,
    TokenLogprob,
)

TERM, ATTEMPT, TOKENS = "llmos.term", "llmos.attempt", "llmos.tokens"
"""Span attributes that say which attempt a stage belongs to, and how many tokens it computed."""

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


_UNKNOWN = Footprint()
_STANDARD = 1
_PRIORITY = {
    request_pb2.PRIORITY_CLASS_INTERACTIVE: 0,
    request_pb2.PRIORITY_CLASS_STANDARD: _STANDARD,
    request_pb2.PRIORITY_CLASS_BATCH: 2,
}
_TASK = {
    request_pb2.TASK_EMBED: Task.EMBED,
    request_pb2.TASK_CLASSIFY: Task.CLASSIFY,
    request_pb2.TASK_SCORE: Task.SCORE,
}


def epoch_from_wire(epoch: request_pb2.Epoch) -> Epoch:
    """An attempt's identity."""
    return Epoch(epoch.term, epoch.attempt)


def epoch_to_wire(epoch: Epoch) -> request_pb2.Epoch:
    """An attempt's identity."""
    return request_pb2.Epoch(term=epoch.term, attempt=epoch.attempt)


def priority_from_wire(priority: int) -> int:
    """A class of service, as `Attempt.priority` has it."""
    return _PRIORITY.get(request_pb2.PriorityClass.ValueType(priority), _STANDARD)


def attempt_from_wire(dispatch: work_pb2.Dispatch) -> Attempt:
    """The attempt that a dispatch begins."""
    request = dispatch.request
    return Attempt(
        request_id=request.request_id,
        epoch=epoch_from_wire(dispatch.epoch),
        model=request.model,
        prompt=tuple(request.token_ids),
        max_tokens=request.max_tokens,
        choices=max(1, request.choices),
        sampling=_sampling_from_wire(request.sampling),
        stop_token_ids=frozenset(request.stop_token_ids),
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        resume={entry.choice: tuple(entry.token_ids) for entry in request.resume},
        finished_choices=frozenset(entry.choice for entry in request.resume if entry.finished),
        prefix_hashes=tuple(request.prefix_hashes),
        priority=priority_from_wire(request.priority),
        adapter=request.adapter,
        constraint=_constraint_from_wire(request.constraint),
        task=_TASK.get(request.task, Task.GENERATE),
        first_text_tokens=request.first_text_tokens,
    )


def _constraint_from_wire(constraint: inference_pb2.Constraint) -> Constraint | None:
    match constraint.WhichOneof("kind"):
        case "json_schema":
            return Constraint("json_schema", constraint.json_schema)
        case "json_object":
            return Constraint("json_object")
        case "regex":
            return Constraint("regex", constraint.regex)
        case "choice":
            return Constraint("choice", texts=tuple(constraint.choice.texts))
    return None


def _sampling_from_wire(sampling: request_pb2.Sampling) -> Sampling:
    return Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def add_output(frame: work_pb2.WorkFrame, output: Output) -> None:
    """Append a piece of output. Only what is set is touched: most pieces are one bare token."""
    piece = frame.outputs.add(
        request_id=output.request_id, choice=output.choice, index=output.index, token_ids=output.token_ids
    )
    epoch, own = piece.epoch, output.epoch
    epoch.term, epoch.attempt = own.term, own.attempt
    if output.finish is not None:
        piece.finish_reason = _FINISH[output.finish]
    if output.cached_tokens:
        piece.cached_tokens = output.cached_tokens
    if output.logprobs:
        piece.logprobs.extend(map(_logprob_to_wire, output.logprobs))
    if len(output.values):
        piece.values.extend(output.values)


def _logprob_to_wire(entry: TokenLogprob) -> request_pb2.LogprobEntry:
    return request_pb2.LogprobEntry(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_token_ids=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def failure_to_wire(failure: Failure) -> request_pb2.Failure:
    """An attempt that was given up."""
    return request_pb2.Failure(
        request_id=failure.request_id,
        epoch=epoch_to_wire(failure.epoch),
        code=failure.code,
        message=failure.message,
        param=failure.param,
    )


def cache_to_wire(change: CacheChange) -> work_pb2.CacheChange:
    """A change of a prefix cache."""
    return work_pb2.CacheChange(model=change.model, number=change.number, stored=change.stored, removed=change.removed)


def stage_to_wire(stage: StageDone) -> fleet_pb2.Span:
    """A stage as a span without trace and parent, which the RPC process knows. Times: monotonic ns."""
    return fleet_pb2.Span(
        name=f"engine.{stage.stage.value}",
        start_unix_ns=int(stage.start_s * 1e9),
        end_unix_ns=int(stage.end_s * 1e9),
        attributes={
            REQUEST_ID: stage.request_id,
            TERM: str(stage.epoch.term),
            ATTEMPT: str(stage.epoch.attempt),
            TOKENS: str(stage.tokens),
        },
    )


def stage_epoch(span: fleet_pb2.Span) -> tuple[str, Epoch]:
    """Which attempt a stage of `stage_to_wire` belongs to: request id and epoch."""
    attributes = span.attributes
    return attributes[REQUEST_ID], Epoch(int(attributes[TERM]), int(attributes[ATTEMPT]))


def loaded_to_wire(
    spec: ModelSpec, blocks: Blocks, taken: Footprint = _UNKNOWN, load_ms: int = 0
) -> fleet_pb2.NodeModel:
    """A loaded model's state, and what it takes."""
    return fleet_pb2.NodeModel(
        name=spec.name,
        version=spec.version,
        state=fleet_pb2.MODEL_STATE_LOADED,
        total_blocks=blocks.total,
        free_blocks=blocks.free,
        measured_fixed_bytes=taken.fixed,
        measured_bytes=taken.fixed + blocks.total * taken.per_block,
        load_ms=load_ms,
    )
