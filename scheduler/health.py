"""Which workers are given work: breaker, ejection, probes. Made for two to four workers as well as for a thousand.

A worker is *out* after three failures in a row that are its own doing, when its engine stands still, or when it is
several times as slow as its peers are and as it was itself. A stream that completes clears its failures; mistakes of
clients never count. It is never put out while it is the last one for any of its models.

After a pause, twice as long each time, a worker is on *trial*: it is given one request. Is that served at the pace of
its peers, the worker is *well* again; does it fail, it is out for longer. Requests that have been tried elsewhere are
spared that.
"""

from __future__ import annotations

from statistics import median

from scheduler.events import DrainDue, ProbeDue, WorkerSlow
from scheduler.requests import LiveRequest, ModelKey
from scheduler.state import Outbox, State
from scheduler.workers import OUT, TRIAL, WELL, WorkerView

STRIKES = 3
"""Failures in a row that put a worker out."""
SLOW = 4.0
"""So many times as slow as its peers' median is out of order."""
_ONE_EVENT_S = 0.25
"""Failures within this time have one cause and count once."""
_LASTING_S = 1.5
"""A worker must be slow for so long."""
_PATIENCE_S = 1.2
"""Without news of its slowness for so long it is not slow any more."""
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_PROBE_TOKENS = 8
"""Output by which the pace of a probe is judged."""
_SLOW_BY_NATURE = 3
"""Failed trials after which a worker that has never been faster is taken for what it is."""


def spare(state: State, worker: WorkerView) -> bool:
    """Whether every model that is loaded there is loaded on another worker that may be given work."""
    others = [other for other in state.workers.values() if other is not worker and other.usable]
    loaded = [slot.key for slot in worker.slots.values() if worker.loaded(slot.key)]
    return all(any(other.loaded(key) for other in others) for key in loaded)


def eject(state: State, worker: WorkerView, reason: str, now: float, *, hung: bool = False) -> bool:
    """Give a worker nothing new for a while; one that is `hung` until it steps again. False: it is the last one."""
    health = worker.health
    if not spare(state, worker):
        state.counters["kept_last"] += 1
        return False
    state.counters["ejections"] += 1
    health.unproven = False
    health.standing, health.reason, health.hung, health.probe = OUT, reason, hung, ""
    health.strikes = 0
    health.turn += 1
    health.pause_s = min(_LONGEST_PAUSE_S, max(_PAUSE_S, 2 * health.pause_s))
    if not hung:
        state.timers.at(now + health.pause_s, ProbeDue(worker.id, health.turn))
    refresh(state, worker)
    return True


def probe_due(state: State, event: ProbeDue, now: float, out: Outbox) -> None:
    """Its pause is over."""
    worker = state.workers.get(event.worker_id)
    if worker is not None and worker.health.standing == OUT and worker.health.turn == event.turn:
        on_trial(state, worker)


def on_trial(state: State, worker: WorkerView) -> None:
    """It is given one request, to see."""
    health = worker.health
    health.standing, health.hung, health.emptying, health.probe = TRIAL, False, False, ""
    refresh(state, worker)


def readmit(state: State, worker: WorkerView) -> None:
    """It takes part as before."""
    health = worker.health
    health.standing, health.reason, health.probe = WELL, "", ""
    health.hung = health.emptying = health.unproven = False
    health.strikes = health.failed_trials = 0
    health.pause_s = 0.0
    refresh(state, worker)


def refresh(state: State, worker: WorkerView) -> None:
    """Whether it may be given work has changed."""
    if worker.health.standing == TRIAL:
        state.on_trial.add(worker.id)
    else:
        state.on_trial.discard(worker.id)
    state.standing_changed(worker)
    for slot in worker.slots.values():
        state.room_changed(worker, slot)


