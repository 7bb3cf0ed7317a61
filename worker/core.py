"""What a worker decides: which commands it obeys, what becomes of its attempts, what it tells the scheduler.

No I/O and no tasks: the servicer and the engine link call it, in one event loop, and carry its decisions out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from llmos.clock import Clock
from llmos.errors import AttemptLost, EngineLost, FleetError, InvalidRequest, LlmosError, StaleTerm, Unavailable
from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import fleet_pb2
from worker import wire
from worker.attempts import AttemptTable, Running, Verdict, cancel_of, failure_of
from worker.backend import Epoch
from worker.cache_view import CacheView
from worker.outbox import Outbox
from worker.shelf import Shelf
from worker.spans import ExecuteSpans

log = logging.getLogger(__name__)


class CommandSink(Protocol):
    """Where commands for the engine go."""

    def send(self, commands: Iterable[work_pb2.Command]) -> None:
        """Hand over in order, without waiting. Raises Unavailable if no engine takes them now."""
        ...


class Stream(Protocol):
    """A scheduler's stream, as the servicer holds it."""

    @property
    def term(self) -> int:
        """The term under which it was opened."""
        ...

    def wake(self) -> None:
        """There is something to send."""
        ...

    def replace(self, error: LlmosError) -> None:
        """End the stream with this error: a newer one took its place."""
        ...


@dataclass(slots=True)
class _EngineState:
    """What the engine said last. Steps never run backwards, though a new process counts from 0."""

    fingerprint: str = ""
    ready: bool = False
    busy: bool = False
    step: int = 0
    steps_before: int = 0


