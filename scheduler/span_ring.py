"""Finished spans of the whole fleet, by trace and by request: what `llmos trace` draws without any collector."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.telemetry import REQUEST_ID
from llmos.v1 import fleet_pb2

TRACES = 4096
SPANS_PER_TRACE = 1024
SPANS = 65_536
"""Some tens of megabytes, whatever traces clients put their requests into."""


class SpanRing:
    """Bounded in traces and in spans: what was touched least recently gives way; a trace keeps its first spans."""

    def __init__(self, *, traces: int = TRACES, spans_per_trace: int = SPANS_PER_TRACE, spans: int = SPANS) -> None:
        self._limit = traces
        self._spans_per_trace = min(spans_per_trace, spans)
        self._most_spans = spans
        self._spans = 0
        self._traces: dict[bytes, dict[bytes, fleet_pb2.Span]] = {}
        self._trace_of: dict[str, bytes] = {}
        self.dropped = 0
        """Spans that did not fit their trace."""

    def add(self, spans: Iterable[fleet_pb2.Span]) -> None:
        """Keep finished spans; one that is already known is kept once."""
        for span in spans:
            trace = self._traces.pop(span.trace_id, {})
            self._traces[span.trace_id] = trace
            if len(trace) >= self._spans_per_trace and span.span_id not in trace:
                self.dropped += 1
                continue
            self._spans += span.span_id not in trace
            trace[span.span_id] = span
            request_id = span.attributes.get(REQUEST_ID)
            if request_id:
                self._trace_of[request_id] = span.trace_id
            while len(self._traces) > self._limit or self._spans > self._most_spans:
                self._evict()

    def get(self, name: str) -> list[fleet_pb2.Span]:
        """Spans of a request id, or of a trace id of 32 hexadecimal digits, by begin. Empty if there are none."""
        trace_id = self._trace_of.get(name)
        if trace_id is not None:
            # A client's own trace may hold many requests.
            spans = [s for s in self._traces[trace_id].values() if s.attributes.get(REQUEST_ID, name) == name]
        else:
            spans = list(self._traces.get(_as_trace_id(name), {}).values())
        return sorted(spans, key=lambda span: (span.start_unix_ns, span.end_unix_ns))

    def _evict(self) -> None:
        oldest = next(iter(self._traces))
        evicted = self._traces.pop(oldest)
        self._spans -= len(evicted)
        for span in evicted.values():
            request_id = span.attributes.get(REQUEST_ID, "")
            if self._trace_of.get(request_id) == oldest:
                del self._trace_of[request_id]


def _as_trace_id(name: str) -> bytes:
    try:
        return bytes.fromhex(name) if len(name) == 32 else b""
    except ValueError:
        return b""
