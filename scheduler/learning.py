"""What frames teach: what is cached where, and how long workers take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from llmos.internal.v1 import request_pb2, work_pb2
from scheduler.commands import Order, Progress
from scheduler.events import StageQuantiles
from scheduler.requests import Attempt, LiveRequest
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView

_EVERY = 4
"""So many steps are enough to learn from one."""
_OFTEN_S = 0.25
"""A slow worker's steps count all the same."""
_REVIEWED = 16
_PAUSE_S = 2.0
"""A longer time between two steps is no time of a step."""


def cache_changed(state: State, worker: WorkerView, changes: Iterable[work_pb2.CacheChange], out: Outbox) -> None:
    """Prefix caches hold something else now. If a change was missed, ask for all of it again."""
    for change in changes:
        if not state.prefixes.apply(worker.id, change):
            state.counters["cache_gaps"] += 1
            again = work_pb2.ResendCache(model=change.model)
            out.append(Order(worker.id, work_pb2.Command(resend_cache=again)))


def first_output(
    state: State, worker: WorkerView, live: LiveRequest, attempt: Attempt, output: request_pb2.Output, now: float
) -> None:
    """An attempt's prompt is computed. What it took is learned, except of a resume, whose tokens take another time."""
    slot = worker.slots[attempt.model]
    worker.started(attempt)
    if not output.index:
        own = max(1, len(live.request.token_ids) - output.cached_tokens)
        slot.times.first_token.took(own, *attempt.met, now - attempt.begun_at, now)
    if attempt.expected:
        state.prefixes.settle(worker.id, attempt.model, attempt.expected)
        attempt.expected = ()
    state.room_changed(worker, slot)


def at_least(worker: WorkerView, attempt: Attempt, now: float) -> None:
    """An attempt that is given up has taken so long and has no output yet."""
    slot = worker.slots[attempt.model]
    slot.times.first_token.took(attempt.uncached, *attempt.met, now - attempt.begun_at, now)


def review(state: State, now: float) -> None:
    """Look at a few workers again, in turn: what was seen of one fades without news, and what the others show counts
    for one of which nothing was seen yet."""
    few = list(itertools.islice(state.rota, _REVIEWED))
    if not few:
        state.rota = iter(list(state.workers.values()))
    for worker in few:
        for slot in worker.slots.values():
            slot.times.first_token.refresh(now)
        if worker.slots:
            state.room_changed(worker, next(iter(worker.slots.values())))


def stepped(state: State, worker: WorkerView, frame: work_pb2.WorkFrame, now: float, out: Outbox) -> None:
    """A frame with output came: the time since the last one, if the engine was not idle meanwhile, is a step's."""
    steps, before = frame.step - worker.step, worker.output_at
    worker.output_at = now
    if not worker.busy or steps < 1 or (frame.step % _EVERY >= steps and now - worker.noted_at < _OFTEN_S):
        return
    worker.noted_at = now
    request_id = frame.outputs[0].request_id
    attempt, live = worker.running.get(request_id), state.requests.get(request_id)
    if attempt is None or live is None or not worker.load.decoding:
        return
    seconds = (now - before) / steps
    decoding, beside = worker.load.decoding, worker.load.prefilling > 0
    gap = now - live.output_at if attempt.produced else 0.0
    expected = state.times_of(live.key).step_s(decoding, beside)
    out.append(Progress(request_id, worker.id, attempt.model, gap, seconds, expected, decoding))
    if now - before <= _PAUSE_S:
        worker.slots[attempt.model].times.step.took(decoding, beside, seconds, now)


def quantiles(state: State, event: StageQuantiles, now: float, out: Outbox) -> None:
    """What spans showed of a worker, for placement."""
    worker = state.workers.get(event.worker_id)
    slot = worker.slots.get(event.model) if worker is not None else None
    if slot is not None:
        slot.tail_prefill, slot.tail_gap_s = event.prefill, event.gap_s
