"""Public gRPC messages to and from the gateway's inner types.

Requests become bodies of OpenAI's JSON shape, so that `gateway.validate` gives them the same verdict as over HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.tiers import tier_of
from gateway.types import Delta, Done, Event, Finish, ModelInfo, Started, TokenLogprob
from llmos.errors import InternalError
from llmos.keys import Priority
from llmos.v1 import fleet_pb2
from llmos.v1 import inference_pb2 as pb

_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_FINISH: dict[Finish | None, pb.FinishReason.ValueType] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
_CLASSES: dict[Priority, fleet_pb2.PriorityClass.ValueType] = {
    "interactive": fleet_pb2.PRIORITY_CLASS_INTERACTIVE,
    "standard": fleet_pb2.PRIORITY_CLASS_STANDARD,
    "batch": fleet_pb2.PRIORITY_CLASS_BATCH,
}
_TIERS: dict[fleet_pb2.PriorityClass.ValueType, str] = {number: tier_of(name) for name, number in _CLASSES.items()}
_SINGLE = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "n",
)

ResponseT = TypeVar("ResponseT", pb.ChatResponse, pb.CompleteResponse)
EventT = TypeVar("EventT", pb.StreamChatResponse, pb.StreamCompleteResponse, pb.ResumeStreamResponse)


def chat_body(request: pb.ChatRequest | pb.StreamChatRequest) -> dict[str, object]:
    """The body that says the same over HTTP."""
    body = _params(request.params)
    body["model"] = request.model
    body["messages"] = [_message(message) for message in request.messages]
    if request.params.HasField("logprobs"):
        body |= {"logprobs": True, "top_logprobs": request.params.logprobs}
    return body | _resume(request)


def completion_body(request: pb.CompleteRequest | pb.StreamCompleteRequest) -> dict[str, object]:
    """The body that says the same over HTTP."""
    body = _params(request.params)
    body["model"] = request.model
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "token_ids":
            body["prompt"] = list(request.token_ids.ids)
    if request.params.HasField("logprobs"):
        body["logprobs"] = request.params.logprobs
    return body | _resume(request)


def _params(params: pb.GenerationParams) -> dict[str, object]:
    body: dict[str, object] = {name: getattr(params, name) for name in _SINGLE if params.HasField(name)}  # type: ignore[arg-type]
    if params.logit_bias:
        body["logit_bias"] = {str(token_id): value for token_id, value in params.logit_bias.items()}
    if params.stop:
        body["stop"] = list(params.stop)
    if params.stop_token_ids:
        body["stop_token_ids"] = list(params.stop_token_ids)
    if params.HasField("constraint"):
        body["structured_outputs"] = _constraint(params.constraint)
    if params.service_tier:
        # What is no class is no tier over HTTP either, and is refused alike.
        body["service_tier"] = _TIERS.get(params.service_tier, f"class {int(params.service_tier)}")
    return body


def _constraint(constraint: pb.Constraint) -> dict[str, object]:
    match constraint.WhichOneof("kind"):
        case "json_schema":
            return {"json": constraint.json_schema}
        case "json_object":
            return {"json_object": constraint.json_object}
        case "regex":
            return {"regex": constraint.regex}
        case "choice":
            return {"choice": list(constraint.choice.texts)}
    return {}


def _message(message: pb.Message) -> dict[str, object]:
    body: dict[str, object] = {
        "role": _ROLES.get(message.role, f"role {int(message.role)}"),
        "content": message.content,
    }
    if message.name:
        body["name"] = message.name
    return body


def _resume(request: Any) -> dict[str, object]:
    if isinstance(request, pb.ChatRequest | pb.CompleteRequest) or not request.HasField("resume"):
        return {}
    choices = [
        {
            "choice": held.choice,
            "token_ids": list(held.token_ids),
            "text_chars": held.text_chars,
            "finished": held.finished,
        }
        for held in request.resume.choices
    ]
    return {"resume": choices, "resume_request_id": request.resume.request_id}


def stream_event(event: Event, kind: type[EventT]) -> EventT:
    """One message of a stream."""
    match event:
        case Started():
            start = pb.StreamStart(
                request_id=event.request_id,
                model=event.model,
                model_version=event.model_version,
                seed=event.seed,
                created_unix_s=event.created_unix_s,
                service_tier=_CLASSES[event.priority],
            )
            return kind(start=start)
        case Delta():
            return kind(delta=_delta(event))
        case Done():
            return kind(usage=_usage(event))


@dataclass(slots=True)
class _Gathered:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


async def gather(events: AsyncIterator[Event], kind: type[ResponseT]) -> ResponseT:
    """The whole answer of a stream of events."""
    choices: dict[int, _Gathered] = {}
    started: Started | None = None
    done: Done | None = None
    async for event in events:
        match event:
            case Started():
                started = event
            case Delta():
                _add(choices.setdefault(event.choice, _Gathered()), event)
            case Done():
                done = event
    if started is None or done is None:
        raise InternalError("The answer has no beginning or no end.")
    return kind(
        request_id=started.request_id,
        model=started.model,
        model_version=started.model_version,
        created_unix_s=started.created_unix_s,
        seed=started.seed,
        service_tier=_CLASSES[started.priority],
        choices=[_choice(index, gathered) for index, gathered in sorted(choices.items())],
        usage=_usage(done),
    )


def _add(gathered: _Gathered, delta: Delta) -> None:
    gathered.text.append(delta.text)
    gathered.token_ids.extend(delta.token_ids)
    gathered.logprobs.extend(_logprob(entry) for entry in delta.logprobs)
    gathered.finish = delta.finish


def _choice(index: int, gathered: _Gathered) -> pb.Choice:
    return pb.Choice(
        index=index,
        text="".join(gathered.text),
        finish_reason=_FINISH[gathered.finish],
        logprobs=gathered.logprobs,
        token_ids=gathered.token_ids,
    )


def _delta(delta: Delta) -> pb.Delta:
    return pb.Delta(
        choice=delta.choice,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprob(entry) for entry in delta.logprobs],
        finish_reason=_FINISH[delta.finish],
    )


def _logprob(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=entry.token_id,
        token=entry.text,
        token_bytes=entry.raw,
        logprob=entry.logprob,
        top=[_logprob(other) for other in entry.top],
    )


def _usage(done: Done) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=done.prompt_tokens,
        completion_tokens=done.completion_tokens,
        cached_tokens=done.cached_tokens,
    )


def served_model(model: ModelInfo) -> pb.ServedModel:
    """A row of ListModels."""
    return pb.ServedModel(
        name=model.name,
        version=model.version,
        context_length=model.context_length,
        capabilities=sorted(model.capabilities),
        created_unix_s=model.created_unix_s,
        base_model=model.base_model,
    )
