"""From waiting to running: offer waiting requests to workers with room, and clear away those nobody can serve."""

from __future__ import annotations

import math

from llmos.errors import Unavailable
from scheduler import charges, health, overload
from scheduler.commands import StartAttempt
from scheduler.events import DeadlinePassed, Event, Sweep
from scheduler.fairness import CLASSES
from scheduler.lifecycle import fail, forget_claim
from scheduler.loads import adapter_is_lost, want_adapter
from scheduler.members import refresh_catalogue
from scheduler.placement import Option
from scheduler.preemption import make_room
from scheduler.requests import BLOCK_TOKENS, Attempt, LiveRequest, ModelKey
from scheduler.state import Outbox, State
from scheduler.workers import HOPELESS, ModelSlot

SWEEP_S = 1.0
_SPARE_TIMERS = 64
"""So many pointless timers are not worth a walk over all."""


def place_waiting(state: State, now: float, out: Outbox) -> None:
    """Start whatever fits, for the models where something has changed."""
    if not state.looking:
        return

    def offer(live: LiveRequest) -> bool:
        if live.request.resume and not state.settled:
            return False  # the worker that runs it may be about to say so
        if overload.hopeless(state, live, now, out):
            return False
        option = state.placement.place(live)
        if option is not None and overload.stale(state, live, now, out):
            return False
        if option is None and live.suspect:
            state.kept_apart.add(live.key)
        elif option is None:
            option = make_room(state, live, out)
        if option is None:
            return False
        start(state, live, option, now, out)
        return True

    for key in sorted(state.looking) if len(state.looking) > 1 else list(state.looking):
        most = 1 if key in state.leading else None
        admission = state.waiting.admit(key, offer, state.reach(key), state.absent, most)
        state.drain.count(now, admission.taken)
        _want_adapters(state, admission.wanting, now, out)
    state.looking.clear()
    state.leading.clear()


def _want_adapters(state: State, wanting: list[LiveRequest], now: float, out: Outbox) -> None:
    """Load what they lack. An adapter that a more urgent one waits for stays: else they would take turns to load."""
    kept: set[ModelKey] = set()
    for live in wanting:
        if live.adapter is not None and (state.settled or not live.request.resume):
            want_adapter(state, live, live.adapter, kept, now, out)
            kept.add(live.adapter)


def start(state: State, live: LiveRequest, option: Option, now: float, out: Outbox) -> None:
    """Begin an attempt there. The request waits no more, and there is room for it."""
    attempt = live.attempt = _begin(state, live, option, now, out)
    attempt.owed = state.waiting.queue(live.key).owed(live.rank)
    charges.started(live)


def start_hedge(state: State, live: LiveRequest, option: Option, reason: str, now: float, out: Outbox) -> None:
    """Begin a second attempt beside the one that runs, on another worker, where there is room for it. It costs the
    tenant nothing."""
    assert live.attempt is not None
    hedge = live.hedge = _begin(state, live, option, now, out, reason)
    hedge.first, hedge.owed = live.attempt.first, live.attempt.owed
    live.hedged = True
    state.hedged[live.id] = None


def _begin(state: State, live: LiveRequest, option: Option, now: float, out: Outbox, reason: str = "") -> Attempt:
    live.attempts += 1
    worker = option.worker
    attempt = _attempt(state, live, option, now)
    if attempt.adapter:
        worker.slots[attempt.adapter].used_at = now
    if state.claims.get(live.id) != worker.id:
        forget_claim(state, live.id, out, tell=True)
    state.claims.pop(live.id, None)
    worker.set_aside(live.id, attempt)
    health.began(state, worker, live)
    if live.suspect:
        worker.suspect = live.id
    state.room_changed(worker, option.slot)
    state.journal.grown(live.id)
    out.append(_order(live, attempt, option.slot, now, reason))
    return attempt


