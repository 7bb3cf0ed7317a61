"""What must hold at every moment of a run. Each check keeps books of its own and trusts none of the code's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.link import Link
from gateway.session import Sessions
from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
from scheduler import charges, events
from scheduler.commands import RequestOver, SendOutput, StartAttempt
from scheduler.process import SchedulerProcess
from scheduler.reign import Reign
from scheduler.requests import LiveRequest, blocks_needed
from scheduler.workers import LOADED, WorkerView
from tests.sim.bills import Bills
from tests.sim.hedge_books import HedgeBooks
from tests.sim.trace import Trace
from tests.sim.trust_books import TrustBooks
from worker.backends.echo import EchoBackend
from worker.core import WorkerCore

if TYPE_CHECKING:
    from tests.sim.nodes import SimProcess

_charge = charges._charge
Epoch = tuple[int, int]
_MOST = 20


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold."""

    invariant: str
    detail: str
    at_s: float


def epoch_of(message: Any) -> Epoch:
    """`(term, attempt)` of a message's epoch."""
    return (message.epoch.term, message.epoch.attempt)


@dataclass(eq=False)
class Checks:
    """All books of one run."""

    clock: Callable[[], float]
    trace: Trace
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    reigns: list[Reign] = field(default_factory=list)
    workers: dict[str, WorkerBooks] = field(default_factory=dict)
    gateways: dict[str, GatewayBooks] = field(default_factory=dict)
    bills: dict[int, float] = field(default_factory=dict)
    """Tokens charged for each live request, by its address: `Bills` keeps it alive."""

    def fail(self, invariant: str, detail: str) -> None:
        """Note a violation."""
        self.trace.say(f"VIOLATION {invariant}: {detail}")
        if len(self.violations) < _MOST:
            self.violations.append(Violation(invariant, detail, self.clock()))

    def charge(self, live: LiveRequest, tokens: float) -> None:
        """In the place of `scheduler.charges._charge`."""
        self.bills[id(live)] = self.bills.get(id(live), 0.0) + tokens
        _charge(live, tokens)

    def started(self, process: SimProcess) -> None:
        """A process begins; what its predecessor knew is gone."""
        self.trace.say(f"start {process.name}")

    def scheduler(self, name: str, process: SchedulerProcess) -> None:
        """Follow every reign of a scheduler."""
        begin = process.seat._begin

        def watched(term: int) -> Reign:
            reign = begin(term)
            self.trace.say(f"{name} leads in term {term}")
            self.reigns.append(reign)
            ReignBooks(self, name, reign)
            return reign

        process.seat._begin = watched

    def worker(self, name: str, core: WorkerCore) -> None:
        """Follow a worker's life."""
        self.workers[name] = WorkerBooks(self, name, core)

    def engine(self, name: str, backend: EchoBackend) -> None:
        """Follow an engine's life."""
        self.workers[name].engine_began(backend)

    def obeyed(self, name: str, orders: Iterable[work_pb2.Command]) -> None:
        """An engine is about to obey."""
        self.workers[name].obeyed(orders)

    def stepped(self, name: str, frame: work_pb2.WorkFrame) -> None:
        """An engine made a step."""
        self.workers[name].stepped(frame)

    def gateway(self, name: str, link: Link, sessions: Sessions) -> GatewayBooks:
        """Follow a gateway; returns the receiver for its link."""
        self.gateways[name] = GatewayBooks(self, name, sessions)
        return self.gateways[name]


