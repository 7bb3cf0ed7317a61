"""A request that waits or runs: the immutable message, what has been produced, and the attempt that produces more."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmos.internal.v1 import request_pb2
from llmos.v1 import inference_pb2
from scheduler.fairness import Account, rank_of
from scheduler.quotas import Usage

if TYPE_CHECKING:
    from scheduler.meters import Cell

BLOCK_TOKENS = 64
"""Tokens of one sequence in a KV block, fleet-wide."""
CLEAR_TOKENS = 8
"""Output after which an attempt is not what ends its engine next, as far as one can tell."""

NOT_FINISHED = inference_pb2.FINISH_REASON_UNSPECIFIED
LENGTH = inference_pb2.FINISH_REASON_LENGTH
STOP = inference_pb2.FINISH_REASON_STOP

ModelKey = tuple[str, str]
"""Name and version of a model."""

_GENERATE = frozenset({"chat", "completion"})
_CAPABILITIES = {
    request_pb2.TASK_EMBED: frozenset({"embed"}),
    request_pb2.TASK_CLASSIFY: frozenset({"classify"}),
    request_pb2.TASK_SCORE: frozenset({"score"}),
}


def capabilities_for(request: request_pb2.Request) -> frozenset[str]:
    """A model can do what is asked if it has one of these."""
    return _CAPABILITIES.get(request.task, _GENERATE)


def answer_tokens(request: request_pb2.Request) -> int:
    """Most tokens of the answer of one choice. Only generation has one."""
    return 0 if request.task in _CAPABILITIES else request.max_tokens


def most_tokens(request: request_pb2.Request) -> int:
    """Of prompt and answer of one choice."""
    return len(request.token_ids) + answer_tokens(request)


def blocks_needed(request: request_pb2.Request, choices: int) -> int:
    """Blocks that `choices` sequences take when each is as long as it may become."""
    return choices * math.ceil(most_tokens(request) / BLOCK_TOKENS)


def mark_of(request: request_pb2.Request) -> str:
    """What makes two requests the same: a digest of tenant, model, adapter and prompt."""
    tokens = struct.pack(f"<{len(request.token_ids)}I", *request.token_ids)
    names = "\0".join((request.tenant, request.model, request.adapter)).encode()
    return hashlib.blake2b(names + b"\0" + tokens, digest_size=16).hexdigest()


@dataclass(slots=True)
class Choice:
    """What has been generated for one choice. The next index is the number of tokens."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[request_pb2.LogprobEntry] = field(default_factory=list)
    """One per token produced in this term, if asked for; `logprobs_from` is the index of the first."""
    logprobs_from: int = 0
    finish_reason: inference_pb2.FinishReason.ValueType = NOT_FINISHED
    finished: bool = False
    keep_until: int | None = None
    """Set: the gateway wants no token from this index on."""
    charged: int = 0
    """Tokens that the tenant was charged for: each index once, however often it is computed."""

    @classmethod
    def resumed(cls, resume: request_pb2.ChoiceResume) -> Choice:
        """A choice as the gateway knows it."""
        tokens = list(resume.token_ids)
        return cls(
            tokens=tokens,
            logprobs_from=len(tokens),
            finish_reason=resume.finish_reason if resume.finished else NOT_FINISHED,
            finished=resume.finished,
            charged=len(tokens),
        )

    def append(self, tokens: Sequence[int], logprobs: Sequence[request_pb2.LogprobEntry]) -> None:
        """Remember output; what a later attempt or a returning gateway needs."""
        self.tokens.extend(tokens)
        if len(logprobs) == len(tokens):  # a last word without tokens included
            self.logprobs.extend(logprobs)
        else:
            self.logprobs.clear()
            self.logprobs_from = len(self.tokens)

    def truncate(self, length: int) -> None:
        """Forget tokens from index `length` on."""
        del self.tokens[length:]
        del self.logprobs[max(0, length - self.logprobs_from) :]
        self.logprobs_from = min(self.logprobs_from, length)

    def since(self, index: int) -> tuple[list[int], list[request_pb2.LogprobEntry]]:
        """Tokens from `index` on with their log-probabilities, the latter empty where they are not known."""
        if index < self.logprobs_from:
            return self.tokens[index:], []
        return self.tokens[index:], self.logprobs[index - self.logprobs_from :]


