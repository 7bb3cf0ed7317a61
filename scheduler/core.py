"""The scheduler's mind: `handle(event, now) -> commands`. Pure: no grpc, etcd, asyncio, telemetry, clock, randomness.

The same events at the same times give the same commands. One task calls it (`loop.py`); everything else turns the
outside world into events and carries commands out. Why: docs/decisions/0003-pure-core.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scheduler import (
    admission,
    dispatch,
    draining,
    events,
    frames,
    health,
    hedging,
    learning,
    lifecycle,
    members,
    overload,
    priorities,
    replication,
    stalls,
    takeover,
)
from scheduler.allocation import control
from scheduler.commands import Command
from scheduler.policy import Policy
from scheduler.state import Outbox, State

Handler = Callable[[State, Any, float, Outbox], None]
"""Changes the state, appends commands. Any: each handler takes the one event type that it is registered for."""


class Core:
    """One leader's reign: begins with an election, ends when somebody shows a higher term."""

    def __init__(self, scheduler_id: str, term: int, policy: Policy, now: float) -> None:
        self.state = State(scheduler_id, term, policy, elected_at=now)
        self.state.timers.at(now + policy.settle_s, events.Settled())
        self.state.timers.at(now + dispatch.SWEEP_S, events.Sweep())
        self.state.timers.at(now + policy.ledger_s, events.Rebalance())

    def handle(self, event: events.Event, now: float) -> list[Command]:
        """Take in one event. `now` is monotonic seconds and never decreases from call to call."""
        out: Outbox = []
        state = self.state
        state.now = now
        for due in state.timers.due(now):
            _HANDLERS[type(due)](state, due, now, out)
        _HANDLERS[type(event)](state, event, now, out)
        if state.book.due:
            control.keep(state, now, out)
        dispatch.place_waiting(state, now, out)
        return out


def _tick(state: State, event: events.Tick, now: float, out: Outbox) -> None:
    """Timers have had their turn already."""
    learning.review(state, now)
    overload.observe(state, now)
    state.journal.purge(now)
    replication.tell(state, now, out)


def _term_raised(state: State, event: events.TermRaised, now: float, out: Outbox) -> None:
    state.term = max(state.term, event.term)


def _service_inherited(state: State, event: events.ServiceInherited, now: float, out: Outbox) -> None:
    state.waiting.inherit(list(event.record.tenants))


def _deadline_passed(state: State, event: events.DeadlinePassed, now: float, out: Outbox) -> None:
    live = state.requests.get(event.request_id)
    if live is not None and live.deadline_at <= now:
        lifecycle.expire(state, live, out)


def _retry_due(state: State, event: events.RetryDue, now: float, out: Outbox) -> None:
    live = state.requests.get(event.request_id)
    if live is None or live.attempt is not None or live.id in state.waiting or live.id in state.parked:
        return
    if not live.owes_retry or lifecycle.pay(state, live, now, out):
        lifecycle.enqueue(state, live, out)


_HANDLERS: dict[type, Handler] = {
    events.Tick: _tick,
    events.TermRaised: _term_raised,
    events.WorkerRegistered: members.registered,
    events.WorkerDeregistered: members.deregistered,
    events.MembersListed: members.listed,
    events.WorkerAttached: members.attached,
    events.WorkerFrame: frames.received,
    events.WorkerDetached: members.detached,
    events.GatewayConnected: admission.connected,
    events.GatewayLost: admission.lost,
    events.Submitted: admission.submitted,
    events.TakeUpAsked: takeover.asked,
    events.FollowerJoined: replication.joined,
    events.FollowerLeft: replication.left,
    events.JournalInherited: replication.inherited,
    events.Cancelled: admission.cancelled,
    events.Killed: admission.killed,
    events.Reprioritized: priorities.reprioritized,
    events.ServiceInherited: _service_inherited,
    events.DrainOrdered: draining.drain_ordered,
    events.DrainDue: draining.drain_due,
    events.ChoiceFinished: admission.choice_finished,
    events.DeadlinePassed: _deadline_passed,
    events.RetryDue: _retry_due,
    events.AttemptStalled: stalls.stalled,
    events.AttemptLate: hedging.late,
    events.WorkerSlow: health.slow,
    events.ProbeDue: health.probe_due,
    events.StageQuantiles: learning.quantiles,
    events.GatewayGraceOver: admission.grace_over,
    events.WorkerSettled: members.worker_settled,
    events.Settled: members.settle,
    events.Sweep: dispatch.sweep,
    events.PromisesListed: control.listed,
    events.PromiseChanged: control.changed,
    events.Rebalance: control.rebalance,
}
