"""What becomes of an attempt whose stage takes longer than its learned bound: wait, or go on elsewhere.

The step counter tells what computes from what is stuck. An engine that stands still loses all its attempts and gets
nothing new until it steps again; a stream that stands still while its engine steps moves alone. Neither happens without
another worker to go to: the last one is waited for, whatever it does.
"""

from __future__ import annotations

from scheduler import dispatch, health
from scheduler.commands import Queued
from scheduler.events import AttemptStalled
from scheduler.lifecycle import drop_attempt, migrate, stand_in
from scheduler.placement import Option
from scheduler.requests import Attempt, LiveRequest
from scheduler.state import Outbox, State
from scheduler.workers import OUT, WorkerView

_STILL_S = 0.75
"""An engine whose counter has stood still for so long may be stuck as a whole: its own bound decides."""
_LINGERS_S, _LINGERS_STEPS = 3.0, 5.0
"""Seconds, and usual steps, without a step after which an engine that is busy with what has moved away is stuck."""


def stalled(state: State, event: AttemptStalled, now: float, out: Outbox) -> None:
    """Decide on what has passed its bound. It is told again while it lasts."""
    if event.stage == "queue":
        state.counters["slow_queue"] += 1
        return
    live = state.requests.get(event.request_id)
    mine = live.running if live is not None else []
    attempt = next((one for one in mine if (one.term, one.number) == (event.term, event.attempt)), None)
    if live is None or attempt is None:
        return
    worker = state.workers.get(attempt.worker_id)
    if worker is None or not worker.connected:
        return
    if event.stage == "step":
        _engine(state, worker, event, now, out)
    elif not _moves(live, attempt, event, now) and not worker.still and now - worker.step_at < _STILL_S:
        _stream(state, worker, live, attempt, event, now, out)


def lingers(state: State, worker: WorkerView, now: float) -> None:
    """Nothing of ours runs there any more, yet its engine is busy and makes no step: no span waits for that."""
    health_of = worker.health
    usual_s = max((slot.times.step.seconds(1, prefilling=True) for slot in worker.slots.values()), default=0.0)
    waited_s, bound_s = now - worker.step_at, max(_LINGERS_S, _LINGERS_STEPS * usual_s)
    if health_of.hung or health_of.standing == OUT or worker.loading or waited_s < bound_s:
        return
    reason = f"engine stands still for {waited_s:.1f} s after all has moved away, bound {bound_s:.1f} s"
    if health.eject(state, worker, reason, now, hung=True):
        state.counters["hangs"] += 1


def _moves(live: LiveRequest, attempt: Attempt, event: AttemptStalled, now: float) -> bool:
    """Output came while the event was on its way."""
    if event.stage == "prefill":
        return attempt.started
    return now - max(live.output_at, attempt.first_at) < event.bound_s


def _engine(state: State, worker: WorkerView, event: AttemptStalled, now: float, out: Outbox) -> None:
    """All steps of a worker stand still."""
    reason = f"engine stands still for {event.waited_s:.1f} s, bound {event.bound_s:.1f} s"
    if worker.loading or now - worker.step_at < event.bound_s:
        return
    if not health.eject(state, worker, reason, now, hung=True):
        return
    state.counters["hangs"] += 1
    for request_id, attempt in list(worker.running.items()):
        live = state.requests[request_id]
        live.avoid.add(worker.id)
        state.counters["migrations"] += 1
        migrate(state, live, attempt, reason, out, tell=True)


def _stream(
    state: State,
    worker: WorkerView,
    live: LiveRequest,
    attempt: Attempt,
    event: AttemptStalled,
    now: float,
    out: Outbox,
) -> None:
    """One attempt gets nothing while its worker works."""
    state.counters["stalls"] += 1
    live.tried.add(worker.id)
    live.avoid.add(worker.id)
    reason = f"stalled in {event.stage} for {event.waited_s:.1f} s, bound {event.bound_s:.1f} s"
    if stand_in(state, live, attempt, reason, out, tell=True):
        health.struck(state, worker, reason, now)
        return
    target = _elsewhere(state, live)
    if target is None:
        return
    state.counters["migrations"] += 1
    drop_attempt(state, live, reason, out, tell=True)
    health.struck(state, worker, reason, now)
    out.append(Queued(live.request))
    dispatch.start(state, live, target, now, out)


def _elsewhere(state: State, live: LiveRequest) -> Option | None:
    """Another worker that has room for it now."""
    if live.attempts - live.attempts_before >= state.policy.max_attempts - 1:
        return None
    target = state.placement.place(live)
    return target if target is not None and target.worker.id not in live.avoid else None
