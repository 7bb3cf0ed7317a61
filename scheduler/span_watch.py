"""Watches the stage spans as they begin and end: learns how long stages take, and says which open one takes too long.

A span processor of the scheduler's own tracer, which records every span, exported or not: nothing here waits for an
exporter, and a collector that hangs changes nothing. Of what goes on inside an open span it is told once for a few
frames of a worker; how far a single stream is, it looks up when that stream's bound passes. Nothing is done per token.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.trace import StatusCode

from llmos.clock import Clock
from llmos.telemetry import REQUEST_ID
from scheduler.commands import Progress
from scheduler.deadlines import Deadlines, Stage
from scheduler.events import AttemptLate, AttemptStalled, StageQuantiles, WorkerSlow
from scheduler.health import SLOW
from scheduler.spans import ATTEMPT, EXPECTED_S, LOAD, MODEL, TERM, WORKER
from scheduler.state import State

LOOK_S = 0.05
"""Between two looks."""
_LATE_S = 0.5
"""A longer delay of this process's own loop says nothing about stages."""
_AT_LEAST_EVERY_S = 1.0
"""Each open span is looked at so often: its bound may have become shorter."""
_AGAIN = 0.5
"""What stays stalled, or late, is told again after this share of its bound."""
_TAIL = 0.95
"""The share of stages that are not slow ones."""
_STAGES: dict[str, Stage] = {"queue": "queue", "prefill": "prefill", "decode": "decode"}


class Fleet(Protocol):
    """How far things are, looked up when a bound has passed."""

    def output_at(self, request_id: str) -> float:
        """When a request's last output came; 0: none yet."""
        ...

    def still_since(self, worker_id: str) -> float | None:
        """Since when a worker's step counter stands still; None: it need not move."""
        ...

    def load(self, worker_id: str) -> int:
        """Sequences that decode there."""
        ...


class CoreView:
    """`Fleet`, read from the core's state between its events."""

    def __init__(self, state: State) -> None:
        self._state = state

    def output_at(self, request_id: str) -> float:
        """See `Fleet`."""
        live = self._state.requests.get(request_id)
        return live.output_at if live is not None else 0.0

    def still_since(self, worker_id: str) -> float | None:
        """See `Fleet`. An engine that loads a model does not step."""
        worker = self._state.workers.get(worker_id)
        if worker is None or not worker.connected or worker.loading or not worker.running:
            return None
        given = min(attempt.begun_at for attempt in worker.running.values())
        return max(worker.step_at, given)

    def load(self, worker_id: str) -> int:
        """See `Fleet`."""
        worker = self._state.workers.get(worker_id)
        return worker.load.decoding if worker is not None else 0


@dataclass(slots=True)
class _Watched:
    """An open span of a stage."""

    stage: Stage
    request_id: str
    model: str
    worker: str
    term: int
    attempt: int
    began: float
    load: int
    expected_s: float


