"""One running request: output comes in from the link's reader, events go out to whoever reads them.

The buffer between the two is bounded: a reader that does not read loses its stream, never the gateway's memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from gateway.remainder import Remainder
from gateway.trace import RequestTrace
from gateway.transcript import Transcript, Verdict
from gateway.types import Delta, Done, Event, Sink, Started
from gateway.values import ValuesTranscript
from llmos.clock import Clock
from llmos.errors import Cancelled, DeadlineExceeded, LlmosError, SlowReader, Unavailable
from llmos.internal.v1 import request_pb2, requests_pb2

_EVENT_BYTES = 96
_TOKEN_BYTES = 40
_LOGPROB_BYTES = 120
_VALUE_BYTES = 4
_SLOW_READER_GRACE_S = 1.0
_BURST = 4
"""So many times the buffer's limit may be exceeded while the reader has its grace."""


class Uplink(Protocol):
    """How a stream speaks to the leader. None of these blocks; `Link` is one."""

    def submit(self, submit: requests_pb2.Submit) -> None:
        """Hand over a request, or one that goes on."""
        ...

    def cancel(self, request_id: str, reason: str, claim: int = 0) -> None:
        """Stop a request."""
        ...

    def finish(self, request_id: str, choice: int, keep_until: int) -> None:
        """End a choice early."""
        ...

    def restart(self) -> None:
        """Output was lost or damaged: open a new connection, which asks for all that is unfinished."""
        ...


class Upstream(Uplink, Protocol):
    """The link as sessions see it."""

    @property
    def connected(self) -> bool:
        """A leader listens."""
        ...

    @property
    def lost_for_s(self) -> float | None:
        """Seconds without a leader; None before the first."""
        ...


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds of one stream."""

    buffer_bytes: int
    """Most bytes of events that wait for the reader, roughly. A burst may exceed it for a second, fourfold at most."""
    gap_limit: int
    """So often in a row may output be lost or damaged before the stream fails."""


@dataclass(frozen=True, slots=True)
class Handle:
    """What lets a client come back to a stream; empty: nothing does."""

    sealed: bytes = b""
    """For other gateways."""
    origin_id: str = ""
    """Inner name under which the stream is asked for; empty: the request's."""
    claim: int = 0
    """How often its client had come back when this gateway took it up."""


_NO_HANDLE = Handle()


