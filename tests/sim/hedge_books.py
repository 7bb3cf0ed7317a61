"""Two attempts of one request: only before there is output, on two workers, and the first output ends the other one.
Books of one leader's core, kept apart from its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from scheduler import events
from scheduler.commands import AttemptOver, Order, RequestOver, SendOutput, StartAttempt
from scheduler.state import State

Epoch = tuple[int, int]


class HedgeBooks:
    """Follows one core. `fail` notes a violation."""

    def __init__(self, state: State, counts: Counter[str], fail: Callable[[str, str], None]) -> None:
        self._state, self._counts, self._fail = state, counts, fail
        self._running: dict[str, dict[Epoch, str]] = {}
        """Attempts that are not over, oldest first, with their workers."""
        self._hedged: set[str] = set()
        self._spoken: set[str] = set()
        """Requests of which there is output."""

    def lowest(self, request_id: str) -> Epoch:
        """The oldest epoch that may still speak for a request; the lowest of all if none runs."""
        return next(iter(self._running.get(request_id, ())), (0, 0))

    def submitted(self, event: events.Submitted) -> None:
        """A request comes, perhaps with output."""
        if any(one.token_ids for one in event.request.resume):
            self._spoken.add(event.request.request_id)

    def look(self, command: Any, event: events.Event, commands: list[Any]) -> None:
        """One of the commands that an event led to."""
        if isinstance(command, StartAttempt):
            self._began(command)
        elif isinstance(command, AttemptOver):
            self._over(command, event, commands)
        elif isinstance(command, SendOutput):
            self._sent(command)
        elif isinstance(command, RequestOver):
            for books in (self._hedged, self._spoken):
                books.discard(command.request_id)
            if self._running.pop(command.request_id, None):
                self._fail("two attempts, one commits", f"{command.request_id} is over, an attempt is not")

    def _began(self, command: StartAttempt) -> None:
        request_id = command.request.request_id
        running = self._running.setdefault(request_id, {})
        if running:
            self._counts["hedges"] += 1
            alike = len(running) > 1 or command.worker_id in running.values() or request_id in self._hedged
            if alike or request_id in self._spoken or command.resume or self._state.requests[request_id].suspect:
                self._fail("two attempts, one commits", f"{request_id}: {command.epoch.attempt} beside {running}")
            self._hedged.add(request_id)
        running[command.epoch.term, command.epoch.attempt] = command.worker_id

    def _over(self, command: AttemptOver, event: events.Event, commands: list[Any]) -> None:
        running = self._running.get(command.request_id, {})
        epoch = next((one for one in running if one[1] == command.attempt), None)
        if epoch is None:
            self._fail("two attempts, one commits", f"{command.request_id}: {command.attempt} ended, {running} run")
            return
        worker_id = running.pop(epoch)
        # Another worker's output decided: this one goes on until it is told.
        if running and isinstance(event, events.WorkerFrame) and event.worker_id != worker_id:
            self._counts["hedges_decided"] += 1
            told = any(_cancels(one, worker_id, command.request_id, epoch) for one in commands)
            worker = self._state.workers.get(worker_id)
            if not told and worker is not None and worker.connected:
                self._fail("the loser is told at once", f"{command.request_id} {epoch} on {worker_id}")

    def _sent(self, command: SendOutput) -> None:
        output = command.output
        running = self._running.get(output.request_id, {})
        if output.token_ids:
            self._spoken.add(output.request_id)
        if len(running) > 1:
            self._fail("two attempts, one commits", f"{output.request_id}: output while {sorted(running)} run")
        if running and (output.epoch.term, output.epoch.attempt) not in running:
            self._fail("two attempts, one commits", f"{output.request_id}: output of neither of {sorted(running)}")


def _cancels(command: Any, worker_id: str, request_id: str, epoch: Epoch) -> bool:
    if not isinstance(command, Order) or command.worker_id != worker_id:
        return False
    cancel = command.command.cancel
    return cancel.request_id == request_id and (cancel.epoch.term, cancel.epoch.attempt) == epoch
