"""How a model goes: it takes nothing new, finishes or hands over what it runs, and then its memory is freed."""

from __future__ import annotations

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler.commands import Order
from scheduler.lifecycle import migrate
from scheduler.state import Outbox, State
from scheduler.workers import LOADED, ModelSlot, WorkerView


def retire(state: State, worker: WorkerView, slot: ModelSlot, patience_s: float, now: float) -> None:
    """Begin to empty a model. What still runs on it after `patience_s` seconds moves on."""
    slot.leaving, slot.leave_by = True, now + patience_s
    if slot.state == LOADED:
        slot.state = fleet_pb2.MODEL_STATE_UNLOADING
    state.book.leaving.add((worker.id, slot.key[0]))
    state.standing_changed(worker)
    state.room_changed(worker, slot)


def go_on(state: State, now: float, out: Outbox) -> None:
    """Unload what is empty, and empty what has had its time."""
    for worker_id, model in sorted(state.book.leaving):
        worker = state.workers.get(worker_id)
        slot = None if worker is None else worker.slots.get(model)
        if worker is None or slot is None or not slot.leaving:
            state.book.leaving.discard((worker_id, model))
        elif worker.connected and slot.state == fleet_pb2.MODEL_STATE_UNLOADING and not slot.unload_sent:
            _empty(state, worker, slot, now, out)


def _empty(state: State, worker: WorkerView, slot: ModelSlot, now: float, out: Outbox) -> None:
    mine = [(request_id, one) for request_id, one in worker.running.items() if one.model == slot.key[0]]
    # What nobody has asked for yet may be this model's; it is asked for, or cancelled, within a second or so.
    if worker.unclaimed or (mine and now < slot.leave_by):
        return
    for request_id, attempt in mine:
        state.counters["migrations"] += 1
        migrate(state, state.requests[request_id], attempt, "the model leaves the worker", out, tell=True)
    slot.unload_sent = True
    out.append(Order(worker.id, work_pb2.Command(unload=work_pb2.UnloadModel(model=slot.key[0]))))
