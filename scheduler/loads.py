"""What workers are told to load and to drop: models at once, adapters when a request needs one."""

from __future__ import annotations

import math
from collections.abc import Set

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler.commands import Order
from scheduler.ledger import Allocation, plan
from scheduler.requests import LiveRequest, ModelKey
from scheduler.state import Outbox, State
from scheduler.workers import AVAILABLE, HOPELESS, LOADED, ModelSlot, WorkerView


def order_loads(state: State, worker: WorkerView, out: Outbox) -> None:
    """Load models that are available and fit. The plan depends on the record alone: every leader makes the same one."""
    if all(slot.state != AVAILABLE for slot in worker.slots.values() if not slot.base):
        return
    for decision in plan(worker.record, state.policy.min_kv_tokens, state.policy.adapter_slots):
        slot = worker.slots[decision.model]
        if slot.state != AVAILABLE or slot.ordered:
            continue
        if not isinstance(decision, Allocation):
            slot.state = fleet_pb2.MODEL_STATE_UNFIT
            slot.detail = decision.reason
        elif not slot.base:
            _load(worker, slot, decision, out)


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
    for decision in plan(worker.record, state.policy.min_kv_tokens, state.policy.adapter_slots):
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
