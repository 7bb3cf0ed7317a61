"""What the core wants done. The shell carries commands out in order; none of them has an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmos.internal.v1 import journal_pb2, registry_pb2, request_pb2, requests_pb2, work_pb2


@dataclass(slots=True)
class SendOutput:
    """Append to the next frame of a gateway's stream. Made for each piece of output: frozen, it would take longer."""

    stream_id: int
    output: request_pb2.Output


@dataclass(frozen=True, slots=True)
class SendFailure:
    """Append to the next frame of a gateway's stream."""

    stream_id: int
    failure: request_pb2.Failure


@dataclass(frozen=True, slots=True)
class SendClass:
    """Append to the next frame of a gateway's stream: a request is in another class than its gateway says."""

    stream_id: int
    change: requests_pb2.ClassChange


@dataclass(frozen=True, slots=True)
class SendCatalogue:
    """Replace a gateway's catalogue."""

    stream_id: int
    catalogue: requests_pb2.Catalogue


@dataclass(frozen=True, slots=True)
class CloseStream:
    """End a gateway's stream: the gateway has opened another one."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class AnswerTakeUp:
    """Answer a gateway that asked for a stream."""

    call: int
    entry: journal_pb2.JournalEntry | None
    """None: nothing is remembered of it."""
    settled: bool
    """Whether that is certain: until a leader has settled, a gateway may yet bring the stream."""


@dataclass(frozen=True, slots=True)
class SendJournal:
    """Send records of the journal to those who follow it, or the whole of it to one who begins to."""

    records: Sequence[journal_pb2.JournalRecord]
    newcomer: int = 0
    """Its stream; 0: what has changed, for everybody else."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Attach to a worker, and again after every break, until told to hang up."""

    worker_id: str
    address: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """Forget a worker."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Send a dispatch: a request as it stands now. The shell opens the attempt's span first.

    The message is written by whoever sends it, once and where it is sent from: copies of long prompts are most of what
    a decision would cost.
    """

    worker_id: str
    request: request_pb2.Request
    """As submitted; not to be changed."""
    epoch: request_pb2.Epoch
    model_version: str
    adapter_version: str = ""
    resume: Sequence[request_pb2.ChoiceResume] = ()
    """What has been generated so far; replaces the request's own."""
    deadline_ms: int = 0
    """Milliseconds left; 0: no deadline."""
    priority: request_pb2.PriorityClass.ValueType = request_pb2.PRIORITY_CLASS_UNSPECIFIED
    """Class in which it runs; not set: the request's own."""
    expected_s: float = 0.0
    """Note for traces: predicted seconds until its first output."""
    uncached: int = 0
    """Note for traces: tokens to be computed until then."""
    load: int = 0
    """Note for traces: sequences that decode on the worker."""
    reason: str = ""
    """Note for traces: why it begins beside another one; empty: it does not."""

    def write(self, into: work_pb2.Dispatch, trace: request_pb2.TraceContext | None = None) -> None:
        """Fill an empty message. `trace` is the context of the attempt's span."""
        into.epoch.CopyFrom(self.epoch)
        request = into.request
        request.MergeFrom(self.request)
        request.model_version = self.model_version
        if self.priority:
            request.priority = self.priority
        if self.adapter_version:
            request.adapter_version = self.adapter_version
        if request.resume:
            del request.resume[:]
        request.resume.extend(self.resume)
        if self.deadline_ms:
            request.deadline_ms = self.deadline_ms
        if trace is not None:
            into.trace.CopyFrom(trace)

    @property
    def dispatch(self) -> work_pb2.Dispatch:
        """The message, made anew."""
        message = work_pb2.Dispatch()
        self.write(message)
        return message


@dataclass(frozen=True, slots=True)
class Order:
    """Send any other order to a worker."""

    worker_id: str
    command: work_pb2.Command


@dataclass(frozen=True, slots=True)
class Queued:
    """Note for traces: a request begins to wait for a worker."""

    request: request_pb2.Request


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Note for traces: an attempt's prefill is over."""

    request_id: str
    attempt: int
    won: bool = False
    """It was one of two."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Note for traces: a worker's streams go on. One for a few frames, about one stream of them: none per token."""

    request_id: str
    worker_id: str
    model: str
    gap_s: float
    """Since that stream's last output; 0: not known."""
    step_s: float
    """What a step took."""
    expected_s: float
    """What it takes on any worker, under the same load."""
    load: int
    """Sequences that decode there."""


@dataclass(frozen=True, slots=True)
class AttemptOver:
    """Note for traces: an attempt ended. `error` is empty if the request ended well with it."""

    request_id: str
    attempt: int
    error: str
    tokens: int
    lost: bool = False
    """Another one had the first token sooner."""
    at_least: bool = False
    """It was late, and is given up for that: what its stage took so far is the least that it would have taken."""


@dataclass(frozen=True, slots=True)
class RequestOver:
    """Note for traces: a request is gone, whether it waited or ran. Comes exactly once per accepted request."""

    request_id: str
    error: str


@dataclass(frozen=True, slots=True)
class WriteAssignment:
    """Intent: what a worker ought to hold, for etcd. An empty record: the worker is gone, take its record out."""

    record: registry_pb2.AssignmentRecord


Command = (
    SendOutput
    | SendFailure
    | SendClass
    | SendCatalogue
    | CloseStream
    | AnswerTakeUp
    | SendJournal
    | Dial
    | HangUp
    | StartAttempt
    | Order
    | Queued
    | FirstToken
    | Progress
    | AttemptOver
    | RequestOver
    | WriteAssignment
)
