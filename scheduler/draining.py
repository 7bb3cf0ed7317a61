"""Workers emptied, and taken back into service.

A worker that empties itself takes nothing new, and what runs on it moves on as soon as another worker has room for it
and gives the same bytes. Where there is none it goes on to its end, under a new leader too. On SIGTERM it is the same.
"""

from __future__ import annotations

from scheduler import dispatch, events, members
from scheduler.commands import Queued
from scheduler.lifecycle import drop_attempt, stand_in
from scheduler.placement import Option
from scheduler.requests import LiveRequest
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView

DRAIN_S = 0.05
"""Pause between two looks at what still runs on a worker that is being emptied."""
_AT_A_TIME = 8
"""So many of its requests move on per look: each is read again elsewhere, beside what runs there."""


def drain_ordered(state: State, event: events.DrainOrdered, now: float, out: Outbox) -> None:
    """Empty a worker, or take it back: the latter once the worker agrees, as one that is about to leave does not."""
    worker = state.workers.get(event.worker_id)
    if worker is None:
        return
    worker.drain_wanted = not event.undo
    members.order_drain(worker, out)
    if worker.drain_wanted and not worker.draining:
        members.set_draining(state, worker, True)


def drain_due(state: State, event: events.DrainDue, now: float, out: Outbox) -> None:
    """Move on what can move, and look again soon."""
    worker = state.workers.get(event.worker_id)
    if worker is None or worker.drain_look != event.look:
        return
    if not (worker.connected and (worker.draining or worker.health.emptying)):
        return
    if state.settled:
        if worker.draining:
            _go_on_here(state, worker, now, out)
        _move_on(state, worker, now, out)
    state.timers.at(now + DRAIN_S, event)


def _move_on(state: State, worker: WorkerView, now: float, out: Outbox) -> None:
    moved = 0
    reason = "worker draining" if worker.draining else worker.health.reason
    for request_id, attempt in list(worker.running.items()):
        live = state.requests[request_id]
        if stand_in(state, live, attempt, reason, out, tell=True):
            continue
        target = _elsewhere(state, live)
        if target is None:
            continue
        state.counters["migrations"] += 1
        if not worker.draining:
            live.tried.add(worker.id)
        drop_attempt(state, live, reason, out, tell=True)
        out.append(Queued(live.request))
        dispatch.start(state, live, target, now, out)
        moved += 1
        if moved == _AT_A_TIME:
            return


def _elsewhere(state: State, live: LiveRequest) -> Option | None:
    """Another worker that has room for the request now and continues with the same bytes."""
    if live.attempts - live.attempts_before >= state.policy.max_attempts - 1:
        return None
    target = state.placement.place(live)
    if target is None or (live.fingerprint and target.worker.fingerprint != live.fingerprint):
        return None
    return target


def _go_on_here(state: State, worker: WorkerView, now: float, out: Outbox) -> None:
    """What this worker ran under an earlier leader, and nobody else could take, goes on where it is."""
    for request_id in list(worker.unclaimed):
        live = state.requests.get(request_id)
        slot = worker.slot_for(live.key) if live is not None else None
        if live is None or slot is None or request_id not in state.waiting:
            continue
        if slot.fits(live.blocks, live.blocks) and (live.adapter is None or worker.loaded(live.adapter)):
            state.waiting.discard(live)
            dispatch.start(state, live, Option(worker, slot, 0, live.known_tokens), now, out)
