"""Bodies of OpenAI's API as msgspec structures: types and bounds of single fields.

The bounds are those that `protos/llmos/v1/inference.proto` names. What concerns several fields at once is in
`gateway.validate`. `null` means "not given", as in OpenAI's API.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gateway.tiers import Tier

MAX_MESSAGES = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_CHOICES = 16
MAX_TOKEN_IDS = 1 << 20
MAX_TEXT_CHARS = 1 << 22
"""Characters of all messages, or of all prompts, together."""
MAX_SEED = (1 << 64) - 1
MIN_SEED = -(1 << 63)
"""OpenAI's seeds are signed; a negative one stands for itself modulo 2**64."""

UInt32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Count = Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
TokenIds = Annotated[list[UInt32], Meta(max_length=MAX_TOKEN_IDS)]

ChatRole = Literal["system", "developer", "user", "assistant", "tool"]

LEAST_REPETITION_PENALTY = 0.0099
"""A little below the promised 0.01, which gRPC's float32 rounds down."""


class StreamOptions(Struct, kw_only=True, frozen=True):
    """How a stream is delivered."""

    include_usage: bool | None = None
    always_finish_reason: bool | None = None
    """Completions: a placeholder in the place of null on every event before a choice's last one."""


class TextPart(Struct, kw_only=True, frozen=True):
    """One part of a message's content. Only text has a meaning here."""

    type: str
    text: str | None = None


class Message(Struct, kw_only=True, frozen=True):
    """One turn of a conversation."""

    role: ChatRole
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_MESSAGES)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None


class ResumedChoice(Struct, kw_only=True, frozen=True):
    """What a client already holds of one choice of a broken stream."""

    choice: Annotated[int, Meta(ge=0, lt=MAX_CHOICES)]
    token_ids: TokenIds = []
    text_chars: UInt32 = 0
    finished: bool = False


class NamedSchema(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A JSON schema as `response_format` has it. Output always keeps to the schema, strict or not."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """OpenAI's way to say what an output must look like."""

    type: str
    json_schema: NamedSchema | None = None


class StructuredOutputs(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """vLLM's way to say what an output must look like: one of these."""

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class GenerationBody(Struct, kw_only=True, frozen=True):
    """What chat and completion bodies have in common."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Tier | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=LEAST_REPETITION_PENALTY, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[UInt32], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: UInt32 | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    resume: Annotated[list[ResumedChoice], Meta(max_length=MAX_CHOICES)] | None = None
    resume_request_id: Annotated[str, Meta(max_length=128)] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_reasons(self) -> bool:
        """Whether every event of a streamed completion is to carry a finish reason."""
        return self.stream_options is not None and bool(self.stream_options.always_finish_reason)


class ChatBody(GenerationBody, kw_only=True, frozen=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None


class CompletionBody(GenerationBody, kw_only=True, frozen=True):
    """Body of `POST /v1/completions`."""

    prompt: str | Annotated[list[UInt32 | str | TokenIds], Meta(max_length=MAX_TOKEN_IDS)]
    logprobs: TopLogprobs | None = None
