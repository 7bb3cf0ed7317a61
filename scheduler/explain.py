"""Why something is not running, or where it runs: a pure look at the core's state, with the numbers that decide."""

from __future__ import annotations

from collections.abc import Iterator

from llmos.errors import NotFound
from llmos.v1 import fleet_pb2
from scheduler.allocation.book import SPARE, JobHolding, claim_rank
from scheduler.allocation.holdings import memory_of, need_of, replicas_of, room, taken
from scheduler.allocation.shares import kept_for_others
from scheduler.requests import LiveRequest, ModelKey
from scheduler.state import State
from scheduler.workers import LOADED, ModelSlot, WorkerView

_MOST_FINDINGS = 200
_GIB = 2**30
_GRAVE = ("no_room", "over_quota", "behind_in_queue", "too_large", "reserved", "unloading", "loading", "not_loaded")


def explain(state: State, name: str, now: float) -> fleet_pb2.ExplainResponse:
    """Of a request by its id, an allocation or a model by its name, in this order. Raises NotFound."""
    live = state.requests.get(name)
    if live is not None:
        return _request(state, live, now)
    if name in state.book.promises:
        return _allocation(state, state.book.promises[name], now)
    if any(name in worker.slots for worker in state.workers.values()):
        return _model(state, name, now)
    raise NotFound(f"There is no request, model or allocation '{name[:128]}' here, or not any more.", param="id")


def status(state: State, promise: fleet_pb2.Allocation, now: float) -> fleet_pb2.AllocationStatus:
    """What became of a promise, and why it does not stand if it does not."""
    if promise.HasField("job"):
        job = state.book.jobs.get(promise.name)
        holders, wanted = ([] if job is None else [job.worker_id]), 1
    else:
        there = replicas_of(state.book, state.workers, promise.model.model, promise.pool)
        holders = [worker.id for worker, slot in there if slot.state == LOADED]
        known = state.book.replicas.get(promise.name)
        wanted = promise.model.min_replicas if known is None else known.wanted
    problem = ""
    if len(holders) < wanted:
        reason = next((finding for finding in _findings_of(state, promise, now) if finding.code != "running"), None)
        problem = f"{len(holders)} of {wanted} stand" + (f"; {reason.subject}: {reason.message}" if reason else "")
    return fleet_pb2.AllocationStatus(allocation=promise, workers=holders, wanted=wanted, problem=problem)


def _answer(kind: str, verdict: str, findings: Iterator[fleet_pb2.Finding]) -> fleet_pb2.ExplainResponse:
    found = [finding for finding, _ in zip(findings, range(_MOST_FINDINGS), strict=False)]
    return fleet_pb2.ExplainResponse(kind=kind, verdict=verdict, findings=found)


def _find(subject: str, code: str, message: str) -> fleet_pb2.Finding:
    return fleet_pb2.Finding(subject=subject, code=code, message=message)


# -- requests


def _request(state: State, live: LiveRequest, now: float) -> fleet_pb2.ExplainResponse:
    age = now - live.accepted_at
    if live.attempt is not None:
        at = live.attempt
        stage = "decodes" if at.produced else "computes its prompt"
        verdict = f"It {stage} on {at.worker_id} (attempt {at.number}); {live.tokens_out} tokens so far."
        held = ((one.worker_id, f"Holds {one.blocks} KV blocks of {one.model}.") for one in live.running)
        if live.hedge is not None:
            verdict += f" Its first token is late: attempt {live.hedge.number} runs beside it; the first token wins."
        return _answer("request", verdict, (_find(worker_id, "running", message) for worker_id, message in held))
    if live.id in state.parked:
        verdict = f"It waits since {age:.1f} s for a model that no worker has reported yet."
        return _answer("request", verdict, _places_of(state, live.key, live, now))
    if live.id not in state.waiting:
        return _answer("request", f"It pauses before attempt {live.attempts + 1}: the last one failed.", iter(()))
    verdict = f"It waits since {age:.1f} s for a worker with {live.blocks} free KV blocks of {live.key[0]}."
    return _answer("request", verdict, _of_request(state, live, now))


def _of_request(state: State, live: LiveRequest, now: float) -> Iterator[fleet_pb2.Finding]:
    ahead = sum(1 for other in state.waiting.waiting_for(live.key) if _before(other, live))
    found = sorted(_places_of(state, live.key, live, now), key=_gravity)
    if ahead:
        message = f"{ahead} requests for {live.key[0]} came earlier or are due earlier."
        yield _find("queue", "behind_in_queue", message)
    yield from found


