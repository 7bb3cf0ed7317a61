"""What workers are told to load and to drop: models at once, adapters when a request needs one."""

from __future__ import annotations

import math
from collections.abc import Set

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler.allocation.book import EXTRA, SPARE, claim_rank
from scheduler.allocation.holdings import jobs_on, memory_of, need_of, room
from scheduler.commands import Order
from scheduler.ledger import Allocation, Unfit, adapters_bytes, plan
from scheduler.requests import LiveRequest, ModelKey
from scheduler.state import Outbox, State
from scheduler.workers import AVAILABLE, HOPELESS, LOADED, ModelSlot, WorkerView


def order_loads(state: State, worker: WorkerView, out: Outbox) -> None:
    """Load models that are available and fit; but for those whose replicas a promise counts (`allocation/control.py`).

    The plan depends on the record, and what was measured and promised: every leader comes to the same one.
    """
    _keep_free(state, worker)
    if not state.book.listed or all(slot.state != AVAILABLE for slot in worker.slots.values() if not slot.base):
        return
    for decision in _plan(state, worker):
        slot = worker.slots[decision.model]
        if slot.state != AVAILABLE or slot.ordered:
            continue
        governed = not slot.base and state.book.of(decision.model, worker.record.pool) is not None
        if isinstance(decision, Unfit) and not governed:
            slot.state, slot.unfit = fleet_pb2.MODEL_STATE_UNFIT, True
            slot.detail = decision.reason
        elif isinstance(decision, Allocation) and not slot.base and not governed:
            _displace_spare(state, worker, slot, decision.device_id)
            load_model(state, worker, slot, decision.device_id, EXTRA, "", out)


def _displace_spare(state: State, worker: WorkerView, slot: ModelSlot, device_id: str) -> None:
    """Jobs that were given what was idle go at once when a model needs it, if that is enough."""
    short = need_of(state.book, slot.record, state.policy) - room(state.book, worker, device_id, EXTRA, "")
    spare = [job for job in jobs_on(state.book, worker.id) if job.device_id == device_id and _is_spare(state, job.name)]
    if short <= 0 or sum(job.memory_bytes for job in spare) < short:
        return
    for job in sorted(spare, key=lambda job: (-job.memory_bytes, job.name)):
        if short > 0:
            short -= job.memory_bytes
            del state.book.jobs[job.name]
            state.counters["evictions"] += 1


def _is_spare(state: State, job: str) -> bool:
    promise = state.book.promises.get(job)
    return promise is None or claim_rank(promise) == SPARE


def load_model(
    state: State, worker: WorkerView, slot: ModelSlot, device_id: str, rank: int, claim: str, out: Outbox
) -> bool:
    """Order a load within what a claim of that rank and name may take of the device; whether there was room.

    The budget is the model's part in a worker that has all its models loaded, so that each finds its place again.
    """
    lot = next((lot for lot in _plan(state, worker) if lot.model == slot.key[0]), None)
    most = room(state.book, worker, device_id, rank, claim)
    need = need_of(state.book, slot.record, state.policy)
    if most < need:
        slot.detail = f"needs {need / 2**30:.1f} GiB, {max(0, most) / 2**30:.1f} GiB of {device_id} are free"
        return False
    planned = isinstance(lot, Allocation) and lot.device_id == device_id
    wanted = lot.budget_bytes if planned and isinstance(lot, Allocation) else most
    slot.device, slot.budget = device_id, max(need, min(wanted, most))
    if planned and isinstance(lot, Allocation):
        slot.beside = min(lot.beside_bytes, most - slot.budget)
    state.book.touched.add(worker.id)
    _load(worker, slot, Allocation(*slot.key, device_id, slot.budget), out)
    return True


def _plan(state: State, worker: WorkerView) -> list[Allocation | Unfit]:
    """Each model's place if all were loaded beside the jobs that are set aside."""
    withheld: dict[str, int] = {}
    for job in jobs_on(state.book, worker.id):
        if not _is_spare(state, job.name):
            withheld[job.device_id] = withheld.get(job.device_id, 0) + job.memory_bytes
    policy = state.policy
    fixed = state.book.fixed_of
    return plan(worker.record, policy.min_kv_tokens, policy.adapter_slots, fixed=fixed, withheld=withheld)


