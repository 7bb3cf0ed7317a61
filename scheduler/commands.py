"""What the core wants done. The shell carries commands out in order; none of them has an answer."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2


@dataclass(frozen=True, slots=True)
class SendOutput:
    """Append to the next frame of a gateway's stream."""

    stream_id: int
    output: request_pb2.Output


@dataclass(frozen=True, slots=True)
class SendFailure:
    """Append to the next frame of a gateway's stream."""

    stream_id: int
    failure: request_pb2.Failure


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
    """Send a dispatch. The shell opens the attempt's span first and writes its context into `dispatch.trace`."""

    worker_id: str
    dispatch: work_pb2.Dispatch


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


@dataclass(frozen=True, slots=True)
class AttemptOver:
    """Note for traces: an attempt ended. `error` is empty if the request ended well with it."""

    request_id: str
    error: str
    tokens: int


@dataclass(frozen=True, slots=True)
class RequestOver:
    """Note for traces: a request is gone, whether it waited or ran. Comes exactly once per accepted request."""

    request_id: str
    error: str


Command = (
    SendOutput
    | SendFailure
    | SendCatalogue
    | CloseStream
    | Dial
    | HangUp
    | StartAttempt
    | Order
    | Queued
    | FirstToken
    | AttemptOver
    | RequestOver
)
