"""Hedges: a second attempt of a request whose first token is late, on another worker. First token wins.

Late is what takes longer than most prefills of its model do (`deadlines.py`), well before it counts as stalled; whether
the first worker computes slowly or is silent makes no difference. A hedge takes nobody's place: it begins where there
is room, while nobody waits for the model, and gives way to whoever comes (`preemption.py`). It is paid for
(`budget.py`), and a request has one at most. With the first output the other attempt is cancelled.

Source: Dean and Barroso, "The Tail at Scale", Communications of the ACM 56(2), 2013.
"""

from __future__ import annotations

from scheduler import dispatch, health, learning
from scheduler.events import AttemptLate
from scheduler.lifecycle import end_attempt
from scheduler.placement import Option
from scheduler.requests import Attempt, LiveRequest
from scheduler.state import Outbox, State
from scheduler.workers import WELL


def late(state: State, event: AttemptLate, now: float, out: Outbox) -> None:
    """Begin a second attempt, if it is allowed and another worker could soon be where the first one is not."""
    live = state.requests.get(event.request_id)
    attempt = live.attempt if live is not None else None
    if live is None or attempt is None or (attempt.term, attempt.number) != (event.term, event.attempt):
        return
    if attempt.started or not _may(state, live):
        return
    option = _elsewhere(state, live, attempt, event.waited_s)
    if option is None or not state.budget.take_hedge(now):
        return
    state.counters["hedges"] += 1
    live.tried.add(attempt.worker_id)
    reason = f"hedge: attempt {attempt.number} has no token after {event.waited_s:.2f} s, bound {event.bound_s:.2f} s"
    dispatch.start_hedge(state, live, option, reason, now, out)


def commit(state: State, live: LiveRequest, winner: Attempt, now: float, out: Outbox) -> None:
    """One of two attempts has output: it is the request's only one from now on."""
    first, hedge = live.attempt, live.hedge
    assert first is not None and hedge is not None
    loser = first if winner is hedge else hedge
    live.attempt, live.hedge = winner, None
    del state.hedged[live.id]
    winner.won = True
    if winner is hedge:
        state.counters["hedges_won"] += 1
        _lost(state, live, first, now)
    else:
        state.counters["hedges_lost"] += 1
        live.tried.discard(first.worker_id)
    reason = f"hedge: attempt {winner.number} had the first token"
    end_attempt(state, live, loser, reason, out, tell=True, lost=True, at_least=loser is first)


def _may(state: State, live: LiveRequest) -> bool:
    """Whether a request may have two attempts now."""
    if not state.policy.hedge or live.hedged or live.suspect or not state.settled:
        return False
    if len(live.choices) > 1 or live.request.resume or live.tokens_out:
        return False
    if live.attempts - live.attempts_before >= state.policy.max_attempts - 1:
        return False
    return not state.waiting.crowded(live.key)


def _elsewhere(state: State, live: LiveRequest, attempt: Attempt, waited_s: float) -> Option | None:
    """A worker in good standing that this request has not tried, has room for it now, and is expected to have its first
    token within the time that the first one has had."""
    known = attempt.worker_id in live.tried
    live.tried.add(attempt.worker_id)
    option = state.placement.place(live)
    if not known:
        live.tried.discard(attempt.worker_id)
    if option is None or option.worker.id == attempt.worker_id or option.worker.id in live.tried:
        return None
    if option.worker.health.standing != WELL or option.worker.suspect:
        return None
    expected_s = option.slot.backlog_s + option.uncached * option.slot.token_s
    return option if expected_s <= waited_s else None


def _lost(state: State, live: LiveRequest, first: Attempt, now: float) -> None:
    """The first attempt would have taken longer yet than it has: learn that much, or its worker would look as fast as
    those of its prefills that were waited for."""
    worker = state.workers[first.worker_id]
    learning.at_least(worker, first, now)
    if worker.health.probe == live.id:
        health.struck(state, worker, "late on trial", now)
