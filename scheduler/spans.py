"""Stage spans of every attempt, opened and closed by the core's commands: queue, attempt, prefill, decode.

The telemetry shell around the core. Attempts of one request are siblings under the gateway's span, joined by links.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry.trace import Span, SpanContext, SpanKind
from opentelemetry.util.types import AttributeValue

from llmos.internal.v1 import request_pb2
from llmos.telemetry import REQUEST_ID, Telemetry, remote_context, trace_headers
from scheduler.commands import AttemptOver, Command, FirstToken, Progress, Queued, RequestOver, StartAttempt

MODEL, WORKER = "gen_ai.request.model", "llmos.worker"
TERM, ATTEMPT = "llmos.term", "llmos.attempt"
EXPECTED_S, UNCACHED, LOAD = "llmos.expected_s", "llmos.uncached_tokens", "llmos.decoding"
"""Attributes of stages that `span_watch` reads: what the bound of a prefill is measured by."""
REASON, HEDGE = "llmos.reason", "llmos.hedge"
"""Attributes of attempts: why it was left, or why it began beside another one; of two, whether it `won` or `lost`."""


@dataclass(slots=True)
class _Attempt:
    """Spans of one attempt."""

    span: Span
    stage: Span
    place: dict[str, AttributeValue]
    """What its stages have in common."""


@dataclass(slots=True)
class _Open:
    """Spans of one request that have not ended."""

    request_id: str
    model: str
    tenant: str
    parent: SpanContext | None
    queue: Span | None = None
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    """By number; two at most."""
    earlier: list[SpanContext] = field(default_factory=list)


class StageSpans:
    """Follows the core's commands; owns the spans of live requests."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._open: dict[str, _Open] = {}
        self.progressed: Callable[[Progress], None] = lambda progress: None
        """Hears of stages that go on: `span_watch`."""

    def __len__(self) -> int:
        return len(self._open)

    def observe(self, command: Command) -> None:
        """Take in a command before it is carried out. For dispatches there is `started`."""
        if isinstance(command, Queued):
            self._queued(command.request)
        elif isinstance(command, FirstToken):
            self._first_token(command)
        elif isinstance(command, Progress):
            self.progressed(command)
        elif isinstance(command, AttemptOver):
            self._attempt_over(command)
        elif isinstance(command, RequestOver):
            self._request_over(command)

    def abandon(self, reason: str) -> None:
        """The reign is over: what is open here goes on elsewhere."""
        for request_id, entry in list(self._open.items()):
            for number in list(entry.attempts):
                self._attempt_over(AttemptOver(request_id, number, reason, 0))
            self._request_over(RequestOver(request_id, reason))

    def _queued(self, request: request_pb2.Request) -> None:
        entry = self._open.get(request.request_id)
        if entry is None:
            parent = remote_context(request.trace.traceparent, request.trace.tracestate)
            entry = _Open(request.request_id, request.model, request.tenant, parent)
            self._open[request.request_id] = entry
        if entry.queue is None:
            entry.queue = self._start(entry, "queue", entry.parent)

    def started(self, command: StartAttempt) -> request_pb2.TraceContext | None:
        """Open an attempt's span. Returns its context, for the dispatch; None for a request that is not known."""
        entry = self._open.get(command.request.request_id)
        if entry is None:
            return None
        if entry.queue is not None:
            self._telemetry.finish(entry.queue)
            entry.queue = None
        place: dict[str, AttributeValue] = {
            ATTEMPT: command.epoch.attempt,
            TERM: command.epoch.term,
            WORKER: command.worker_id,
        }
        about = {REQUEST_ID: entry.request_id, MODEL: entry.model, "llmos.tenant": entry.tenant, **place}
        if command.reason:
            about[REASON] = command.reason
        span = self._telemetry.start(
            "attempt", parent=entry.parent, kind=SpanKind.CLIENT, links=entry.earlier, attributes=about
        )
        context = span.get_span_context()
        expected = {EXPECTED_S: command.expected_s, UNCACHED: command.uncached, LOAD: command.load}
        stage = self._start(entry, "prefill", context, **place, **expected)
        entry.earlier.append(context)
        entry.attempts[command.epoch.attempt] = _Attempt(span, stage, place)
        traceparent, tracestate = trace_headers(span)
        return request_pb2.TraceContext(traceparent=traceparent, tracestate=tracestate)

    def _first_token(self, command: FirstToken) -> None:
        entry = self._open.get(command.request_id)
        attempt = entry.attempts.get(command.attempt) if entry is not None else None
        if entry is None or attempt is None:
            return
        self._telemetry.finish(attempt.stage)
        if command.won:
            attempt.span.set_attribute(HEDGE, "won")
        attempt.stage = self._start(entry, "decode", attempt.span.get_span_context(), **attempt.place)

    def _attempt_over(self, command: AttemptOver) -> None:
        entry = self._open.get(command.request_id)
        attempt = entry.attempts.pop(command.attempt, None) if entry is not None else None
        if attempt is None:
            return
        self._telemetry.finish(attempt.stage, "" if command.at_least else command.error)
        attempt.span.set_attribute("llmos.tokens", command.tokens)
        if command.error:
            attempt.span.set_attribute(REASON, command.error)
        if command.lost:
            attempt.span.set_attribute(HEDGE, "lost")
        self._telemetry.finish(attempt.span, command.error)

    def _request_over(self, command: RequestOver) -> None:
        entry = self._open.pop(command.request_id, None)
        if entry is not None and entry.queue is not None:
            self._telemetry.finish(entry.queue, command.error)

    def _start(self, entry: _Open, name: str, parent: SpanContext | None, **more: AttributeValue) -> Span:
        attributes = {REQUEST_ID: entry.request_id, MODEL: entry.model, **more}
        return self._telemetry.start(name, parent=parent, attributes=attributes)