class Stream:
    """Implements `gateway.types.Generation`. All methods run on one loop; `on_end` is called exactly once."""

    def __init__(
        self,
        request: request_pb2.Request,
        started: Started,
        transcript: Transcript | ValuesTranscript,
        trace: RequestTrace,
        *,
        uplink: Uplink,
        clock: Clock,
        deadline: float,
        limits: StreamLimits,
        on_end: Callable[[Stream, LlmosError | None], None],
        constraint_field: str = "",
        handle: Handle = _NO_HANDLE,
        remainder: Remainder | None = None,
    ) -> None:
        """`deadline` is on the clock's monotonic time; `constraint_field` is what the client calls its constraint;
        `remainder` cuts off what the client has already."""
        self.request_id = started.request_id
        self.trace = trace
        self.transcript = transcript
        self.finish_reasons: dict[int, str] = {}
        self.constraint_field = constraint_field
        self.claim = handle.claim
        self._handle = handle
        self._remainder = remainder
        self._request = request
        self._started = started
        self._uplink = uplink
        self._clock = clock
        self._deadline = deadline
        self._limits = limits
        self._on_end = on_end
        self._buffer: deque[Event] = deque([started])
        self._buffered = 0
        self._ready = asyncio.Event()
        self._sink: Sink | None = None
        self._idle = False
        """The reader has done with everything and waits for more."""
        self._ended = False
        self._error: LlmosError | None = None
        self._asked = False
        self._failed_asks = 0
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    @property
    def inner_id(self) -> str:
        """The request's name inside the fleet."""
        return self._request.request_id

    @property
    def tenant(self) -> str:
        """Who asked."""
        return self._request.tenant

    def begin(self, deltas: Iterable[Delta]) -> None:
        """Hand the request over, after `deltas`: what is known of its output already."""
        for delta in deltas:
            self._put(delta)
        if self.transcript.finished:
            self._complete()
            return
        left = max(0.0, self._deadline - self._clock.monotonic())
        self._deadline_timer = asyncio.get_running_loop().call_later(left, self._expire)
        # What was under way to the stream in whose place it is comes first; what it lacks is asked for by this.
        self._asked = self.claim > 0
        self._uplink.submit(self.unfinished())
        self.trace.submitted()

    def unfinished(self) -> requests_pb2.Submit:
        """The request with what has been generated so far: what a scheduler needs to go on with it."""
        handle = self._handle
        submit = requests_pb2.Submit(
            request=self._request, sealed=handle.sealed, origin_id=handle.origin_id, claim=handle.claim
        )
        request = submit.request
        request.resume.extend(self.transcript.resume_state())
        request.deadline_ms = max(1, int((self._deadline - self._clock.monotonic()) * 1000))
        return submit

    def take(self, output: request_pb2.Output) -> Verdict:
        """Add output from the fleet. Anything but the next piece changes nothing; what is lost is asked for."""
        if self._ended:
            return Verdict.STALE
        taken = self.transcript.take(output)
        if taken.delta is None:
            if taken.verdict in (Verdict.GAP, Verdict.CORRUPT):
                self._distrust()
            return taken.verdict
        self._asked, self._failed_asks = False, 0
        if taken.keep_until is not None:
            self._uplink.finish(self.inner_id, output.choice, taken.keep_until)
        self._put(taken.delta)
        self.trace.output()
        if self.transcript.finished:
            self._complete()
        elif self._buffered > self._limits.buffer_bytes:
            self._press()
        return taken.verdict

    def reconnected(self) -> requests_pb2.Submit:
        """The request for the next connection; everything that is missing is asked for with it."""
        self._asked = False
        return self.unfinished()

    def reclassified(self, priority: request_pb2.PriorityClass.ValueType) -> None:
        """A person moved the request to another class: it is submitted again in that one."""
        self._request.priority = priority

    def fail(self, error: LlmosError, *, deliver: bool = True) -> None:
        """End with an error; `deliver` lets the reader have what is buffered first."""
        if self._ended:
            return
        if not deliver:
            self._buffer.clear()
        self._error = error
        self._end(error)

    def abort(self, error: LlmosError, reason: str) -> None:
        """End with an error and stop the computation."""
        if not self._ended:
            self._uplink.cancel(self.inner_id, reason, self.claim)
            self.fail(error, deliver=False)

    async def events(self) -> AsyncIterator[Event]:
        """See `Generation`. A reader that goes away in the middle cancels the request."""
        try:
            while True:
                while self._buffer:
                    event = self._buffer.popleft()
                    self._buffered -= _size(event)
                    yield event
                    if isinstance(event, Done):
                        return
                if self._error is not None:
                    raise self._error
                self._ready.clear()
                self._idle = True
                await self._ready.wait()
        finally:
            self._abandon("client_gone")

    def feed(self, sink: Sink) -> None:
        """See `Generation`."""
        self._sink = sink

    async def aclose(self, reason: str = "client_gone") -> None:
        """See `Generation`."""
        self._abandon(reason)

    def _abandon(self, reason: str) -> None:
        self.abort(Cancelled("The client went away."), reason)

    def _press(self) -> None:
        """The buffer is full. What stood still gets everything at once, before any reader's turn: grant one."""
        if self._buffered > _BURST * self._limits.buffer_bytes:
            self._give_up_reader()
        elif self._reader_timer is None:
            self._reader_timer = asyncio.get_running_loop().call_later(_SLOW_READER_GRACE_S, self._judge_reader)

    def _judge_reader(self) -> None:
        self._reader_timer = None
        if self._buffered > self._limits.buffer_bytes:
            self._give_up_reader()

    def _give_up_reader(self) -> None:
        self.abort(SlowReader("The stream was not read fast enough; resume it, or ask for less."), "slow_reader")

    def _put(self, delta: Delta) -> None:
        if delta.finish is not None:
            self.finish_reasons[delta.choice] = delta.finish
        if self._remainder is not None:
            lacking = self._lacking(self._remainder, delta)
            if lacking is None:
                return
            delta = lacking
        if self._idle and self._sink is not None and self._sink.push(delta):
            return
        self._buffer.append(delta)
        self._buffered += _size(delta)
        self._wake()

    def _lacking(self, remainder: Remainder, delta: Delta) -> Delta | None:
        """What the client does not have of a delta."""
        lacking = remainder.cut(delta)
        if remainder.is_over:
            self._remainder = None
        return lacking

    def _wake(self) -> None:
        self._idle = False
        self._ready.set()

    def _complete(self) -> None:
        prompt_tokens = self._started.prompt_tokens
        cached = min(self.transcript.cached_tokens, prompt_tokens)
        self._buffer.append(Done(prompt_tokens, self.transcript.completion_tokens, cached))
        self._end(None)

    def _end(self, error: LlmosError | None) -> None:
        self._ended = True
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        self._wake()
        self._on_end(self, error)

    def _expire(self) -> None:
        if not self._ended:
            self._uplink.cancel(self.inner_id, "deadline", self.claim)
            self.fail(DeadlineExceeded("The request's deadline passed before it was finished."))

    def _distrust(self) -> None:
        """Something is lost or damaged: ask for it on a new connection, a few times at most without progress."""
        if self._asked:
            return
        self._asked = True
        self._failed_asks += 1
        if self._failed_asks > self._limits.gap_limit:
            self.abort(
                Unavailable("The fleet lost a part of the answer; resume the stream.", retry_after_s=1.0), "broken"
            )
        else:
            self._uplink.restart()


def _size(event: Event) -> int:
    """Bytes that an event takes, roughly."""
    if not isinstance(event, Delta):
        return 0
    entries = sum(1 + len(logprob.top) for logprob in event.logprobs)
    numbers = _TOKEN_BYTES * len(event.token_ids) + _LOGPROB_BYTES * entries + _VALUE_BYTES * len(event.values)
    return _EVENT_BYTES + 4 * len(event.text) + numbers
