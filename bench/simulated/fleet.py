"""The discrete-event simulation: engines, a dispatcher before them, clients before that. Deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.simulated.engine import Engine, Step
from bench.simulated.job import Job
from bench.simulated.traffic import Fate, Request, Workload

HOP_S = 0.001
"""From router to worker and back, each way."""
DRAIN_S = 120.0
"""So long after the last arrival the simulation ends, whatever still runs."""


@dataclass(frozen=True, slots=True)
class Start:
    """Send a request to a worker. `priority`: lower goes first there."""

    worker: int
    request_id: str
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Stop:
    """Take a request from a worker."""

    worker: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse a request, or give it up: it gets no further token."""

    request_id: str


Order = Start | Stop | Reject


class Dispatcher(Protocol):
    """Decides where requests run. Knows what it is told here, when it is told."""

    tick_s: float
    """How often `ticked` is called; 0: never."""
    naming: bool
    """Whether steps must name everybody who got a token."""

    def submitted(self, request: Request, now: float) -> Iterable[Order]:
        """A request has come."""
        ...

    def stepped(self, worker: int, step: Step, engine: Engine, now: float) -> Iterable[Order]:
        """A worker's step has ended a hop ago. Of the engine only sizes may be looked at."""
        ...

    def ticked(self, engines: Sequence[Engine], now: float) -> Iterable[Order]:
        """Time has passed."""
        ...


class Fleet:
    """One run. `fates` has every request that came, in order of arrival."""

    def __init__(self, engines: Sequence[Engine], dispatcher: Dispatcher, workload: Workload) -> None:
        self.engines = engines
        self.fates: dict[str, Fate] = {}
        self.now = 0.0
        self._dispatcher = dispatcher
        self._workload = workload
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = 0
        self._working = [False] * len(engines)
        self._open = 0
        self._coming = 0

    def run(self) -> list[Fate]:
        """Until everybody is served."""
        for when, request in self._workload.arrivals():
            self._expect(when, request)
        last = max((event[0] for event in self._events), default=0.0)
        if self._dispatcher.tick_s:
            self._at(self._dispatcher.tick_s, self._tick)
        while self._events and (self._open or self._coming) and self.now < last + DRAIN_S:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        return list(self.fates.values())

    def _at(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, act, arguments))

    def _expect(self, when: float, request: Request) -> None:
        self._coming += 1
        self._at(when, self._arrive, request)

    def _arrive(self, request: Request) -> None:
        self._coming -= 1
        self._open += 1
        self.fates[request.id] = Fate(request, self.now)
        self._obey(self._dispatcher.submitted(request, self.now))

    def _tick(self) -> None:
        self._obey(self._dispatcher.ticked(self.engines, self.now))
        self._at(self.now + self._dispatcher.tick_s, self._tick)

    def _obey(self, orders: Iterable[Order]) -> None:
        for order in orders:
            if isinstance(order, Reject):
                self._over(self.fates[order.request_id])
            else:
                self._at(self.now + HOP_S, self._deliver, order)

    def _deliver(self, order: Start | Stop) -> None:
        engine = self.engines[order.worker]
        if isinstance(order, Stop):
            engine.cancel(order.request_id)
            return
        fate = self.fates[order.request_id]
        request = fate.request
        fate.worker = order.worker
        engine.admit(
            Job(request.id, request.prompt, request.hashes, request.answer, request.max_tokens), order.priority
        )
        if not self._working[order.worker]:
            self._begin(order.worker)

    def _begin(self, worker: int) -> None:
        seconds = self.engines[worker].begin()
        self._working[worker] = seconds is not None
        if seconds is not None:
            self._at(self.now + seconds, self._end, worker)

    def _end(self, worker: int) -> None:
        step = self.engines[worker].end()
        self._at(self.now + HOP_S, self._told, worker, step)
        self._begin(worker)

    def _told(self, worker: int, step: Step) -> None:
        for job in step.first:
            fate = self.fates[job.id]
            fate.first, fate.cached = self.now, job.cached
        for job in step.finished:
            fate = self.fates[job.id]
            fate.ended = self.now
            self._over(fate)
        self._obey(self._dispatcher.stepped(worker, step, self.engines[worker], self.now))

    def _over(self, fate: Fate) -> None:
        self._open -= 1
        following = self._workload.after(fate, self.now)
        if following is not None:
            self._expect(*following)