@dataclass(slots=True)
class Attempt:
    """A dispatch that has neither ended nor been given up."""

    term: int
    number: int
    worker_id: str
    blocks: int
    """KV blocks set aside for it on its worker."""
    model: str
    adapter: str = ""
    """Name of the adapter that it uses; empty: none."""
    promised: int = 0
    """Blocks of them that no frame of the worker reflects yet."""
    produced: int = 0
    """Tokens of this attempt."""
    tenant: str = ""
    sequences: int = 1
    """Choices that it computes."""
    uncached: int = 0
    """Tokens to be computed before its first output, as far as is known when it begins."""
    met: tuple[int, int] = (0, 0)
    """What it found before it: tokens to be computed, and sequences that decoded."""
    begun_at: float = 0.0
    started: bool = False
    """Its first output has come."""
    first_at: float = 0.0
    """When its first token came."""
    expected: Sequence[int] = ()
    """Prefix hashes that count as cached because it is going to cache them."""
    owed: bool = False
    """It began because its class's minimum share was due: it keeps its place."""
    exposed: bool = False
    """It ran already when an engine ended under its request for the first time: if its own ends too, both may have had
    one cause from outside."""
    won: bool = False
    """It was one of two, and had output first."""
    first: bool = False
    """Its request's first one, or the hedge beside that: what it finds cached was not computed for this request."""

    @property
    def settled(self) -> bool:
        """It has got so far that it is not what ends its engine next."""
        return self.produced >= CLEAR_TOKENS * self.sequences

    @property
    def epoch(self) -> request_pb2.Epoch:
        """Its identity on the wire."""
        return request_pb2.Epoch(term=self.term, attempt=self.number)