class ReignBooks:
    """One leader's core: what it accepts ends once, a cancel is final, capacity is kept, outputs go to who asked."""

    def __init__(self, checks: Checks, name: str, reign: Reign) -> None:
        self._checks, self._name, self._reign = checks, name, reign
        self._state = reign.core.state
        self._accepted: set[str] = set()
        self._cancelled: set[str] = set()
        self._owner: dict[str, int] = {}
        self._bills = Bills(self._state, checks.bills, checks.fail)
        self._epochs: dict[str, Epoch] = {}
        """Of the last attempt begun; of two, the older one's."""
        self._known: dict[str, dict[int, int]] = {}
        """Tokens of each choice that this leader has been told of or has sent."""
        self._trust = TrustBooks(self._state, checks.fail)
        self._hedges = HedgeBooks(self._state, checks.counts, checks.fail)
        self._handle = reign.core.handle
        reign.core.handle = self.handle  # type: ignore[method-assign]

    def handle(self, event: events.Event, now: float) -> list[Any]:
        """In the core's place."""
        submitted = event.request.request_id if isinstance(event, events.Submitted) else ""
        fresh = bool(submitted) and submitted not in self._accepted
        if submitted:
            self._accepted.add(submitted)
            self._hedges.submitted(event)  # type: ignore[arg-type]
            for held in event.request.resume:  # type: ignore[union-attr]
                self._knows(submitted, held.choice, len(held.token_ids))
        self._trust.before(event, now)
        try:
            commands = self._handle(event, now)
        except Exception as error:
            self._checks.fail("the core never fails", f"{type(event).__name__}: {type(error).__name__}: {error}")
            raise
        if submitted and submitted in self._state.requests:
            live = self._state.requests[submitted]
            self._owner[submitted] = live.stream_id
            if fresh:
                self._bills.accepted(event, live, now)  # type: ignore[arg-type]
            if self._owner[submitted] != event.stream_id and fresh:  # type: ignore[union-attr]
                self._checks.fail("outputs go to who asked", f"{submitted} bound to another stream")
        for command in commands:
            self._hedges.look(command, event, commands)
            self._look(command)
        self._trust.after(commands, now)
        if fresh and submitted not in self._state.requests:
            self._accepted.discard(submitted)
        if isinstance(event, events.Cancelled | events.Killed) and event.request_id not in self._state.requests:
            self._cancelled.add(event.request_id)
        self._capacity()
        return commands

    def _knows(self, request_id: str, choice: int, tokens: int) -> None:
        known = self._known.setdefault(request_id, {})
        known[choice] = max(tokens, known.get(choice, 0))

    def _look(self, command: Any) -> None:
        checks = self._checks
        if isinstance(command, SendOutput):
            output = command.output
            self._knows(output.request_id, output.choice, output.index + len(output.token_ids))
            least = max(self._epochs.get(output.request_id, (0, 0)), self._hedges.lowest(output.request_id))
            if epoch_of(output) < least:
                checks.fail("no lower term after a higher one", f"{output.request_id}: {epoch_of(output)} is over")
            owner = self._owner.get(command.output.request_id)
            if owner is not None and owner != command.stream_id:
                checks.fail("outputs go to who asked", f"{command.output.request_id} sent to {command.stream_id}")
        elif isinstance(command, StartAttempt):
            request_id = command.request.request_id
            checks.counts["attempts"] += 1
            self._epochs[request_id] = self._hedges.lowest(request_id)
            resumed = {one.choice: one for one in command.resume}
            for choice, known in self._known.get(request_id, {}).items():
                held = resumed.get(choice)
                if held is None or (len(held.token_ids) < known and not held.finished):
                    checks.fail("work goes on where it was", f"{request_id}: choice {choice} from before {known}")
            if request_id in self._cancelled:
                checks.fail("a cancel is final", f"{request_id} dispatched by {self._name} after its cancel")
            if request_id not in self._accepted:
                checks.fail("exactly one end", f"{request_id} dispatched after its end")
        elif isinstance(command, RequestOver):
            if command.request_id not in self._accepted:
                checks.fail("exactly one end", f"{command.request_id} ended twice")
            self._accepted.discard(command.request_id)
            self._known.pop(command.request_id, None)
            self._bills.over(command.request_id, command.error, self._state.now)

    def _capacity(self) -> None:
        for worker in self._state.workers.values():
            for slot in worker.slots.values():
                held = sum(one.blocks for one in worker.running.values() if one.model == slot.key[0])
                if held != slot.held or not 0 <= slot.promised <= slot.held:
                    self._checks.fail("blocks are conserved", f"{worker.id}: {held} run, {slot.held} held")
                if slot.state == LOADED and slot.held > slot.total_blocks:
                    self._checks.fail("capacity is never exceeded", f"{worker.id}: {slot.held} of {slot.total_blocks}")