def _before(other: LiveRequest, live: LiveRequest) -> bool:
    return other.id != live.id and (other.request.priority, other.accepted_at) < (
        live.request.priority,
        live.accepted_at,
    )


def _gravity(finding: fleet_pb2.Finding) -> int:
    return _GRAVE.index(finding.code) if finding.code in _GRAVE else len(_GRAVE)


def _places_of(state: State, key: ModelKey, live: LiveRequest, now: float) -> Iterator[fleet_pb2.Finding]:
    for worker in sorted(state.workers.values(), key=lambda worker: worker.id):
        slot = worker.slots.get(key[0])
        if slot is None:
            continue
        if slot.key != key and key[1]:
            yield _find(worker.id, "other_version", f"It holds version {slot.key[1][:12]}, not {key[1][:12]}.")
        elif worker.usable and slot.state == LOADED:
            yield _on_loaded(state, worker, slot, live)
        else:
            yield _on_worker(state, worker, slot, now)


def _on_loaded(state: State, worker: WorkerView, slot: ModelSlot, live: LiveRequest) -> fleet_pb2.Finding:
    need, free = live.blocks, max(0, slot.available)
    if live.adapter is not None and not worker.loaded(live.adapter):
        return _find(worker.id, "not_loaded", f"The adapter {live.adapter[0]} is not loaded there.")
    if need > slot.total_blocks:
        return _find(worker.id, "too_large", f"It needs {need} KV blocks, the worker has {slot.total_blocks} in all.")
    if need > free:
        running = sum(attempt.model == slot.key[0] for attempt in worker.running.values())
        message = f"It needs {need} KV blocks, {free} of {slot.total_blocks} are free; {running} requests run there."
        return _find(worker.id, "no_room", message)
    promise = state.book.of(slot.key[0], worker.record.pool)
    if promise is not None:
        kept = kept_for_others(promise.model.reserved, live.request, slot, worker, state.requests)
        if free - need < kept:
            message = f"It needs {need} KV blocks, {free} are free, of which '{promise.name}' keeps {kept} for others."
            return _find(worker.id, "reserved", message)
    return _find(worker.id, "has_room", f"{free} KV blocks are free: it may begin there next.")


# -- models


def _model(state: State, model: str, now: float) -> fleet_pb2.ExplainResponse:
    holders = [worker for worker in state.workers.values() if model in worker.slots]
    loaded = sum(worker.usable and worker.slots[model].state == LOADED for worker in holders)
    verdict = f"It is loaded on {loaded} of the {len(holders)} workers that hold it."
    promises = [p for p in state.book.promises.values() if p.HasField("model") and p.model.model == model]
    for promise in promises:
        known = state.book.replicas.get(promise.name)
        wanted = promise.model.min_replicas if known is None else known.wanted
        verdict += f" The allocation '{promise.name}' wants {wanted} now."
    waiting = sum(1 for key in state.waiting.keys() if key[0] == model for _ in state.waiting.waiting_for(key))  # noqa: SIM118
    if waiting:
        verdict += f" {waiting} requests wait for it."
    ordered = sorted(holders, key=lambda worker: worker.id)
    return _answer("model", verdict, (_on_worker(state, worker, worker.slots[model], now) for worker in ordered))


def _on_worker(state: State, worker: WorkerView, slot: ModelSlot, now: float) -> fleet_pb2.Finding:
    """How a model stands on a worker that cannot take requests for it, or can."""
    if not worker.connected:
        return _find(worker.id, "lost", "Its stream is broken.")
    if worker.draining:
        return _find(worker.id, "draining", f"It empties itself; {len(worker.running)} requests run there.")
    if slot.leaving:
        left = max(0.0, slot.leave_by - now)
        mine = sum(attempt.model == slot.key[0] for attempt in worker.running.values())
        return _find(
            worker.id, "unloading", f"{mine} requests finish or move within {left:.0f} s, then it is unloaded."
        )
    match slot.state:
        case fleet_pb2.MODEL_STATE_LOADED:
            message = f"{max(0, slot.available)} of {slot.total_blocks} KV blocks are free; {slot.held} are set aside."
            return _find(worker.id, "running", message)
        case fleet_pb2.MODEL_STATE_LOADING:
            known = state.book.load_s.get(slot.key)
            return _find(worker.id, "loading", "It loads" + (f", which took {known:.1f} s last." if known else "."))
        case fleet_pb2.MODEL_STATE_FAILED:
            return _find(worker.id, "failed", slot.detail or "Loading failed.")
        case fleet_pb2.MODEL_STATE_UNFIT:
            return _find(worker.id, "unfit", slot.detail or _too_large(state, worker, slot))
    if slot.ordered:
        return _find(worker.id, "loading", "The order to load it is on its way.")
    return _not_loaded(state, worker, slot)


