"""Who finds no room: second attempts make room for everybody, and lower classes for higher ones.

A hedge is nobody's only attempt: it gives way to whoever waits. A higher class takes a lower one's place within the
tick in which its request finds no room.

Victims: the lowest class first, there the tenant that is furthest ahead of its fair share, there the attempt that
has produced least. The cancelled attempt and the new one go down the worker's stream in one batch, in this order, so
that the victim's blocks are free when the new one comes. The victim waits again with what it has; its client notices
time and nothing else.

Who keeps its place: an attempt that began because its class's minimum share was due, a class that is behind its share
by more than the head start, and a request that has given way `Policy.max_preemptions` times.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from scheduler.fairness import BATCH, FairClass
from scheduler.lifecycle import drop_attempt, enqueue, stand_in
from scheduler.placement import Option
from scheduler.requests import Attempt, LiveRequest, ModelKey
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView

_TENANTS, _ATTEMPTS, _WORKERS = 8, 16, 16
"""Most that are looked at: tenants of a class, attempts of each, workers."""


def make_room(state: State, live: LiveRequest, out: Outbox) -> Option | None:
    """Cancel hedges, or attempts of lower classes, so that `live` fits on a worker, which is returned; None: it does
    not. Afterwards nobody has a hedge of that model."""
    if state.hedged and _hedges_give_way(state, live.key, out):
        option = state.placement.place(live)
        if option is not None:
            return option
    assert live.account is not None
    classes = state.waiting.queue(live.key).classes
    mine = live.account.owner
    if not any(lower.busy and mine.key < lower.key for lower in classes[mine.rank + 1 :]):
        return None
    for worker in itertools.islice(_workers(state, live, classes, mine), _WORKERS):
        victims = _victims(state, live, worker, mine)
        if victims:
            for victim in victims:
                _evict(state, victim, worker, out)
            return state.placement.place(live)
    return None


def _workers(state: State, live: LiveRequest, classes: list[FairClass], mine: FairClass) -> Iterator[WorkerView]:
    """Those worth looking at, each once: where the best victims run."""
    seen: set[str] = set()
    for rank in range(BATCH, mine.rank, -1):
        accounts = heapq.nlargest(_TENANTS, classes[rank].busy, key=lambda account: account.virtual)
        for account in accounts:
            newest = itertools.islice(reversed(account.running.values()), _ATTEMPTS)
            for victim in sorted(newest, key=_progress):
                assert victim.attempt is not None
                worker = state.workers.get(victim.attempt.worker_id)
                if worker is None or worker.suspect or worker.id in seen or not _yields(state, victim, mine):
                    continue
                seen.add(worker.id)
                if worker.usable and worker.loaded(live.key) and (not live.adapter or worker.loaded(live.adapter)):
                    yield worker


def _victims(state: State, live: LiveRequest, worker: WorkerView, mine: FairClass) -> list[LiveRequest]:
    """Attempts whose blocks are enough, as few as need be; empty if all of them are not."""
    slot = worker.slots[live.key[0]]
    there = [state.requests[request_id] for request_id, a in worker.running.items() if a.model == live.key[0]]
    able = sorted((one for one in there if _yields(state, one, mine)), key=_preference)
    missing = live.blocks - slot.available
    chosen: list[LiveRequest] = []
    for victim in able:
        if missing <= 0:
            break
        chosen.append(victim)
        missing -= _blocks(victim)
    if missing > 0:
        return []
    for victim in list(chosen):
        if missing + _blocks(victim) <= 0:
            missing += _blocks(victim)
            chosen.remove(victim)
    return chosen


def _yields(state: State, victim: LiveRequest, mine: FairClass) -> bool:
    attempt, account = victim.attempt, victim.account
    if attempt is None or account is None or attempt.owed:
        return False
    lower = account.owner
    return lower.rank > mine.rank and mine.key < lower.key and victim.preempted < state.policy.max_preemptions


def _preference(victim: LiveRequest) -> tuple[int, float, int]:
    assert victim.account is not None
    return (-victim.account.owner.rank, -victim.account.virtual, _progress(victim))


def _progress(victim: LiveRequest) -> int:
    """Tokens whose computation is lost."""
    return victim.tokens_out


def _blocks(victim: LiveRequest) -> int:
    assert victim.attempt is not None
    return victim.attempt.blocks


def _evict(state: State, victim: LiveRequest, worker: WorkerView, out: Outbox) -> None:
    attempt = victim.attempt
    assert attempt is not None
    _free_at_once(worker, attempt)
    victim.preempted += 1
    state.counters["preemptions"] += 1
    drop_attempt(state, victim, "preempted", out, tell=True)
    enqueue(state, victim, out)


def _hedges_give_way(state: State, key: ModelKey, out: Outbox) -> bool:
    """Cancel the second attempts of a model; whether there were any."""
    hedged = [live for live in map(state.requests.__getitem__, state.hedged) if live.key == key]
    for live in hedged:
        hedge = live.hedge
        assert hedge is not None
        _free_at_once(state.workers[hedge.worker_id], hedge)
        stand_in(state, live, hedge, "hedge gives way", out, tell=True)
    return bool(hedged)


def _free_at_once(worker: WorkerView, attempt: Attempt) -> None:
    """The worker's last word counts its blocks as taken; the order to cancel goes ahead of what comes into their
    place."""
    slot = worker.slots[attempt.model]
    slot.free_blocks = min(slot.total_blocks, slot.free_blocks + attempt.blocks - attempt.promised)