class WorkerBooks:
    """One worker: no lower term is obeyed, nothing cancelled goes on, nothing is computed twice, blocks are enough."""

    def __init__(self, checks: Checks, name: str, core: WorkerCore) -> None:
        self._checks, self._name, self.core = checks, name, core
        self.backend: EchoBackend | None = None
        self._highest = 0
        self._attached: Counter[int] = Counter()
        self._told: dict[str, tuple[Epoch, int]] = {}
        """Cancels that have reached the worker, and steps that computed something all the same."""
        self._forbidden: set[tuple[str, Epoch]] = set()
        """Dispatches that came after the cancel of their epoch."""
        self._stopped: dict[str, Epoch] = {}
        """Cancels that have reached the engine."""
        self._made: set[tuple[str, Epoch, int, int]] = set()
        self._demand: dict[str, tuple[Epoch, int]] = {}
        self._attach, self._receive = core.attach, core.receive
        core.attach, core.receive = self.attach, self.receive  # type: ignore[method-assign]

    def attach(self, request: work_pb2.AttachRequest, stream: Any) -> work_pb2.WorkerReport:
        """In the core's place."""
        report = self._attach(request, stream)
        self._attached[request.term] += 1
        self._accepted(request)
        return report

    def receive(self, request: work_pb2.AttachRequest, stream: Any) -> None:
        """In the core's place."""
        current = self.core._stream is stream
        try:
            self._receive(request, stream)
        except Exception:
            self._checks.counts["stale_refused"] += 1
            raise
        if current:
            self._accepted(request)

    def _accepted(self, request: work_pb2.AttachRequest) -> None:
        if request.term < self._highest:
            self._checks.fail("no lower term after a higher one", f"{self._name} obeyed term {request.term}")
        self._highest = max(self._highest, request.term)
        for command in request.commands:
            kind = command.WhichOneof("order")
            if kind == "cancel":
                self._told[command.cancel.request_id] = (epoch_of(command.cancel), 0)
            elif kind == "dispatch":
                dispatched = command.dispatch.request.request_id, epoch_of(command.dispatch)
                if dispatched[1] <= self._told.get(dispatched[0], ((0, 0), 0))[0]:
                    self._forbidden.add(dispatched)

    def engine_began(self, backend: EchoBackend) -> None:
        """A fresh engine runs nothing."""
        self.backend = backend
        self._stopped.clear()
        self._made.clear()
        self._demand.clear()

    def obeyed(self, orders: Iterable[work_pb2.Command]) -> None:
        """Commands reach the engine."""
        for order in orders:
            kind = order.WhichOneof("order")
            if kind == "cancel":
                last = self._stopped.get(order.cancel.request_id, (0, 0))
                self._stopped[order.cancel.request_id] = max(last, epoch_of(order.cancel))
            elif kind == "dispatch":
                self._dispatched(order.dispatch)

    def _dispatched(self, dispatch: work_pb2.Dispatch) -> None:
        request, epoch = dispatch.request, epoch_of(dispatch)
        if (request.request_id, epoch) in self._forbidden:
            self._checks.fail("a cancel is final", f"{request.request_id} {epoch} began on {self._name} after it")
        done = sum(one.finished for one in request.resume)
        self._demand[request.request_id] = (epoch, blocks_needed(request, max(1, request.choices) - done))

    def stepped(self, frame: work_pb2.WorkFrame) -> None:
        """An engine's step."""
        for output in frame.outputs:
            self._output(output)
        backend = self.backend
        assert backend is not None
        for pool in backend._pools.values():
            used = sum(one.blocks for run in pool.runs.values() for one in run.sequences.values())
            if pool.free < 0 or pool.free + used != pool.total:
                self._checks.fail("blocks are conserved", f"{self._name}: {pool.free} free, {used} used")
            self._promises(pool.runs, pool.total)

    def _output(self, output: request_pb2.Output) -> None:
        epoch, request_id = epoch_of(output), output.request_id
        if epoch <= self._stopped.get(request_id, (0, 0)):
            self._checks.fail("work after a cancel is one step at most", f"{request_id} on {self._name}: engine")
        told = self._told.get(request_id)
        if told is not None and epoch <= told[0]:
            self._told[request_id] = (told[0], told[1] + 1)
            if told[1] >= 1 + max(1, output.choice + 1):
                self._checks.fail("work after a cancel is one step at most", f"{request_id} on {self._name}")
        for offset in range(len(output.token_ids)):
            place = (request_id, epoch, output.choice, output.index + offset)
            if place in self._made:
                self._checks.fail("nothing is computed twice", f"{place} on {self._name}")
            self._made.add(place)
        self._checks.counts["tokens_computed"] += len(output.token_ids)

    def _promises(self, runs: Iterable[str], total: int) -> None:
        """One unbroken stream's dispatches never need more than there is."""
        term = self._highest
        if self._attached[term] != 1:
            return
        mine = [self._demand[one] for one in runs if one in self._demand]
        wanted = sum(blocks for epoch, blocks in mine if epoch[0] == term)
        if wanted > total:
            self._checks.fail("capacity is never exceeded", f"{self._name}: {wanted} of {total} blocks promised")


