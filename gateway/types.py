"""What moves inside the gateway: a validated request goes in, events come out. Values only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from llmos.keys import Priority
from llmos.tenants import TenantLimits

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks: what an API key stands for."""

    tenant: str
    role: Literal["user", "operator"] = "user"
    priority: Priority = "standard"
    """The best class that its requests may have."""
    limits: TenantLimits = field(default_factory=TenantLimits)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What every choice must look like."""

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    field: str
    """What the client called it."""
    text: str = ""
    """The schema or the regular expression."""
    texts: tuple[str, ...] = ()
    """What to choose from."""


@dataclass(frozen=True, slots=True)
class Params:
    """Generation parameters within their bounds (`protos/llmos/v1/inference.proto` names them); defaults filled in."""

    max_tokens: int | None = None
    """None: what the context leaves."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """None: drawn by the session."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    """None: not reported; k: the chosen token's and the k likeliest ones'."""
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a client already holds of one choice."""

    choice: int
    token_ids: tuple[int, ...]
    text_chars: int
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """How far a client has come with one choice of a stream that it comes back to."""

    choice: int
    tokens: int
    chars: int
    """Characters of its text."""
    ended: bool = False
    """It has the choice's finish reason."""


@dataclass(frozen=True, slots=True)
class View:
    """How an answer is shown over HTTP: what another gateway must know to go on in the same way."""

    stream: bool = True
    include_usage: bool = False
    tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    always_reason: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A valid request from HTTP or gRPC. Exactly one of `turns`, `text`, `token_ids` is set."""

    kind: Literal["chat", "completion"]
    model: str
    params: Params
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    resume: tuple[Progress, ...] = ()
    resume_request_id: str = ""
    deadline_s: float | None = None
    """Seconds that the client is willing to wait for the whole answer."""
    priority: Priority | None = None
    """The class that is asked for; None: the key's."""
    view: View | None = None
    """For whoever goes on with the stream; None: it was not asked for over HTTP."""
    is_part: bool = False
    """One of several that share an answer: such a stream cannot be taken up."""


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """A text, or a pair of them, whose vector, labels or score are wanted. One of `text` and `token_ids` is set.

    A pair is `text` and `second`.
    """

    kind: Literal["embed", "classify", "score"]
    model: str
    text: str | None = None
    second: str | None = None
    token_ids: tuple[int, ...] | None = None
    truncate: int | None = None
    """Cut to so many tokens, special ones included; -1: to what the model takes; None: refuse what is longer. Of a pair
    the second text is cut."""
    param: str = "input"
    """Where the text came from, for refusals."""
    deadline_s: float | None = None
    """Seconds that the client is willing to wait."""

    @property
    def params(self) -> Params:
        """Nothing is sampled."""
        return _NO_ANSWER

    @property
    def priority(self) -> Priority | None:
        """The key's."""
        return None

    @property
    def resume(self) -> tuple[Progress, ...]:
        """There is nothing that a client could hold in part."""
        return ()

    @property
    def resume_request_id(self) -> str:
        """Never the continuation of another one."""
        return ""


_NO_ANSWER = Params(max_tokens=1, temperature=0.0, seed=0)


@dataclass(frozen=True, slots=True)
class TraceHeaders:
    """W3C trace context as it came with the request; empty if none did."""

    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's likelihood; `top` holds the likeliest ones in its place, their own `top` empty."""

    token_id: int
    text: str
    raw: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the request is accepted."""

    request_id: str
    model: str
    model_version: str
    seed: int
    created_unix_s: int
    prompt_tokens: int
    priority: Priority = "standard"
    """The class that it got."""


@dataclass(slots=True)
class Delta:
    """New output of one choice. `index` is the position of the first of `token_ids` within the choice.

    `text` may be empty while a character or a possible stop string is incomplete. Concatenated over a choice's deltas,
    `text` is its whole text: the same bytes whatever failed on the way. Nobody changes one; frozen, each token would
    cost a microsecond more.
    """

    choice: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    values: Sequence[float] = ()
    """Result of a TaskRequest, in its only delta."""
    parts: Sequence[str] = field(default=(), compare=False)
    """What each of `token_ids` added to the text; what is left of `text` came with the end. Empty: not known."""


@dataclass(frozen=True, slots=True)
class Done:
    """Last event: every choice has ended."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


Event = Started | Delta | Done


class Sink(Protocol):
    """Takes deltas as they arrive, without a task that must be woken for each."""

    def push(self, delta: Delta) -> bool:
        """Take it at once; False: not now, and then it comes through `Generation.events`. Must not block or raise."""
        ...


class Generation(Protocol):
    """A running request. Owned by the caller, who must iterate to the end or call `aclose`, which cancels it."""

    request_id: str

    def events(self) -> AsyncIterator[Event]:
        """Started, deltas, Done. Raises `LlmosError`; a stream never ends silently."""
        ...

    def feed(self, sink: Sink) -> None:
        """Offer deltas to `sink` while the reader of `events` waits for the next one. Order is kept; it may be ignored,
        and then all comes through `events`."""
        ...

    async def aclose(self, reason: str = "client_gone") -> None:
        """Cancel if still running; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A stream that its client came back to."""

    generation: Generation
    kind: str
    """`chat` or `completion`."""
    model: str
    view: View
    """How it was first shown."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model."""

    name: str
    version: str
    context_length: int
    capabilities: frozenset[str]
    created_unix_s: int
    base_model: str = ""
    """Adapters: name of the model that it applies to."""
    labels: tuple[str, ...] = ()
    """Classifiers: what each value of a TaskRequest stands for."""
    dimensions: tuple[int, ...] = ()
    """Embedding models: lengths of vectors that may be asked for, the model's own first."""


class Engine(Protocol):
    """What the edges (HTTP and gRPC) ask of the session layer."""

    async def generate(
        self, request: GenerationRequest | TaskRequest, identity: Identity, *, request_id: str, trace: TraceHeaders
    ) -> Generation:
        """Render, tokenize, submit. `request_id` is empty or the client's own. Raises `LlmosError` at once."""
        ...

    async def take_up(
        self,
        request_id: str,
        identity: Identity,
        held: Sequence[Held],
        *,
        trace: TraceHeaders,
        deadline_s: float | None = None,
    ) -> TakenUp:
        """Go on with a stream of the same tenant, wherever it ran: its deltas after what the client holds. Raises
        NotFound where nothing is remembered of it, and other `LlmosError`s."""
        ...

    async def cancel(self, request_id: str, identity: Identity) -> bool:
        """Cancel a request of the same tenant; whether it was running."""
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Served models in order of name."""
        ...

    def ready(self) -> bool:
        """A leader is connected and at least one model is served."""
        ...


class Authenticator(Protocol):
    """Who a client is, by what it shows."""

    def authenticate(self, authorization: str | None) -> Identity:
        """The identity behind an `Authorization` header or metadata value. Raises Unauthenticated."""
        ...
