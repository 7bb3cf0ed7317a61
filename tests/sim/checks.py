"""What must hold at every moment of a run. Each check keeps books of its own and trusts none of the code's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.link import Link
from gateway.session import Sessions
from llmos.internal.v1 import journal_pb2, requests_pb2, work_pb2
from scheduler import charges
from scheduler.process import SchedulerProcess
from scheduler.reign import Reign
from scheduler.requests import LiveRequest
from scheduler.workers import LOADED, WorkerView
from tests.sim.bills import Paid
from tests.sim.copies import Follower
from tests.sim.reign_books import ReignBooks
from tests.sim.trace import Trace
from tests.sim.vloop import START
from tests.sim.worker_books import Epoch, WorkerBooks, epoch_of
from worker.backends.echo import EchoBackend
from worker.core import WorkerCore

if TYPE_CHECKING:
    from tests.sim.connections import Connection
    from tests.sim.nodes import SimProcess

_charge = charges._charge
_MOST = 20
_SETTLES_S = 8.0
"""After the last fault, until everybody is connected again."""
_STOPS_S = 0.5
"""So long after its client is gone a request may go on, in a fleet at peace."""


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold."""

    invariant: str
    detail: str
    at_s: float


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
    paid: dict[bytes, Paid] = field(default_factory=dict)
    """What had been paid for a request when a record of the journal was made."""
    denied: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often leaders have answered that nothing is remembered, by tenant and name."""
    given: set[tuple[str, int]] = field(default_factory=set)
    """Claims to streams, of all leaders."""
    refused: Counter[str] = field(default_factory=Counter)
    """How often leaders have given up a request with good cause, by the name inside that it had first."""
    gone: dict[str, float] = field(default_factory=dict)
    """Requests, by the name inside that they had first, whose clients are not connected, and since when."""
    disturbed_until: float = START + _SETTLES_S
    """Everybody is connected after that."""

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
        begin, replica, told = process.seat._begin, process.follower.replica, Follower()
        begin_copy, take = replica.begin, replica.take

        def watched(term: int) -> Reign:
            inheritance = told.bequeath(term, self.clock(), replica._ttl_s)
            reign = begin(term)
            self.trace.say(f"{name} leads in term {term}, and begins with {len(inheritance.entries)} streams")
            self.counts["inherited"] += len(inheritance.entries)
            self.reigns.append(reign)
            ReignBooks(self, name, reign, inheritance)
            return reign

        def begun() -> None:
            told.begin()
            begin_copy()

        def taken(batch: journal_pb2.FollowResponse, now: float) -> None:
            right = told.take(batch, now, self.paid)
            try:
                take(batch, now)
            except Exception as error:
                if right:
                    self.fail("a follower takes what it is told", f"{name}: {type(error).__name__}: {error}")
                raise

        process.seat._begin = watched
        replica.begin, replica.take = begun, taken  # type: ignore[method-assign]

    def hung_up(self, connection: Connection) -> None:
        """A client closes its connection: its gateway must let go of the stream as soon as it has its turn."""

        def over(_: asyncio.Task[None]) -> None:
            sessions, stream = connection.gateway.sessions, connection.stream
            if sessions is not None and stream is not None and stream in sessions._streams.values():
                self.fail("nothing is computed for who is gone", f"{connection.gateway.name} keeps {stream.inner_id}")

        assert connection.handler is not None
        connection.handler.add_done_callback(over)

    def disturbed(self, lasts_s: float) -> None:
        """A fault begins."""
        self.disturbed_until = max(self.disturbed_until, self.clock() + lasts_s + _SETTLES_S)

    def computed(self, request_id: str, worker: str) -> None:
        """A worker has made output."""
        since = self.gone.get(request_id.partition("~")[0])
        if since is not None and self.clock() > max(since, self.disturbed_until) + _STOPS_S:
            self.fail("nothing is computed for who is gone", f"{request_id} on {worker}")

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