class WorkerCore:
    """One worker's state. Implements `worker.engine_link.EngineListener`."""

    def __init__(
        self, worker_id: str, shelf: Shelf, spans: ExecuteSpans, clock: Clock, *, orphan_s: float = 10.0
    ) -> None:
        self.worker_id = worker_id
        self._shelf = shelf
        self._spans = spans
        self._clock = clock
        self._orphan_s = orphan_s
        self._table = AttemptTable()
        self._outbox = Outbox()
        self._cache = CacheView()
        self._engine: CommandSink | None = None
        self._state = _EngineState()
        self._stream: Stream | None = None
        self._highest_term = 0
        self._fenced = 0
        """Streams and batches of lower terms that no frame has told of."""
        self._alone_since = clock.monotonic()
        self._leaving = self._emptied = self._announced_drain = False
        self._restart = work_pb2.Drain()
        self.on_restart: Callable[[work_pb2.Drain], None] = lambda order: None
        """Told when this worker is to be started afresh."""
        self.uses: list[fleet_pb2.ResourceUse] = []
        """What its processes use, for the next frame."""

    def connect(self, engine: CommandSink) -> None:
        """Where commands go; once, before the engine is ready."""
        self._engine = engine

    @property
    def idle(self) -> bool:
        """Nothing runs, and what was computed is acknowledged, or nobody is there to acknowledge it."""
        return len(self._table) == 0 and (self._outbox.empty or self._stream is None)

    @property
    def counts(self) -> Counter[str]:
        """Dispatches by verdict, and late pieces of the engine."""
        return self._table.counts

    # From the scheduler

    def attach(self, request: work_pb2.AttachRequest, stream: Stream) -> work_pb2.WorkerReport:
        """A scheduler opens a stream, which replaces an older one. Raises FleetError, InvalidRequest, Unavailable."""
        if not request.commands or request.commands[0].WhichOneof("order") != "hello":
            raise InvalidRequest("The stream must begin with hello.")
        if request.commands[0].hello.worker_id not in ("", self.worker_id):
            raise AttemptLost("Another worker listens at this address.")
        if not self._state.fingerprint:
            raise Unavailable("The engine is starting.")
        self._fence(request.term)
        if self._stream is not None:
            # A leader whose own new stream took over must not conclude that its term is over.
            kind = StaleTerm if request.term > self._stream.term else FleetError
            if kind is StaleTerm:
                self._fenced += 1
                log.warning("the stream of a lower term, %d, is ended: %d leads", self._stream.term, request.term)
            self._stream.replace(kind("A newer stream of a scheduler took over."))
        self._stream = stream
        self._outbox.attach(lambda request_id, epoch: not self._table.is_cancelled(request_id, epoch))
        self._cache.attach()
        log.info("scheduler %s attached, term %d", request.commands[0].hello.scheduler_id, request.term)
        report = self._report()
        self._obey(request.commands[1:])
        self._wake_if_sendable()
        return report

    def receive(self, request: work_pb2.AttachRequest, stream: Stream) -> None:
        """A batch of commands. Raises StaleTerm; batches of replaced streams are ignored."""
        self._fence(request.term)
        if stream is not self._stream:
            return
        self._outbox.acknowledge(request.acknowledged)
        self._obey(request.commands)
        self._wake_if_sendable()

    def detach(self, stream: Stream) -> None:
        """A stream ended. Attempts go on; see `tick`."""
        if stream is self._stream:
            self._stream = None
            self._alone_since = self._clock.monotonic()

    def tick(self) -> None:
        """Cancel attempts that no scheduler has asked about for `orphan_s`. Call it about once a second."""
        if self._stream is not None or self._clock.monotonic() - self._alone_since < self._orphan_s:
            return
        orphans = list(self._table.running)
        if orphans:
            log.warning("cancelling %d attempts: no scheduler for %.0f s", len(orphans), self._orphan_s)
        self._to_engine([command for orphan in orphans for command in self._stop(orphan.request_id, orphan.epoch)])

    def drain(self) -> None:
        """The worker is about to leave: take nothing new, finish what runs. No order undoes that."""
        self._leaving = True
        self._wake()

    @property
    def draining(self) -> bool:
        """Nothing new is taken: the worker is about to leave, or was ordered to empty itself."""
        return self._leaving or self._emptied

    def leave(self) -> None:
        """The worker goes: end the scheduler's stream, after everything that was sent on it."""
        if self._stream is not None:
            self._stream.replace(Unavailable("The worker is leaving."))

    # To the scheduler

    @property
    def sendable(self) -> bool:
        """Whether the next frame would say something new."""
        return self._outbox.sendable or self._shelf.changed or self.draining != self._announced_drain

    def next_frame(self) -> work_pb2.WorkFrame:
        """The next frame of the present stream: pieces, state, spans."""
        frame = self._outbox.take()
        frame.step = self._state.step
        frame.busy = self._state.busy or len(self._table) > 0
        frame.draining = self._announced_drain = self.draining
        frame.fenced, self._fenced = self._fenced, 0
        frame.models.extend(self._shelf.take_changes())
        frame.spans.extend(self._spans.drain())
        frame.uses.extend(self.uses)
        self.uses = []
        frame.cache.extend(self._cache.take())
        self._wake_if_sendable()
        return frame

    # From the engine

    def engine_ready(self, report: work_pb2.WorkerReport) -> None:
        """See `EngineListener`. Models that were ordered are loaded again."""
        self._state.fingerprint = report.numerics_fingerprint
        self._state.ready = True
        self._to_engine([work_pb2.Command(load=order) for order in self._shelf.orders])

    def engine_frame(self, frame: work_pb2.WorkFrame) -> None:
        """See `EngineListener`."""
        self._state.step = self._state.steps_before + frame.step
        self._state.busy = frame.busy
        for model in frame.models:
            self._shelf.engine_said(model)
        for span in frame.spans:
            self._spans.stage(span)
        for change in frame.cache:
            self._cache.change(change)
        taken = [output for output in frame.outputs if self._take_output(output)]
        for failure in frame.failures:
            self._fail(failure.request_id, wire.epoch_from_wire(failure.epoch), failure)
        self._outbox.add_frame(frame, taken)
        self._wake_if_sendable()

    def engine_lost(self, reason: str) -> None:
        """See `EngineListener`. Attempts die with the engine; the scheduler places them anew."""
        self._shelf.engine_lost(ready=self._state.ready)
        self._state.ready = self._state.busy = False
        self._state.steps_before = self._state.step
        self._cache.forget_all()
        error = EngineLost(f"The worker's engine ended ({reason}).")
        for running in list(self._table.running):
            self._fail(running.request_id, running.epoch, failure_of(running.request_id, running.epoch, error))
        self._wake()

    # Decisions

    def _fence(self, term: int) -> None:
        if term < self._highest_term:
            self.counts["stale_term"] += 1
            self._fenced += 1
            log.warning("a message of a lower term, %d, is refused: %d was seen", term, self._highest_term)
            raise StaleTerm(f"Term {term} is over; {self._highest_term} was seen.")
        self._highest_term = term

    def _report(self) -> work_pb2.WorkerReport:
        running = {(attempt.request_id, attempt.epoch) for attempt in self._table.running}
        return work_pb2.WorkerReport(
            worker_id=self.worker_id,
            highest_term=self._highest_term,
            running=[
                work_pb2.RunningAttempt(request_id=request_id, epoch=wire.epoch_to_wire(epoch))
                for request_id, epoch in sorted(running | self._outbox.attempts(), key=_in_order)
            ],
            models=self._shelf.all(),
            numerics_fingerprint=self._state.fingerprint,
            draining=self.draining,
            drain_reason=self._restart.reason,
            drain_detail=self._restart.detail,
        )

    def _obey(self, commands: Iterable[work_pb2.Command]) -> None:
        forward: list[work_pb2.Command] = []
        for command in commands:
            match command.WhichOneof("order"):
                case "dispatch":
                    forward.extend(self._dispatch(command))
                case "cancel":
                    cancel = command.cancel
                    forward.extend(self._stop(cancel.request_id, wire.epoch_from_wire(cancel.epoch)))
                case "finish":
                    forward.extend(self._finish(command))
                case "set_priority":
                    change = command.set_priority
                    running = self._table.get(change.request_id)
                    if running is not None and running.epoch == wire.epoch_from_wire(change.epoch):
                        forward.append(command)
                case "load":
                    order = self._shelf.order(command.load)
                    forward.extend([work_pb2.Command(load=order)] if order is not None and self._state.ready else [])
                case "unload":
                    forward.extend(self._unload(command))
                case "drain":
                    self._emptied = not command.drain.undo
                    if command.drain.restart and not self._restart.restart:
                        self._restart = command.drain
                        self.on_restart(command.drain)
                    self._wake()
                case "resend_cache":
                    self._cache.resend(command.resend_cache.model)
                    self._wake()
        self._to_engine(forward)

    def _dispatch(self, command: work_pb2.Command) -> Iterable[work_pb2.Command]:
        dispatch = command.dispatch
        request_id, epoch = dispatch.request.request_id, wire.epoch_from_wire(dispatch.epoch)
        verdict = self._table.judge(dispatch, self._clock.monotonic())
        if verdict is Verdict.STALE:
            error: LlmosError = StaleTerm("A newer attempt at this request is known.")
            self._outbox.add_failure(failure_of(request_id, epoch, error))
        if verdict not in (Verdict.BEGIN, Verdict.REPLACE):
            return []
        refusal = self._refusal(dispatch.request.model, dispatch.request.adapter, verdict)
        if refusal is not None:
            self._outbox.add_failure(failure_of(request_id, epoch, refusal))
            return []
        older = self._table.get(request_id)
        if older is not None:
            self._spans.end(request_id, older.epoch, "replaced")
            self._outbox.drop(request_id, older.epoch)
        running = self._table.begin(dispatch)
        self._spans.begin(dispatch)
        if not running.open_choices:
            self._complete(running)
            return [] if older is None else [cancel_of(older)]
        return [command]

    def _refusal(self, model: str, adapter: str, verdict: Verdict) -> LlmosError | None:
        """What is the worker's doing, and none of the request's, is a lost attempt: it moves on at no cost."""
        if self.draining and verdict is Verdict.BEGIN:  # what runs here may go on here, under a new leader too
            return AttemptLost("The worker takes nothing new.")
        missing = next((name for name in (model, adapter) if name and not self._shelf.loaded(name)), "")
        if not missing and self._state.ready:
            return None
        kind = AttemptLost if not missing or self._shelf.ordered(missing) else Unavailable
        return kind(f"The model {missing or model} is not loaded here.")

    def _stop(self, request_id: str, epoch: Epoch) -> Iterable[work_pb2.Command]:
        running = self._table.get(request_id)
        self._outbox.drop(request_id, epoch)
        if not self._table.cancel(request_id, epoch, self._clock.monotonic()) or running is None:
            return []
        self._spans.end(request_id, running.epoch, "cancelled")
        return [cancel_of(running)]

    def _finish(self, command: work_pb2.Command) -> Iterable[work_pb2.Command]:
        finish = command.finish
        running = self._table.get(finish.request_id)
        if running is None:
            return []
        if self._table.keep(finish.request_id, finish.choice, finish.keep_until):
            self._complete(running)
        return [command]

    def _unload(self, command: work_pb2.Command) -> Iterable[work_pb2.Command]:
        name = command.unload.model
        self._shelf.unload(name, in_engine=self._state.ready)
        self._cache.forget(name)
        error = AttemptLost(f"The model {name} was unloaded.")
        for running in [running for running in self._table.running if running.uses(name)]:
            self._fail(running.request_id, running.epoch, failure_of(running.request_id, running.epoch, error))
        return [command]

    def _take_output(self, output: request_pb2.Output) -> bool:
        """Whether it is the next piece of an attempt that runs."""
        running = self._table.get(output.request_id)
        said = output.epoch
        if running is None or (running.epoch.term, running.epoch.attempt) != (said.term, said.attempt):
            self.counts["late"] += 1
            return False
        if output.index != running.next_index(output.choice):
            error = AttemptLost("The engine left a gap in its output.")
            self._fail(output.request_id, running.epoch, failure_of(output.request_id, running.epoch, error))
            self._to_engine([cancel_of(running)])
            return False
        if self._table.advance(output):
            self._complete(running)
        return True

    def _complete(self, running: Running) -> None:
        self._table.end(running.request_id, self._clock.monotonic())
        self._spans.end(running.request_id, running.epoch)

    def _fail(self, request_id: str, epoch: Epoch, failure: request_pb2.Failure) -> None:
        running = self._table.get(request_id)
        if running is None or running.epoch != epoch:
            return
        self._table.end(request_id, self._clock.monotonic())
        self._spans.end(request_id, epoch, failure.code)
        self._outbox.add_failure(failure)

    def _to_engine(self, commands: list[work_pb2.Command]) -> None:
        if not commands or self._engine is None:
            return
        try:
            self._engine.send(commands)
        except Unavailable as error:
            for command in commands:
                if command.WhichOneof("order") == "dispatch":
                    request_id, epoch = command.dispatch.request.request_id, command.dispatch.epoch
                    failure = failure_of(request_id, wire.epoch_from_wire(epoch), AttemptLost(error.message))
                    self._fail(request_id, wire.epoch_from_wire(epoch), failure)

    def _wake_if_sendable(self) -> None:
        if self.sendable:
            self._wake()

    def _wake(self) -> None:
        if self._stream is not None:
            self._stream.wake()


def _in_order(entry: tuple[str, Epoch]) -> tuple[str, int, int]:
    """By request and epoch: one request may have two, of which the older one's output is still unacknowledged."""
    request_id, epoch = entry
    return (request_id, epoch.term, epoch.attempt)