class GatewayBooks:
    """One gateway: terms only rise, and so do the epochs of what a stream takes. Implements `gateway.link.Receiver`."""

    def __init__(self, checks: Checks, name: str, sessions: Sessions) -> None:
        self._checks, self._name, self.sessions = checks, name, sessions
        self.term = 0
        self.alone_s = 0.0
        """Longest time without a leader."""
        self._lost_at: float | None = None
        self._epochs: dict[str, Epoch] = {}

    @property
    def longest_alone_s(self) -> float:
        """Longest time without a leader, the present one included."""
        now = 0.0 if self._lost_at is None else self._checks.clock() - self._lost_at
        return max(self.alone_s, now)

    def on_connected(self, term: int) -> Iterable[requests_pb2.Submit]:
        """See `Receiver`."""
        if term < self.term:
            self._checks.fail("no lower term after a higher one", f"{self._name} follows term {term}")
        self.term = term
        self.alone_s = self.longest_alone_s
        self._lost_at = None
        return self.sessions.on_connected(term)

    def on_lost(self) -> None:
        """See `Receiver`."""
        self._lost_at = self._checks.clock()
        self.sessions.on_lost()

    def on_catalogue(self, catalogue: requests_pb2.Catalogue, term: int) -> None:
        """See `Receiver`."""
        self.sessions.on_catalogue(catalogue, term)

    def on_frame(self, frame: requests_pb2.GatewayFrame) -> None:
        """See `Receiver`: piece by piece, to see what is taken."""
        for output in frame.outputs:
            stream = self.sessions._streams.get(output.request_id)
            before = stream.transcript.completion_tokens if stream is not None else 0
            self.sessions.on_frame(requests_pb2.GatewayFrame(outputs=[output]))
            if stream is None or stream.transcript.completion_tokens == before:
                continue
            epoch = epoch_of(output)
            if epoch < self._epochs.get(output.request_id, (0, 0)):
                self._checks.fail("no lower term after a higher one", f"{output.request_id} took {epoch}")
            self._epochs[output.request_id] = max(epoch, self._epochs.get(output.request_id, (0, 0)))
        if frame.failures:
            self.sessions.on_frame(requests_pb2.GatewayFrame(failures=frame.failures))


def is_settled(worker: WorkerView) -> bool:
    """Registered, connected, its models loaded, nothing left of what it ran."""
    loaded = all(slot.state == LOADED for slot in worker.slots.values())
    return worker.registered and worker.connected and loaded
