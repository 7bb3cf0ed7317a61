"""Workers that slowly run out of something: who is emptied and started afresh before it does. Pure.

Each worker says twice a second what its processes use (memory, main and of graphics processors, descriptors, threads).
The series of minima per stretch of time gives a robust slope; growth that is certain and would reach the limit within
the horizon, or is near it already, means: start this worker afresh. What the ledger has promised to models is no leak,
however it fills. One at a time, and never the last worker of a model, unless the limit is all but reached: then dying
would be worse.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler import health, members
from scheduler.state import Outbox, State
from scheduler.usage import Series
from scheduler.workers import WorkerView

SOFT_SHARE, HARD_SHARE = 0.8, 0.95
"""Of the limit: used beyond it and still growing; used beyond it at all."""
HORIZON_S = 300.0
"""Growth that reaches the limit within this time is acted on, from half of the limit on."""
_FROM_SHARE = 0.5
_LOOK_S = 1.0
_RETURN_S = 60.0
"""How long the others wait for one that is started afresh."""
_DRIVER_SHARE = 0.05
"""Of a graphics processor's memory: what the driver takes for a process beside what that asks for."""
_MOST_RESOURCES = 32
_MIN_DRAIN_S, _MAX_DRAIN_S = 2.0, 120.0
_REASONS = {
    fleet_pb2.RESOURCE_KIND_MEMORY: fleet_pb2.DRAIN_REASON_MEMORY,
    fleet_pb2.RESOURCE_KIND_FILES: fleet_pb2.DRAIN_REASON_FILES,
    fleet_pb2.RESOURCE_KIND_THREADS: fleet_pb2.DRAIN_REASON_THREADS,
    fleet_pb2.RESOURCE_KIND_GPU_MEMORY: fleet_pb2.DRAIN_REASON_GPU_MEMORY,
}
_WORDS = {
    fleet_pb2.RESOURCE_KIND_MEMORY: "bytes of memory",
    fleet_pb2.RESOURCE_KIND_FILES: "file descriptors",
    fleet_pb2.RESOURCE_KIND_THREADS: "threads",
    fleet_pb2.RESOURCE_KIND_GPU_MEMORY: "bytes of a graphics processor's memory",
}


def heard(state: State, worker: WorkerView, said: Iterable[fleet_pb2.ResourceUse], now: float, out: Outbox) -> None:
    """A worker says what it uses."""
    decay = worker.decay
    models = tuple(sorted((name, int(slot.state)) for name, slot in worker.slots.items()))
    if models != decay.models:  # loading and unloading move memory in steps
        decay.series.clear()
        decay.models = models
    for use in said:
        what = (use.kind, use.device_id)
        if what not in decay.uses and len(decay.uses) == _MOST_RESOURCES:
            continue
        series = decay.series.setdefault(what, Series())
        series.add(now, worker.ended, use.used)
        known = decay.uses.setdefault(what, fleet_pb2.ResourceUse(kind=use.kind, device_id=use.device_id))
        known.used, known.limit = use.used, use.limit
        decay.first.setdefault(what, use.used)
    if now >= decay.look_at:
        decay.look_at = now + _LOOK_S
        _look(state, worker, now, out)


def _look(state: State, worker: WorkerView, now: float, out: Outbox) -> None:
    for what, use in worker.decay.uses.items():
        series = worker.decay.series.get(what)
        if series is None:
            continue
        use.growth_per_s = series.per_second().certain
        use.growth_per_request = series.per_request().certain if use.growth_per_s else 0.0
        use.left_s = max(0.0, use.limit - use.used) / use.growth_per_s if use.growth_per_s else 0.0
    # Who began beyond the limit would be there again at once.
    first = worker.decay.first
    uses = [use for what, use in worker.decay.uses.items() if first[what] < SOFT_SHARE * use.limit]
    worst = max(uses, key=lambda use: _urgency(use, _promised(worker, use)), default=None)
    if worst is None or not worst.limit or worker.draining:
        return
    urgency = _urgency(worst, _promised(worker, worst))
    if urgency == 2 or (urgency == 1 and health.spare(state, worker) and now >= state.afresh_until):
        _start_afresh(state, worker, worst, now, out)


def _urgency(use: fleet_pb2.ResourceUse, promised: int) -> int:
    """0: nothing, 1: soon, if others can take over, 2: now."""
    if use.kind == fleet_pb2.RESOURCE_KIND_GPU_MEMORY and (use.used <= promised or not use.growth_per_s):
        return 0  # models may be given a processor as a whole: a full one alone says nothing
    if not use.limit or use.used >= HARD_SHARE * use.limit:
        return 2 if use.limit else 0
    if not use.growth_per_s or use.used <= min(promised, SOFT_SHARE * use.limit):
        return 0
    soon = use.left_s <= HORIZON_S and use.used >= _FROM_SHARE * use.limit
    return 1 if soon or use.used >= SOFT_SHARE * use.limit else 0


def _promised(worker: WorkerView, use: fleet_pb2.ResourceUse) -> int:
    """Memory that models were given there: their caches fill it by and by."""
    own = 0
    if use.kind == fleet_pb2.RESOURCE_KIND_GPU_MEMORY:
        given, own = {use.device_id}, int(_DRIVER_SHARE * use.limit)
    elif use.kind == fleet_pb2.RESOURCE_KIND_MEMORY:
        given = {device.id for device in worker.record.capacity.devices if device.kind == fleet_pb2.DEVICE_KIND_CPU}
    else:
        return 0
    return own + sum(slot.budget for slot in worker.slots.values() if slot.device in given)


def _start_afresh(state: State, worker: WorkerView, use: fleet_pb2.ResourceUse, now: float, out: Outbox) -> None:
    """Empty it; it then ends with the status that asks whoever supervises it to start it again."""
    state.counters["started_afresh"] += 1
    state.afresh_until = now + _RETURN_S
    reason = _REASONS[use.kind]
    detail = (
        f"{use.used:,} of {use.limit:,} {_WORDS[use.kind]}, {use.growth_per_s:+,.1f} a second, "
        f"{use.growth_per_request:+,.1f} a request"
    )
    within_s = min(_MAX_DRAIN_S, max(_MIN_DRAIN_S, use.left_s / 2))
    worker.restart = work_pb2.Drain(restart=True, reason=reason, detail=detail, within_ms=int(1000 * within_s))
    worker.drain_wanted = True
    members.order_drain(worker, out)
    members.set_draining(state, worker, True)