def _attempt(state: State, live: LiveRequest, option: Option, now: float) -> Attempt:
    worker = option.worker
    return Attempt(
        state.term,
        live.attempts,
        worker.id,
        live.blocks,
        live.key[0],
        adapter=live.adapter[0] if live.adapter is not None else "",
        tenant=live.request.tenant,
        sequences=live.open_choices,
        uncached=option.uncached,
        met=(worker.load.ahead, worker.load.decoding),
        begun_at=now,
        first=live.attempts == live.attempts_before + 1,
        expected=state.prefixes.expect(worker.id, live.prefix, option.cached // BLOCK_TOKENS),
    )


def _order(live: LiveRequest, attempt: Attempt, slot: ModelSlot, now: float, reason: str) -> StartAttempt:
    """The request with current progress, version and remaining time."""
    ahead, decoding = attempt.met
    return StartAttempt(
        attempt.worker_id,
        live.request,
        attempt.epoch,
        model_version=live.key[1],
        priority=CLASSES[live.rank],
        adapter_version=live.adapter[1] if live.adapter is not None else "",
        resume=tuple(live.resume()),
        deadline_ms=max(1, int((live.deadline_at - now) * 1000)) if live.deadline_at < math.inf else 0,
        expected_s=slot.times.first_token.seconds(attempt.uncached, ahead, decoding),
        uncached=attempt.uncached,
        load=decoding,
        reason=reason,
    )


def sweep(state: State, event: Sweep, now: float, out: Outbox) -> None:
    """Once a second: end requests that no worker is left for, forget models that are gone, look once more."""
    state.timers.at(now + SWEEP_S, Sweep())
    state.meters.sample(state.workers, now)
    refresh_catalogue(state, now, out)
    _give_up_stranded(state, now, out)
    _give_up_adapters(state, out)
    _forget_deadlines(state)
    state.quotas.forget(now)
    health.rescue(state)
    state.waiting.forget(lambda key: not _served(state, key))
    waited_for = state.waiting.keys()
    for key in list(state.nobody_since):
        if key not in waited_for:
            del state.nobody_since[key]
    for key in waited_for:
        state.looking.add(key)
        if _served(state, key):
            state.nobody_since.pop(key, None)
        elif now - state.nobody_since.setdefault(key, now) >= state.policy.no_worker_grace_s:
            for live in list(state.waiting.waiting_for(key)):
                fail(state, live, _nobody(), out)
    for live in list(state.parked.values()):
        if now - live.accepted_at >= state.policy.no_worker_grace_s:
            fail(state, live, _nobody(), out)


def _give_up_stranded(state: State, now: float, out: Outbox) -> None:
    """End what has been too large for every usable worker for long; let the rest be looked at again."""
    since = {live.id: state.stranded_since.get(live.id, now) for live in state.waiting.stranded()}
    state.stranded_since = since
    for request_id, began in since.items():
        if now - began >= state.policy.no_worker_grace_s:
            fail(state, state.requests[request_id], _too_large(), out)
    state.waiting.recall()


def _give_up_adapters(state: State, out: Outbox) -> None:
    """End what waits for an adapter that failed to load wherever it is."""
    models = state.waiting.keys()
    for live in [live for key in models for live in state.waiting.waiting_for(key)]:
        if live.adapter is not None and adapter_is_lost(state, live.adapter):
            fail(state, live, Unavailable(f"No worker can load the adapter '{live.adapter[0]}'."), out)


def _forget_deadlines(state: State) -> None:
    """Most requests end long before their deadline; their timers must not pile up until then."""
    live = state.requests

    def pointless(event: Event) -> bool:
        return isinstance(event, DeadlinePassed) and event.request_id not in live

    if len(state.timers) > 2 * len(live) + _SPARE_TIMERS:
        state.timers.drop(pointless)


def _served(state: State, key: ModelKey) -> bool:
    """A connected worker has the model, or may come to have it."""
    for worker in state.workers.values():
        slot = worker.slot_for(key)
        if slot is not None and worker.usable and slot.state not in HOPELESS:
            return True
    return False


def _nobody() -> Unavailable:
    return Unavailable("No worker serves the model at present; try again later.", retry_after_s=5.0)


def _too_large() -> Unavailable:
    return Unavailable("No worker has memory for that many tokens at present; ask for fewer.", retry_after_s=5.0)
