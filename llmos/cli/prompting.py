"""Asking a served model: which one, in what form, and the pieces of its answer. Slow to import."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos.cli.connection import CALL_TIMEOUT_S, Connection
from llmos.errors import ConfigError, InvalidRequest, ModelNotFound, Unavailable
from llmos.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Settings:
    """How to generate; None leaves it to the gateway's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    timeout_s: float = 600.0
    constraint: pb.Constraint | None = None

    def params(self) -> pb.GenerationParams:
        """As the API takes them."""
        return pb.GenerationParams(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed, constraint=self.constraint
        )


def read_constraint(json_schema: Path | None, regex: str | None, choice: Sequence[str] | None) -> pb.Constraint | None:
    """What the answer must look like, by the flags of these names. Raises InvalidRequest or ConfigError."""
    given = [json_schema is not None, regex is not None, bool(choice)]
    if sum(given) > 1:
        raise InvalidRequest("give one of --json-schema, --regex and --choice", param="constraint")
    if json_schema is not None:
        try:
            return pb.Constraint(json_schema=json_schema.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{json_schema} cannot be read as text", param="json_schema") from error
    if choice:
        return pb.Constraint(choice=pb.ConstraintChoices(texts=choice))
    return None if regex is None else pb.Constraint(regex=regex)


Event = pb.StreamChatResponse | pb.StreamCompleteResponse | pb.ResumeStreamResponse


async def list_models(fleet: Connection, timeout_s: float = CALL_TIMEOUT_S) -> Sequence[pb.ServedModel]:
    """The models that can be asked for now, in order of name."""
    call = fleet.inference.ListModels(pb.ListModelsRequest(), metadata=fleet.metadata, timeout=timeout_s)
    return (await call).models


async def choose_model(fleet: Connection, name: str) -> pb.ServedModel:
    """The served model `name`; the only one that generates text if that is empty.

    Raises ModelNotFound, InvalidRequest (several are served, or others only) or Unavailable (none is).
    """
    served = await list_models(fleet)
    if not served:
        raise Unavailable("the fleet serves no model now: `llmos nodes` shows why")
    names = ", ".join(model.name for model in served)
    if name:
        found = next((model for model in served if model.name == name), None)
        if found is None:
            raise ModelNotFound(f"the fleet does not serve '{name}': choose one of {names}")
        return found
    generating = [model for model in served if "completion" in model.capabilities]
    if len(generating) != 1:
        several = f"{len(generating)} models that generate text" if generating else "no model that generates text"
        raise InvalidRequest(f"the fleet serves {several}: choose one with --model ({names})", param="model")
    return generating[0]


async def stream_chat(
    fleet: Connection, model: str, messages: Sequence[pb.Message], settings: Settings, resume: pb.Resume | None = None
) -> AsyncGenerator[Event, None]:
    """Events of the answer to a conversation, or the rest of them after `resume`; leaving early cancels it."""
    request = pb.StreamChatRequest(model=model, messages=messages, params=settings.params(), resume=resume)
    call = fleet.inference.StreamChat(request, metadata=fleet.metadata, timeout=settings.timeout_s)
    try:
        async for event in call:
            yield event
    finally:
        call.cancel()


async def stream_completion(
    fleet: Connection, model: str, text: str, settings: Settings, resume: pb.Resume | None = None
) -> AsyncGenerator[Event, None]:
    """Events of the continuation of a text, or the rest of them after `resume`; leaving early cancels it."""
    request = pb.StreamCompleteRequest(model=model, text=text, params=settings.params(), resume=resume)
    call = fleet.inference.StreamComplete(request, metadata=fleet.metadata, timeout=settings.timeout_s)
    try:
        async for event in call:
            yield event
    finally:
        call.cancel()


async def take_up(
    fleet: Connection, request: pb.ResumeStreamRequest, settings: Settings
) -> AsyncGenerator[Event, None]:
    """The rest of a stream that broke off, wherever it ran; leaving early cancels it."""
    call = fleet.inference.ResumeStream(request, metadata=fleet.metadata, timeout=settings.timeout_s)
    try:
        async for event in call:
            yield event
    finally:
        call.cancel()


def system_says(text: str) -> pb.Message:
    """Instructions that frame the conversation."""
    return pb.Message(role=pb.ROLE_SYSTEM, content=text)


def user_says(text: str) -> pb.Message:
    """A turn of the person."""
    return pb.Message(role=pb.ROLE_USER, content=text)


def assistant_said(text: str) -> pb.Message:
    """A turn of the model."""
    return pb.Message(role=pb.ROLE_ASSISTANT, content=text)
