"""Telemetry that keeps nothing. Spans exist for as long as somebody watches them: only `span_watch` decides by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, Span, SpanContext, Status, StatusCode, TraceFlags

from llmos.clock import Clock
from llmos.telemetry import Telemetry

_OK, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class LightSpan(NonRecordingSpan):
    """What a processor sees of a span."""

    def __init__(self, number: int, name: str, attributes: Mapping[str, Any] | None, start_time: int) -> None:
        super().__init__(SpanContext(0, number, is_remote=False, trace_flags=TraceFlags(0)))
        self.name, self.attributes, self.start_time = name, attributes, start_time
        self.end_time = 0
        self.status = _OK


class Quiet(Telemetry):
    """Implements the parts of `Telemetry` that services call. `clock` is needed where spans are watched."""

    def __init__(self, clock: Clock | None = None) -> None:
        """No provider, no exporter."""
        self._time = clock
        self._processors: list[SpanProcessor] = []
        self._number = 0

    def watch(self, processor: SpanProcessor) -> None:
        self._processors.append(processor)

    def unwatch(self, processor: SpanProcessor) -> None:
        self._processors.remove(processor)

    def now(self) -> int:
        return self._time.unix_ns() if self._time is not None else 0

    def at(self, monotonic_s: float) -> int:
        return 0

    def start(self, name: str, *, attributes: Any = None, **_: Any) -> Span:
        if not self._processors:
            return INVALID_SPAN
        self._number += 1
        span = LightSpan(self._number, name, attributes, self.now())
        for processor in self._processors:
            processor.on_start(span)  # type: ignore[arg-type]
        return span

    def finish(self, span: Span, error: str = "", end_ns: int | None = None) -> None:
        if isinstance(span, LightSpan):
            span.end_time = self.now()
            span.status = _ERROR if error else _OK
            for processor in self._processors:
                processor.on_end(span)  # type: ignore[arg-type]

    def drain(self, limit: int = 512) -> list[Any]:
        return []

    @property
    def dropped(self) -> int:
        return 0

    def shutdown(self, timeout_s: float) -> None:
        pass
