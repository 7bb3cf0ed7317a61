"""Spans: one trace per request across the services.

Every span is recorded in the process, exported or not: where the ratio sampler would drop a span, ours answers
RECORD_ONLY, so that the processors (and with them `llmos trace` and the deadlines) see all of them while an exporter
gets the sampled ones. Times come from the injected clock, explicitly; nothing here waits for an exporter. Prompts and
outputs never become attributes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceState,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes, AttributeValue

from llmos.clock import Clock
from llmos.v1 import fleet_pb2

log = logging.getLogger(__name__)

_PROPAGATOR = TraceContextTextMapPropagator()
_KEEP = 8192
REQUEST_ID = "llmos.request_id"
"""Attribute that every span of a request carries."""


class RecordAlways(Sampler):
    """Samples as `inner` does, but records what `inner` would drop."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """See the SDK's `Sampler`."""
        result = self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links)
        if result.decision is Decision.DROP:
            return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state)
        return result

    def get_description(self) -> str:
        """See the SDK's `Sampler`."""
        return f"RecordAlways({self._inner.get_description()})"


class _Finished(SpanProcessor):
    """Keeps finished spans until they are drained; the oldest give way and are counted."""

    def __init__(self) -> None:
        self.spans: deque[ReadableSpan] = deque()
        self.dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        if len(self.spans) >= _KEEP:
            self.spans.popleft()
            self.dropped += 1
        self.spans.append(span)


class _Watchers(SpanProcessor):
    """Passes spans on to processors that come and go."""

    def __init__(self) -> None:
        self.processors: list[SpanProcessor] = []

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        for processor in self.processors:
            processor.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        for processor in self.processors:
            processor.on_end(span)


class Telemetry:
    """Spans of one process. `service` is `gateway`, `scheduler` or `worker`; `node_id` tells its processes apart."""

    def __init__(
        self,
        service: str,
        node_id: str,
        *,
        clock: Clock,
        otlp_endpoint: str = "",
        sample_ratio: float = 1.0,
        processors: Sequence[SpanProcessor] = (),
    ) -> None:
        self._service = service
        self._node_id = node_id
        self._clock = clock
        self._provider = TracerProvider(
            sampler=RecordAlways(ParentBased(TraceIdRatioBased(sample_ratio))),
            resource=Resource.create({"service.name": f"llmos-{service}", "service.instance.id": node_id}),
            span_limits=SpanLimits(max_attributes=64, max_events=32, max_links=32),
            shutdown_on_exit=False,
        )
        self._finished = _Finished()
        self._provider.add_span_processor(self._finished)
        self._watchers = _Watchers()
        self._provider.add_span_processor(self._watchers)
        for processor in processors:
            self._provider.add_span_processor(processor)
        if otlp_endpoint:
            self._provider.add_span_processor(_otlp_processor(otlp_endpoint))
        self._tracer = self._provider.get_tracer("llmos")

    def watch(self, processor: SpanProcessor) -> None:
        """From now on `processor` sees every span begin and end, exported or not, until `unwatch`."""
        self._watchers.processors.append(processor)

    def unwatch(self, processor: SpanProcessor) -> None:
        """It sees no more of them."""
        self._watchers.processors.remove(processor)

    def now(self) -> int:
        """Nanoseconds since 1970 on the injected clock."""
        return self._clock.unix_ns()

    def at(self, monotonic_s: float) -> int:
        """The nanoseconds since 1970 that belong to a reading of the clock's `monotonic`."""
        return self._clock.unix_ns() - int((self._clock.monotonic() - monotonic_s) * 1e9)

    def start(
        self,
        name: str,
        *,
        parent: SpanContext | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, AttributeValue] | None = None,
        links: Sequence[SpanContext] = (),
        start_ns: int | None = None,
    ) -> Span:
        """Open a span below `parent` (None: a new trace). The caller ends it with `finish`."""
        context = Context() if parent is None else set_span_in_context(NonRecordingSpan(parent), Context())
        return self._tracer.start_span(
            name,
            context=context,
            kind=kind,
            attributes=attributes,
            links=[Link(other) for other in links],
            start_time=self.now() if start_ns is None else start_ns,
        )

    def finish(self, span: Span, error: str = "", end_ns: int | None = None) -> None:
        """Close a span; `error` says what went wrong, as an error code or a short phrase."""
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(self.now() if end_ns is None else end_ns)

    def drain(self, limit: int = 512) -> list[fleet_pb2.Span]:
        """Finished spans that were not drained before, at most `limit`, oldest first."""
        spans = self._finished.spans
        return [self._record(spans.popleft()) for _ in range(min(limit, len(spans)))]

    @property
    def dropped(self) -> int:
        """Finished spans that gave way before they were drained."""
        return self._finished.dropped

    def shutdown(self, timeout_s: float) -> None:
        """Flush the exporter, waiting at most `timeout_s`; a hanging collector is left behind."""
        worker = threading.Thread(target=self._provider.shutdown, name="telemetry-shutdown", daemon=True)
        worker.start()
        worker.join(timeout_s)
        if worker.is_alive():
            log.warning("the trace collector did not take the last spans in time; they are lost")

    def _record(self, span: ReadableSpan) -> fleet_pb2.Span:
        context = span.get_span_context()
        if context is None:
            return fleet_pb2.Span(name=span.name)
        error = span.status.description or "error" if span.status.status_code is StatusCode.ERROR else ""
        return fleet_pb2.Span(
            trace_id=context.trace_id.to_bytes(16, "big"),
            span_id=context.span_id.to_bytes(8, "big"),
            parent_span_id=span.parent.span_id.to_bytes(8, "big") if span.parent else b"",
            name=span.name,
            service=self._service,
            node=self._node_id,
            start_unix_ns=span.start_time or 0,
            end_unix_ns=span.end_time or 0,
            attributes={key: str(value) for key, value in (span.attributes or {}).items()},
            error=error,
            linked_span_ids=[link.context.span_id.to_bytes(8, "big") for link in span.links],
        )


def _otlp_processor(endpoint: str) -> SpanProcessor:
    # Imported here because it costs 100 ms that processes without a collector need not pay.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"), timeout=5)
    return BatchSpanProcessor(exporter, schedule_delay_millis=500, export_timeout_millis=5_000)


def remote_context(traceparent: str, tracestate: str = "") -> SpanContext | None:
    """The sender's span (W3C trace context), or None if the header is absent or malformed."""
    if not traceparent:
        return None
    carrier = {"traceparent": traceparent, "tracestate": tracestate}
    context = get_current_span(_PROPAGATOR.extract(carrier, Context())).get_span_context()
    return context if context.is_valid else None


def trace_headers(span: Span) -> tuple[str, str]:
    """`(traceparent, tracestate)` that make `span` the receiver's parent."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    return carrier.get("traceparent", ""), carrier.get("tracestate", "")


def trace_id_hex(span: Span) -> str:
    """32 hexadecimal digits."""
    return f"{span.get_span_context().trace_id:032x}"