def struck(state: State, worker: WorkerView, reason: str, now: float) -> None:
    """An attempt failed there, and it was the worker's doing."""
    health = worker.health
    if health.standing == TRIAL:
        health.unproven = False  # it fails, however slow it is by nature
        _failed_trial(state, worker, reason, now)
    elif health.standing == WELL and now - health.struck_at >= _ONE_EVENT_S:
        health.struck_at = now
        health.strikes += 1
        if health.strikes >= STRIKES:
            eject(state, worker, reason, now)


def began(state: State, worker: WorkerView, live: LiveRequest) -> None:
    """An attempt begins there: on trial, it is the probe."""
    if worker.health.standing == TRIAL:
        worker.health.probe = live.id
        state.counters["probes"] += 1
        refresh(state, worker)


def over(state: State, worker: WorkerView, request_id: str) -> None:
    """An attempt ended there, however: if it was the probe and nothing was decided by it, another one is."""
    if worker.health.probe == request_id:
        worker.health.probe = ""
        refresh(state, worker)


def completed(state: State, worker: WorkerView, request_id: str) -> None:
    """A request was served to its end there."""
    health = worker.health
    health.strikes = 0
    if health.probe == request_id:
        readmit(state, worker)


def look_at_probe(state: State, worker: WorkerView, now: float) -> None:
    """Judge the pace of the probe as soon as it can be judged."""
    health = worker.health
    attempt = worker.running.get(health.probe)
    if attempt is None or attempt.produced < _PROBE_TOKENS * attempt.sequences:
        return
    pace = (now - attempt.first_at) / (attempt.produced / attempt.sequences - 1)
    key = state.requests[health.probe].key
    if pace > SLOW * _usual_pace(state, worker, key):
        _failed_trial(state, worker, f"a step took {pace:.2f} s on trial", now)
    else:
        readmit(state, worker)


def slow(state: State, event: WorkerSlow, now: float, out: Outbox) -> None:
    """A worker is much slower than its peers, and if that can be told, than it was."""
    worker = state.workers.get(event.worker_id)
    if worker is None or not worker.usable or worker.health.standing != WELL:
        return
    health = worker.health
    if health.slow_by_nature and not event.usual_known:
        return
    if now - health.slow_at > _PATIENCE_S:
        health.slow_since = now
    health.slow_at = now
    if now - health.slow_since < _LASTING_S:
        return
    if eject(state, worker, f"{event.ratio:.0f} times as slow as its peers", now):
        health.unproven = not event.usual_known
        empty(state, worker, now)


def empty(state: State, worker: WorkerView, now: float) -> None:
    """What runs there moves on as there is room elsewhere, paced as a drain is."""
    worker.health.emptying = True
    worker.drain_look += 1
    state.timers.at(now, DrainDue(worker.id, worker.drain_look))


def rescue(state: State) -> None:
    """A worker that is out, and has become the last one for a model, is better than none."""
    for worker in state.workers.values():
        waits = worker.health.standing == OUT or (worker.health.standing == TRIAL and worker.health.probe)
        if waits and worker.connected and not worker.draining and not spare(state, worker):
            state.counters["rescues"] += 1
            readmit(state, worker)


def _failed_trial(state: State, worker: WorkerView, reason: str, now: float) -> None:
    health = worker.health
    unproven = health.unproven
    health.failed_trials += 1
    if unproven and health.failed_trials >= _SLOW_BY_NATURE:
        health.slow_by_nature = True
        readmit(state, worker)
    elif eject(state, worker, reason, now):
        health.unproven = unproven
        empty(state, worker, now)
    else:
        readmit(state, worker)


def _usual_pace(state: State, worker: WorkerView, key: ModelKey) -> float:
    """Seconds of a step with one sequence on the other workers that may be given work."""
    peers = (other.slot_for(key) for other in state.workers.values() if other is not worker and other.usable)
    known = [slot.times.step.seconds(1, prefilling=False) for slot in peers if slot is not None]
    return median(known) if known else state.times_of(key).step_s(1, prefilling=False)