def _keep_free(state: State, worker: WorkerView) -> None:
    """A new leader finds models loaded: what was kept free for their adapters still is."""
    if not any(slot.base for slot in worker.slots.values()):
        return
    for slot in worker.slots.values():
        if slot.holds and not slot.beside:
            wanted = adapters_bytes(worker.record, slot.key[0], state.policy.adapter_slots)
            left = room(state.book, worker, slot.device, EXTRA, "")
            slot.beside = max(0, min(wanted, left)) if memory_of(worker, slot.device) else 0


def want_adapter(
    state: State, live: LiveRequest, adapter: ModelKey, kept: Set[ModelKey], now: float, out: Outbox
) -> None:
    """A request found no worker. If that is for want of its adapter, load that where there is room for the request.

    Adapters in `kept` do not give way to it.
    """
    if now < state.wanted_at.get(adapter, -math.inf) + state.policy.adapter_wanted_s:
        return
    state.wanted_at[adapter] = now
    holders = [worker for worker in state.workers.values() if worker.usable and worker.loaded(live.key)]
    slots = {worker.id: slot for worker in holders if (slot := worker.slot_for(adapter)) is not None}
    if any(slot.ordered or slot.state == fleet_pb2.MODEL_STATE_LOADING for slot in slots.values()):
        return
    loaded = any(slot.state == LOADED for slot in slots.values())
    able = [worker for worker in holders if worker.id in slots and slots[worker.id].state == AVAILABLE]
    for worker in sorted(able, key=lambda worker: (-_room(worker, live), worker.id)):
        if loaded and _room(worker, live) < live.blocks:
            return
        if _make_room(state, worker, live.key[0], kept, out):
            _load_adapter(state, worker, slots[worker.id], out)
            return


def adapter_is_lost(state: State, adapter: ModelKey) -> bool:
    """Whether it failed wherever it is."""
    slots = [slot for worker in state.workers.values() if (slot := worker.slot_for(adapter)) is not None]
    return bool(slots) and all(slot.state in HOPELESS for slot in slots)


def _room(worker: WorkerView, live: LiveRequest) -> int:
    return worker.slots[live.key[0]].available


def _make_room(state: State, worker: WorkerView, base: str, kept: Set[ModelKey], out: Outbox) -> bool:
    """See that one more adapter may be loaded beside `base`: if need be, drop the one that was used longest ago."""
    beside = [slot for slot in worker.slots.values() if slot.base == base and (slot.ordered or slot.state != AVAILABLE)]
    held = [slot for slot in beside if slot.state not in HOPELESS]
    if len(held) < state.policy.adapter_slots:
        return True
    used = {attempt.adapter for attempt in worker.running.values()}
    idle = [slot for slot in held if slot.state == LOADED and slot.key[0] not in used and slot.key not in kept]
    if not idle:
        return False
    oldest = min(idle, key=lambda slot: (slot.used_at, slot.key))
    oldest.state = AVAILABLE
    state.room_changed(worker, oldest)
    out.append(Order(worker.id, work_pb2.Command(unload=work_pb2.UnloadModel(model=oldest.key[0]))))
    return True


def _load_adapter(state: State, worker: WorkerView, slot: ModelSlot, out: Outbox) -> None:
    for decision in _plan(state, worker):
        if decision.model != slot.key[0]:
            continue
        if isinstance(decision, Allocation):
            _load(worker, slot, decision, out)
        else:
            slot.state, slot.detail = fleet_pb2.MODEL_STATE_UNFIT, decision.reason


def _load(worker: WorkerView, slot: ModelSlot, allocation: Allocation, out: Outbox) -> None:
    slot.ordered = True
    load = work_pb2.LoadModel(
        model=allocation.model,
        version=allocation.version,
        device_id=allocation.device_id,
        memory_budget_bytes=allocation.budget_bytes,
    )
    out.append(Order(worker.id, work_pb2.Command(load=load)))
