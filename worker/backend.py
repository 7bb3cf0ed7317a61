"""What a worker's engine process asks of a backend: load models, admit attempts, take one step at a time.

Values only: no grpc, no protobuf, no torch. `echo` and `torch` implement `Backend`, `worker/engine_process.py` drives
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, Protocol

from llmos.store.precision import PrecisionPlan


class FinishReason(Enum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Epoch:
    """Identity of an attempt: the leader's term (etcd revision of its election) and the attempt's number in it."""

    term: int
    attempt: int

    def after(self, other: Epoch) -> bool:
        """Whether this epoch is the higher one: by term, then attempt."""
        return (self.term, self.attempt) > (other.term, other.attempt)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is picked. Neutral values switch a step off."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to a value added to its logit."""
    seed: int = 0
    """64 bits; randomness is a pure function of (seed, choice, index)."""
    logprobs: int | None = None
    """None: no logprobs; k >= 0: the chosen token's and the k likeliest ones'."""


class Task(Enum):
    """What is asked of a model."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"
    SCORE = "score"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What every choice must look like."""

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    text: str = ""
    """The schema or the regular expression."""
    texts: tuple[str, ...] = ()
    """What to choose from."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a request: the request plus what has already been generated."""

    request_id: str
    epoch: Epoch
    model: str
    prompt: Sequence[int]
    max_tokens: int
    """Per choice, tokens of `resume` included."""
    choices: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    """Besides the model's own end tokens. The stop token is the last token delivered."""
    min_tokens: int = 0
    """No stop token is sampled before this many tokens."""
    ignore_eos: bool = False
    resume: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Choice to the token ids produced so far; the next token's index is their number."""
    finished_choices: frozenset[int] = frozenset()
    """Choices that already ended; they are not computed again."""
    prefix_hashes: Sequence[int] = ()
    """One salted hash of 64 bits per full block of the prompt; each covers all tokens up to its block's end."""
    priority: int = 1
    """0 interactive, 1 standard, 2 batch; lower goes first."""
    adapter: str = ""
    """Name of the LoRA adapter to apply; empty: none."""
    constraint: Constraint | None = None
    task: Task = Task.GENERATE
    first_text_tokens: int = 0
    """Other tasks: length of the first of two texts in `prompt`; 0: there is one text."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the chosen token's probability, and of the likeliest ones, most likely first."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(slots=True)
class Output:
    """Tokens of one choice from one step. `index` is the position of the first of them within the choice.

    Nobody changes one; frozen, making it would take several times as long, for each token.
    """

    request_id: str
    epoch: Epoch
    choice: int
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()
    """Empty, or one per token."""
    finish: FinishReason | None = None
    values: Sequence[float] = ()
    """Result of a task other than generation."""
    cached_tokens: int = 0
    """On an attempt's first output: prompt tokens found in the prefix cache."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that the backend gave up. `code` is one of `llmos.errors`."""

    request_id: str
    epoch: Epoch
    code: str
    message: str
    param: str = ""
    """The offending field, if any."""


class Stage(Enum):
    """Stages of an attempt inside the engine."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class StageDone:
    """A stage that ended. Times are monotonic seconds of the engine process's host (CLOCK_MONOTONIC)."""

    request_id: str
    epoch: Epoch
    stage: Stage
    start_s: float
    end_s: float
    tokens: int
    """Prompt tokens computed (prefill) or tokens produced (decode), all choices together."""


@dataclass(frozen=True, slots=True)
class CacheChange:
    """Blocks that a model's prefix cache has taken in or dropped, by hash. `number` counts from 1 per loaded model."""

    model: str
    number: int
    stored: Sequence[int] = ()
    removed: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """All that one step produced."""

    outputs: Sequence[Output] = ()
    failures: Sequence[Failure] = ()
    stages: Sequence[StageDone] = ()
    cache: Sequence[CacheChange] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model version to load. `folder` holds safetensors, tokenizer and config; None for echo."""

    name: str
    version: str
    folder: Path | None = None
    weight_bytes: int = 0
    """Declared bytes of weights on the device; echo has no others."""
    kv_bytes_per_token: int = 0
    """Declared KV bytes per token of one sequence."""
    context_length: int = 0
    """Most tokens of prompt and answer together; 0: the files say."""
    base: str = ""
    """A LoRA adapter: name of the loaded model that it belongs to. It has no KV blocks of its own."""
    plan: PrecisionPlan | None = None
    """The version's own; None: it has none, and is computed in fp32."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """KV blocks of one loaded model; a block holds `block_tokens` tokens of one sequence."""

    total: int
    free: int
    block_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a loaded model takes. Nothing: not known."""

    fixed: int = 0
    """Weights, as measured, and what is set aside for the workspace of a step."""
    per_block: int = 0
    """Of one KV block."""


class Backend(Protocol):
    """Owned and called by one thread of the engine process; nothing here may block longer than one step."""

    def load(self, spec: ModelSpec, memory_budget: int) -> Blocks:
        """Load weights and lay out KV blocks within `memory_budget` bytes. Raises `LlmosError` if it cannot.

        An adapter (`spec.base`) becomes usable by the attempts at its base that name it; it has no blocks.
        """
        ...

    def unload(self, name: str) -> None:
        """Forget a model with its adapters, or an adapter; its attempts are cancelled. An unknown name is ignored.

        Its memory is free when this returns.
        """
        ...

    def footprint(self, name: str) -> Footprint:
        """What a loaded model takes; nothing for an adapter or an unknown name."""
        ...

    def blocks(self) -> Mapping[str, Blocks]:
        """KV blocks per loaded model, as of now; none for an adapter."""
        ...

    def admit(self, attempt: Attempt) -> None:
        """Take an attempt into the running batch, or queue it until blocks are free.

        Replaces an attempt of the same request with a lower epoch; ignores one with a lower or equal epoch.
        Raises `LlmosError` if the model is not loaded or the attempt can never fit.
        """
        ...

    def cancel(self, request_id: str, choice: int | None = None, keep_until: int | None = None) -> None:
        """Stop a request (or one of its choices) before the next step; idempotent, unknown ids are ignored.

        With `keep_until`, tokens below that index are still wanted: stop the choice only once it has reached it.
        """
        ...

    def set_priority(self, request_id: str, priority: int) -> None:
        """Move a request's attempt to another class (0 interactive, 1 standard, 2 batch); unknown ids are ignored."""
        ...

    def busy(self) -> bool:
        """Whether `step` has anything to compute."""
        ...

    def step(self) -> StepResult:
        """Advance every running sequence by at most one token (or one prefill chunk). Never waits when not busy."""
        ...