@dataclass(slots=True)
class LiveRequest:
    """An accepted request until its one end. Owned and changed by the core alone."""

    request: request_pb2.Request
    gateway_id: str
    stream_id: int
    """The stream that it came on last; output goes nowhere else."""
    key: ModelKey
    accepted_at: float
    deadline_at: float
    """Infinite if the client set none."""
    choices: list[Choice]
    prompt_tokens: int
    longest_blocks: int
    """KV blocks of one choice at its longest."""
    attempt: Attempt | None = None
    hedge: Attempt | None = None
    """A second attempt beside `attempt`, on another worker; never once there is output."""
    hedged: bool = False
    """It has had its hedge."""
    attempts: int = 0
    """Number of the last attempt begun; the count goes on where an earlier request of the same id ended."""
    attempts_before: int = 0
    """The count at its beginning."""
    retries: int = 0
    owes_retry: bool = False
    """It pauses until its next try can be paid for."""
    tried: set[str] = field(default_factory=set)
    """Workers that an attempt was lost or failed on."""
    avoid: set[str] = field(default_factory=set)
    """Those of them on which it stalled: none of them is given it again while another could hold it."""
    suspect: bool = False
    """An engine ended under it, and it may be why: it runs beside no other suspect."""
    deaths: int = 0
    """Engines that ended under it since it was last cleared."""
    died_on: set[str] = field(default_factory=set)
    """Workers whose engines they were."""
    fingerprint: str = ""
    """Numerics of the worker that produced the first tokens; empty before."""
    prefix: Sequence[int] = ()
    """Salted hashes of the prompt's full blocks."""
    adapter: ModelKey | None = None
    """The adapter to apply to the model of `key`, whose queue it waits in and whose blocks it takes."""
    rank: int = 1
    """Class of service, 0 the highest; as the request says, until a person changes it."""
    account: Account | None = None
    """Who is charged; set from its first wait on."""
    usage: Usage | None = None
    """What its tenant uses of its quota; None: it has none."""
    waits_since: float = 0.0
    """When it began to wait for the last time."""
    prompt_charged: bool = False
    prompt_inherited: bool = False
    """It was charged by an earlier leader, or in an earlier life of the request."""
    refund: float = 0.0
    """Tokens that are given back as soon as there is an account to give them to."""
    preempted: int = 0
    """How often it lost its place to a higher class."""
    cell: Cell | None = None
    """Where what it produces is counted."""
    output_at: float = 0.0
    """When its last output came; 0: none yet."""
    claim: int = 0
    """How often its client had come back when its present gateway took it up."""
    cached_tokens: int = 0
    """Prompt tokens that its first attempt found in a prefix cache."""
    id: str = field(init=False)
    """The request's id."""
    _mark: str = ""

    def __post_init__(self) -> None:
        self.id = self.request.request_id

    @property
    def mark(self) -> str:
        """See `mark_of`."""
        self._mark = self._mark or mark_of(self.request)
        return self._mark

    @classmethod
    def accept(
        cls, request: request_pb2.Request, gateway_id: str, stream_id: int, key: ModelKey, now: float
    ) -> LiveRequest:
        """A request as submitted, its `resume` taken over."""
        choices = [Choice() for _ in range(request.choices)]
        for resume in request.resume:
            choices[resume.choice] = Choice.resumed(resume)
        deadline = now + request.deadline_ms / 1000 if request.deadline_ms else math.inf
        prefix = tuple(request.prefix_hashes)
        prompt = len(request.token_ids)
        longest = math.ceil((prompt + answer_tokens(request)) / BLOCK_TOKENS)
        live = cls(request, gateway_id, stream_id, key, now, deadline, choices, prompt, longest, prefix=prefix)
        live.rank = rank_of(request.priority)
        # What comes with output was charged by an earlier leader.
        live.prompt_charged = live.prompt_inherited = bool(request.resume)
        return live

    @property
    def running(self) -> list[Attempt]:
        """Its attempts: none, one, or that and its hedge."""
        return [one for one in (self.attempt, self.hedge) if one is not None]

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return all(choice.finished for choice in self.choices)

    @property
    def tokens_out(self) -> int:
        """Tokens produced so far, all choices together."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def tokens_left(self) -> int:
        """Most tokens that are still to come, all choices together."""
        return sum(self.request.max_tokens - len(choice.tokens) for choice in self.choices if not choice.finished)

    @property
    def blocks(self) -> int:
        """KV blocks that the choices still to be computed take at most."""
        return self.longest_blocks * self.open_choices

    @property
    def open_choices(self) -> int:
        """Choices still to be computed."""
        choices = self.choices
        return not choices[0].finished if len(choices) == 1 else [one.finished for one in choices].count(False)

    @property
    def known_tokens(self) -> int:
        """Tokens of the prompt and of choices to be continued: what is computed before the next output."""
        return self.prompt_tokens + sum([len(choice.tokens) for choice in self.choices if not choice.finished])

    def resume(self) -> Iterator[request_pb2.ChoiceResume]:
        """What the next worker must know; choices without output are left out."""
        for index, choice in enumerate(self.choices):
            if choice.tokens or choice.finished:
                yield request_pb2.ChoiceResume(choice=index, token_ids=choice.tokens, finished=choice.finished)

    def end_exhausted(self) -> list[int]:
        """Finish choices that have all their tokens but whose last word was lost; returns their numbers."""
        ended = []
        for index, choice in enumerate(self.choices):
            limit = self.request.max_tokens
            if choice.keep_until is not None:
                limit = min(limit, choice.keep_until)
            if not choice.finished and len(choice.tokens) >= limit:
                choice.finished = True
                choice.finish_reason = LENGTH if choice.keep_until is None else STOP
                ended.append(index)
        return ended