def _not_loaded(state: State, worker: WorkerView, slot: ModelSlot) -> fleet_pb2.Finding:
    need = need_of(state.book, slot.record, state.policy)
    device, free = _roomiest(state, worker, "")
    if need > memory_of(worker, device):
        return _find(worker.id, "unfit", _too_large(state, worker, slot))
    if need > free:
        return _find(worker.id, "no_room", f"It needs {need / _GIB:.1f} GiB, {_account(state, worker, device, free)}.")
    promise = state.book.of(slot.key[0], worker.record.pool)
    why = "it is not wanted there" if promise is None else f"'{promise.name}' wants no more replicas now"
    return _find(worker.id, "not_loaded", f"There is room ({free / _GIB:.1f} GiB free); {why}.")


def _too_large(state: State, worker: WorkerView, slot: ModelSlot) -> str:
    need = need_of(state.book, slot.record, state.policy)
    largest = max((device.memory_bytes for device in worker.record.capacity.devices), default=0)
    return f"It needs {need / _GIB:.1f} GiB, the largest device has {largest / _GIB:.1f} GiB."


def _roomiest(state: State, worker: WorkerView, claim: str, rank: int = SPARE) -> tuple[str, int]:
    devices = [device.id for device in worker.record.capacity.devices]
    free = {device: max(0, room(state.book, worker, device, rank, claim)) for device in devices}
    best = max(devices, key=lambda device: free[device], default="")
    return best, free.get(best, 0)


def _account(state: State, worker: WorkerView, device: str, free: int) -> str:
    held, memory = taken(state.book, worker, device), memory_of(worker, device)
    kept = memory - held - free
    text = f"{free / _GIB:.1f} GiB of {device} are free: {held / _GIB:.1f} of {memory / _GIB:.1f} GiB are given out"
    return text + (f" and {kept / _GIB:.1f} GiB kept for others that wait" if kept > 0 else "")


# -- allocations


def _allocation(state: State, promise: fleet_pb2.Allocation, now: float) -> fleet_pb2.ExplainResponse:
    found = status(state, promise, now)
    what = "the job" if promise.HasField("job") else f"replicas of {promise.model.model}"
    verdict = f"{len(found.workers)} of {found.wanted} wanted {what} stand."
    return _answer("allocation", verdict, iter(_findings_of(state, promise, now)))


def _findings_of(state: State, promise: fleet_pb2.Allocation, now: float) -> list[fleet_pb2.Finding]:
    pool = sorted((w for w in state.workers.values() if w.record.pool == promise.pool), key=lambda worker: worker.id)
    if not pool:
        return [_find(promise.pool or "default pool", "no_worker", "The pool has no worker.")]
    if promise.HasField("job"):
        job = state.book.jobs.get(promise.name)
        return sorted((_job_on(state, worker, promise, job) for worker in pool), key=_gravity)
    model = promise.model.model
    found = [_on_worker(state, worker, worker.slots[model], now) for worker in pool if model in worker.slots]
    there = {name for worker in pool for name in (worker.id, worker.record.host)}
    absent = [pin for pin in promise.model.pinned_workers if pin not in there]
    found += [_find(pin, "no_worker", "The pinned worker is not there.") for pin in absent]
    if not found:
        return [_find(promise.pool or "default pool", "not_held", f"No worker of the pool holds {model}.")]
    return sorted(found, key=_gravity)


def _job_on(
    state: State, worker: WorkerView, promise: fleet_pb2.Allocation, job: JobHolding | None
) -> fleet_pb2.Finding:
    if job is not None and job.worker_id == worker.id:
        return _find(worker.id, "running", f"It has {job.memory_bytes / _GIB:.1f} GiB of {job.device_id}.")
    if not worker.usable:
        return _find(worker.id, "draining" if worker.connected else "lost", "The worker takes nothing new.")
    device, free = _roomiest(state, worker, promise.name, claim_rank(promise))
    if promise.job.memory_bytes > free:
        need = promise.job.memory_bytes / _GIB
        return _find(worker.id, "no_room", f"It needs {need:.1f} GiB, {_account(state, worker, device, free)}.")
    return _find(worker.id, "not_placed", f"There is room: {free / _GIB:.1f} GiB; processors or disk may lack.")
