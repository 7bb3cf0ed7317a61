"""What workers may do: obey no lower term, go on with nothing cancelled, compute nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmos.internal.v1 import request_pb2, work_pb2
from scheduler.requests import blocks_needed
from worker.backends.echo import EchoBackend
from worker.core import WorkerCore

if TYPE_CHECKING:
    from tests.sim.checks import Checks

Epoch = tuple[int, int]


def epoch_of(message: Any) -> Epoch:
    """`(term, attempt)` of a message's epoch."""
    return (message.epoch.term, message.epoch.attempt)


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
        self._checks.computed(request_id, self._name)

    def _promises(self, runs: Iterable[str], total: int) -> None:
        """One unbroken stream's dispatches never need more than there is."""
        term = self._highest
        if self._attached[term] != 1:
            return
        mine = [self._demand[one] for one in runs if one in self._demand]
        wanted = sum(blocks for epoch, blocks in mine if epoch[0] == term)
        if wanted > total:
            self._checks.fail("capacity is never exceeded", f"{self._name}: {wanted} of {total} blocks promised")
