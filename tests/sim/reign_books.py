"""One leader's core: what it accepts ends once, a cancel is final, capacity is kept, output goes to who asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scheduler import events
from scheduler.commands import RequestOver, SendFailure, SendOutput, StartAttempt
from scheduler.reign import Reign
from scheduler.workers import LOADED
from tests.sim.bills import Bills
from tests.sim.copies import Copies
from tests.sim.hedge_books import HedgeBooks
from tests.sim.journal_books import JournalBooks, of_timers
from tests.sim.trust_books import TrustBooks
from tests.sim.worker_books import Epoch, epoch_of

if TYPE_CHECKING:
    from tests.sim.checks import Checks

_LATE_S = 0.5
"""Beyond a gateway's grace; a tick, and a clock that stands still while its node is frozen, are in it."""


class ReignBooks:
    """Stands before the core, and sees what goes in and comes out."""

    def __init__(self, checks: Checks, name: str, reign: Reign, inheritance: Copies) -> None:
        self._checks, self._name, self._reign = checks, name, reign
        self._state = reign.core.state
        self._accepted: set[str] = set()
        self._owner: dict[str, int] = {}
        self._streams: dict[str, int] = {}
        """Of gateways, by their ids."""
        self._lost: dict[int, float] = {}
        """Streams that have ended, and when."""
        self._bills = Bills(self._state, checks.bills, checks.fail)
        self._epochs: dict[str, Epoch] = {}
        """Of the last attempt begun; of two, the older one's."""
        self._known: dict[str, dict[int, int]] = {}
        """Tokens of each choice that this leader has been told of or has sent."""
        self._trust = TrustBooks(self._state, checks.fail, checks.refused)
        self._hedges = HedgeBooks(self._state, checks.counts, checks.fail)
        self._journal = JournalBooks(
            self._state,
            self._bills,
            lambda request_id: self._known.get(request_id, {}),
            checks.fail,
            checks.denied,
            checks.given,
            checks.paid,
            inheritance,
            checks.clock(),
        )
        self._grace_s = self._state.policy.gateway_grace_s + _LATE_S
        self._handle = reign.core.handle
        reign.core.handle = self.handle  # type: ignore[method-assign]

    def handle(self, event: events.Event, now: float) -> list[Any]:
        """In the core's place."""
        self._before(event, now)
        try:
            commands = self._handle(event, now)
        except Exception as error:
            self._checks.fail("the core never fails", f"{type(event).__name__}: {type(error).__name__}: {error}")
            raise
        late = commands[self._timers_first(event, commands, now) :]
        began = isinstance(event, events.Submitted) and self._submitted(event, late)
        for command in late:
            self._hedges.look(command, event, commands)
            self._look(command)
        self._journal.after(event, late, now, began)
        for command in late:
            if isinstance(command, RequestOver):
                self._known.pop(command.request_id, None)
        self._trust.after(commands, now)
        self._orphans(event, now)
        self._capacity()
        return commands

    def _timers_first(self, event: events.Event, commands: list[Any], now: float) -> int:
        """Take in what timers ended before the event's turn came; returns how many of the commands that were."""
        ends = [number for number, one in enumerate(commands) if isinstance(one, RequestOver) and of_timers(one, event)]
        early = commands[: ends[-1] + 1] if ends else []
        for command in early:
            self._hedges.look(command, event, commands)
            self._look(command)
            self._journal.begins_or_ends(command, now)
            if isinstance(command, RequestOver):
                self._known.pop(command.request_id, None)
        return len(early)

    def _before(self, event: events.Event, now: float) -> None:
        if isinstance(event, events.Submitted):
            self._hedges.submitted(event)
        elif isinstance(event, events.ChoiceFinished) and self._owner.get(event.request_id) == event.stream_id:
            self._bills.unwanted(event.request_id, event.choice, event.keep_until)
        self._journal.before(event, now)
        self._trust.before(event, now)

    def _submitted(self, event: events.Submitted, commands: list[Any]) -> bool:
        """Whether a request has been accepted that was not there before."""
        request_id = event.request.request_id
        fresh = request_id not in self._accepted
        self._accepted.add(request_id)
        ended = any(isinstance(one, RequestOver) and one.request_id == request_id for one in commands)
        if ended or not any(isinstance(one, SendFailure) for one in commands):  # who is refused keeps what it brought
            for held in event.request.resume:
                self._knows(request_id, held.choice, len(held.token_ids))
        live = self._state.requests.get(request_id)
        if live is None:
            if fresh and not ended:
                self._accepted.discard(request_id)
                self._known.pop(request_id, None)
            return fresh and ended
        self._owner[request_id] = live.stream_id
        if fresh:
            self._bills.accepted(event, live)
            if live.stream_id != event.stream_id:
                self._checks.fail("outputs go to who asked", f"{request_id} bound to another stream")
        return fresh

    def _orphans(self, event: events.Event, now: float) -> None:
        """Who lost its gateway has a moment to be taken up again, and no more."""
        if isinstance(event, events.GatewayConnected):
            before = self._streams.get(event.node.id)
            self._streams[event.node.id] = event.stream_id
            if before is not None:
                self._lost[before] = now
        elif isinstance(event, events.GatewayLost) and event.stream_id in self._streams.values():
            self._streams = {name: one for name, one in self._streams.items() if one != event.stream_id}
            self._lost[event.stream_id] = now
        for stream_id in [one for one, at in self._lost.items() if now > at + self._grace_s]:
            del self._lost[stream_id]
            left = [name for name in self._state.requests if self._owner.get(name) == stream_id]
            if left:
                self._checks.fail("nothing is computed for who is gone", f"{left} of a gateway that was lost")

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
            if request_id in self._journal.dead:
                checks.fail("a cancel is final", f"{request_id} dispatched by {self._name} after its cancel")
            if request_id not in self._accepted:
                checks.fail("exactly one end", f"{request_id} dispatched after its end")
        elif isinstance(command, RequestOver):
            if command.request_id not in self._accepted:
                checks.fail("exactly one end", f"{command.request_id} ended twice")
            self._accepted.discard(command.request_id)

    def _capacity(self) -> None:
        for worker in self._state.workers.values():
            for slot in worker.slots.values():
                held = sum(one.blocks for one in worker.running.values() if one.model == slot.key[0])
                if held != slot.held or not 0 <= slot.promised <= slot.held:
                    self._checks.fail("blocks are conserved", f"{worker.id}: {held} run, {slot.held} held")
                if slot.state == LOADED and slot.held > slot.total_blocks:
                    self._checks.fail("capacity is never exceeded", f"{worker.id}: {slot.held} of {slot.total_blocks}")
