"""What the gateway counts, for Prometheus. Names follow OpenTelemetry's GenAI conventions and vLLM's.

`MeteredEngine` stands between the edges and the sessions, so that HTTP and gRPC are counted alike. Labels have few
values by construction: a model's name appears only if the model is served, a status or an error only as its code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.types import (
    Delta,
    Done,
    Engine,
    Event,
    Generation,
    GenerationRequest,
    Held,
    Identity,
    ModelInfo,
    Sink,
    TakenUp,
    TaskRequest,
    TraceHeaders,
)
from llmos.clock import Clock
from llmos.errors import Cancelled, LlmosError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_TOKENS_AT_ONCE = 32
_MODEL = ("gen_ai_operation_name", "gen_ai_request_model")
_OPERATIONS = {
    "chat": "chat",
    "completion": "text_completion",
    "embed": "embeddings",
    "classify": "classify",
    "score": "score",
}


class Metrics:
    """The gateway's counters, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._add_genai(self.registry)
        self._add_counts(self.registry)

    def _add_genai(self, registry: CollectorRegistry) -> None:
        self.first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request's arrival to its first output.",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time of the tokens after the first, per request.",
            _MODEL,
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request's arrival to its end.",
            (*_MODEL, "error_type"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.usage = Histogram(
            "gen_ai_client_token_usage",
            "Tokens per finished request, of prompt and answer.",
            (*_MODEL, "gen_ai_token_type"),
            buckets=_TOKENS,
            registry=registry,
        )

    def _add_counts(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"llmos:{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"llmos:{name}", text, labels, registry=registry)

        self.running = gauge("num_requests_running", "Requests with output.", "model_name")
        self.waiting = gauge("num_requests_waiting", "Requests without output so far.", "model_name")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.", "model_name")
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found in a cache.", "model_name")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.", "model_name")
        self.success = counter("request_success", "Finished choices.", "model_name", "finished_reason")
        self.failure = counter("request_failure", "Requests that ended in an error.", "model_name", "code")
        self.http_requests = counter("http_requests", "HTTP requests.", "method", "route", "status")
        self.http_active = gauge("http_requests_active", "HTTP requests in progress.")

    def watch(self, prefix: str, read: Callable[[], Mapping[str, int]], *, gauges: Iterable[str] = ()) -> None:
        """Show another part's counters as `llmos:{prefix}_{name}` whenever somebody asks."""
        self.registry.register(_Watched(prefix, read, frozenset(gauges)))

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(self, prefix: str, read: Callable[[], Mapping[str, int]], gauges: frozenset[str]) -> None:
        self._prefix = prefix
        self._read = read
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, value in self._read().items():
            family = GaugeMetricFamily if name in self._gauges else CounterMetricFamily
            yield family(f"llmos:{self._prefix}_{name}", f"{name.replace('_', ' ')} ({self._prefix})", value=value)


class MeteredEngine:
    """An Engine that counts what passes through another one."""

    def __init__(self, inner: Engine, metrics: Metrics, clock: Clock) -> None:
        self._inner = inner
        self._metrics = metrics
        self._clock = clock

    async def generate(
        self, request: GenerationRequest | TaskRequest, identity: Identity, *, request_id: str, trace: TraceHeaders
    ) -> Generation:
        """See `Engine`."""
        model = request.model if any(served.name == request.model for served in self._inner.models()) else ""
        meter = _Meter(self._metrics, self._clock, model, _OPERATIONS[request.kind])
        try:
            inner = await self._inner.generate(request, identity, request_id=request_id, trace=trace)
        except LlmosError as error:
            meter.end(error.code)
            raise
        except asyncio.CancelledError:
            meter.end(Cancelled.code)
            raise
        except BaseException:
            meter.end("internal_error")
            raise
        return _MeteredGeneration(inner, meter)

    async def take_up(
        self,
        request_id: str,
        identity: Identity,
        held: Sequence[Held],
        *,
        trace: TraceHeaders,
        deadline_s: float | None = None,
    ) -> TakenUp:
        """See `Engine`."""
        found = await self._inner.take_up(request_id, identity, held, trace=trace, deadline_s=deadline_s)
        meter = _Meter(self._metrics, self._clock, found.model, _OPERATIONS[found.kind])
        return replace(found, generation=_MeteredGeneration(found.generation, meter))

    async def cancel(self, request_id: str, identity: Identity) -> bool:
        """See `Engine`."""
        return await self._inner.cancel(request_id, identity)

    def models(self) -> Sequence[ModelInfo]:
        """See `Engine`."""
        return self._inner.models()

    def ready(self) -> bool:
        """See `Engine`."""
        return self._inner.ready()


class _MeteredGeneration:
    def __init__(self, inner: Generation, meter: _Meter) -> None:
        self._inner = inner
        self._meter = meter
        self.request_id = inner.request_id

    async def events(self) -> AsyncIterator[Event]:
        try:
            async for event in self._inner.events():
                self._meter.see(event)
                yield event
        except LlmosError as error:
            self._meter.end(error.code)
            raise
        except Exception:
            self._meter.end("internal_error")
            raise

    def feed(self, sink: Sink) -> None:
        self._inner.feed(_MeteredSink(sink, self._meter))

    async def aclose(self, reason: str = "client_gone") -> None:
        self._meter.end(Cancelled.code)
        await self._inner.aclose(reason)


class _MeteredSink:
    def __init__(self, inner: Sink, meter: _Meter) -> None:
        self._inner = inner
        self._meter = meter

    def push(self, delta: Delta) -> bool:
        if not self._inner.push(delta):
            return False
        self._meter.see_delta(delta)
        return True


class _Meter:
    """Follows one request. `end` counts once, whoever calls it first."""

    def __init__(self, metrics: Metrics, clock: Clock, model: str, operation: str) -> None:
        self._metrics = metrics
        self._clock = clock
        self._model = model
        self._labels = (operation, model)
        self._began = clock.monotonic()
        self._first: float | None = None
        self._ended = False
        self._tokens = 0
        """Not counted yet: a counter is not touched for each token."""
        metrics.waiting.labels(model).inc()

    def see(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.see_delta(event)
        elif isinstance(event, Done):
            self._see_done(event)

    def end(self, code: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._count_tokens()
        (self._metrics.waiting if self._first is None else self._metrics.running).labels(self._model).dec()
        self._metrics.duration.labels(*self._labels, code).observe(self._clock.monotonic() - self._began)
        if code:
            self._metrics.failure.labels(self._model, code).inc()

    def see_delta(self, delta: Delta) -> None:
        if self._first is None:
            self._first = self._clock.monotonic()
            self._metrics.waiting.labels(self._model).dec()
            self._metrics.running.labels(self._model).inc()
            self._metrics.first_token.labels(*self._labels).observe(self._first - self._began)
        self._tokens += len(delta.token_ids)
        if self._tokens >= _TOKENS_AT_ONCE:
            self._count_tokens()
        if delta.finish is not None:
            self._metrics.success.labels(self._model, delta.finish).inc()

    def _count_tokens(self) -> None:
        if self._tokens:
            self._metrics.generation_tokens.labels(self._model).inc(self._tokens)
            self._tokens = 0

    def _see_done(self, done: Done) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.labels(self._model).inc(done.prompt_tokens)
        metrics.cached_tokens.labels(self._model).inc(done.cached_tokens)
        metrics.usage.labels(*self._labels, "input").observe(done.prompt_tokens)
        metrics.usage.labels(*self._labels, "output").observe(done.completion_tokens)
        if self._first is not None and done.completion_tokens > 1:
            mean = (self._clock.monotonic() - self._first) / (done.completion_tokens - 1)
            metrics.per_token.labels(*self._labels).observe(mean)
        self.end("")