class SpanWatch(SpanProcessor):
    """One reign's watch. Its methods are called on the scheduler's loop; only `look` yields anything."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self.deadlines = Deadlines()
        self._fleet = fleet
        self._clock = clock
        self._open: dict[int, _Watched] = {}
        self._due: list[tuple[float, int]] = []
        self._by_worker: dict[str, dict[int, None]] = {}
        self._told: dict[str, float] = {}
        """When it was last told that a worker's engine stands still."""
        self._said: dict[tuple[str, str], tuple[float, float]] = {}
        """Quantiles that the core knows of."""
        self._not_before = 0.0
        """Whatever happened earlier happened while this process itself stood still."""
        self._looked_at: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    # -- spans -------------------------------------------------------------------------------------------------------

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        """See `SpanProcessor`."""
        stage = _STAGES.get(span.name)
        about = span.attributes
        if stage is None or not about:
            return
        now = self._clock.monotonic()
        key = span.get_span_context().span_id
        watched = _Watched(
            stage,
            str(about.get(REQUEST_ID, "")),
            str(about.get(MODEL, "")),
            str(about.get(WORKER, "")),
            _number(about.get(TERM)),
            _number(about.get(ATTEMPT)),
            now,
            _number(about.get(LOAD)),
            float(about.get(EXPECTED_S, 0.0)),  # type: ignore[arg-type]
        )
        self._open[key] = watched
        if watched.worker:
            self._by_worker.setdefault(watched.worker, {})[key] = None
        self._await(key, now, now + min(self._bound_s(watched, now), self._late_s(watched)))

    def on_end(self, span: ReadableSpan) -> None:
        """See `SpanProcessor`. What ended badly, or too early, teaches nothing."""
        context = span.get_span_context()
        watched = self._open.pop(context.span_id, None) if context is not None else None
        if watched is None:
            return
        siblings = self._by_worker.get(watched.worker)
        if siblings is not None and context is not None:
            siblings.pop(context.span_id, None)
            if not siblings:
                del self._by_worker[watched.worker]
                self._told.pop(watched.worker, None)
        if span.status.status_code is StatusCode.ERROR or watched.stage == "decode":
            return
        seconds = ((span.end_time or 0) - (span.start_time or 0)) / 1e9
        if watched.stage == "prefill":
            if not watched.expected_s:
                return
            seconds /= watched.expected_s
        now = self._clock.monotonic()
        self.deadlines.observe(watched.stage, watched.model, watched.worker, watched.load, seconds, now)

    def progressed(self, note: Progress) -> None:
        """Decode spans of a worker go on."""
        now = self._clock.monotonic()
        if note.gap_s:
            self.deadlines.observe("decode", note.model, note.worker_id, note.load, note.gap_s, now)
        self.deadlines.observe("step", note.model, note.worker_id, note.load, note.step_s, now)
        self.deadlines.compare(note.model, note.worker_id, note.step_s / note.expected_s, now)

    def compare(self) -> Iterator[WorkerSlow | StageQuantiles]:
        """How workers do beside each other; call it about twice a second."""
        now = self._clock.monotonic()
        self.deadlines.typify()
        for worker, ratio, known in self.deadlines.slow(SLOW, now):
            yield WorkerSlow(worker, ratio, known)
        for (worker, model), (prefill, gap) in self.deadlines.tails(_TAIL).items():
            before = self._said.get((worker, model), (0.0, 0.0))
            if abs(prefill - before[0]) > 0.1 * prefill or abs(gap - before[1]) > 0.1 * gap:
                self._said[worker, model] = (prefill, gap)
                yield StageQuantiles(worker, model, prefill, gap)

    def forget(self, worker: str) -> None:
        """A worker is gone for good."""
        self.deadlines.forget(worker)
        self._said = {key: said for key, said in self._said.items() if key[0] != worker}

    # -- looks -------------------------------------------------------------------------------------------------------

    def look(self) -> Iterator[AttemptStalled | AttemptLate]:
        """What takes longer than its bound now."""
        now = self._clock.monotonic()
        if self._looked_at is not None and now - self._looked_at > LOOK_S + _LATE_S:
            self._not_before = now
        self._looked_at = now
        yield from self._standing_still(now)
        while self._due and self._due[0][0] <= now:
            key = heapq.heappop(self._due)[1]
            watched = self._open.get(key)
            if watched is None:
                continue
            since, bound, late = self._since(watched), self._bound_s(watched, now), self._late_s(watched)
            about = (watched.request_id, watched.term, watched.attempt)
            if since + bound <= now:
                self._await(key, now, now + _AGAIN * bound)
                yield AttemptStalled(*about, watched.stage, now - since, bound)
            elif since + late <= now:
                self._await(key, now, min(since + bound, now + _AGAIN * late))
                yield AttemptLate(*about, now - since, late)
            else:
                self._await(key, now, since + min(bound, late))

    def _standing_still(self, now: float) -> Iterator[AttemptStalled]:
        """Engines that make no step: told of by one of the spans that wait for it."""
        for worker, spans in self._by_worker.items():
            since = self._fleet.still_since(worker)
            if since is None:
                continue
            watched = self._open[next(iter(spans))]
            since = max(since, self._not_before)
            # Cheap first: most engines have stepped a moment ago.
            if now - since < LOOK_S or now - self._told.get(worker, 0.0) < _AT_LEAST_EVERY_S:
                continue
            bound = self.deadlines.bound_s("step", watched.model, worker, self._fleet.load(worker), now)
            if now - since >= bound:
                self._told[worker] = now
                yield AttemptStalled(watched.request_id, watched.term, watched.attempt, "step", now - since, bound)

    def _since(self, watched: _Watched) -> float:
        since = max(watched.began, self._not_before)
        return max(since, self._fleet.output_at(watched.request_id)) if watched.stage == "decode" else since

    def _bound_s(self, watched: _Watched, now: float) -> float:
        load = self._fleet.load(watched.worker) if watched.stage == "decode" else watched.load
        expected = watched.expected_s if watched.stage == "prefill" else 1.0
        return self.deadlines.bound_s(watched.stage, watched.model, watched.worker, load, now, expected)

    def _late_s(self, watched: _Watched) -> float:
        if watched.stage != "prefill":
            return math.inf
        return self.deadlines.late_s("prefill", watched.model, watched.worker, watched.load, watched.expected_s)

    def _await(self, key: int, now: float, due: float) -> None:
        heapq.heappush(self._due, (min(due, now + _AT_LEAST_EVERY_S), key))


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0
