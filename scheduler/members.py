"""Workers that come and go: records, streams, models to load, attempts that a new leader finds running."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import fleet_pb2
from scheduler import admission, events, health
from scheduler.allocation.holdings import restore_jobs
from scheduler.commands import Dial, HangUp, Order, SendCatalogue
from scheduler.lifecycle import forget_claim, migrate
from scheduler.loads import order_loads
from scheduler.state import Outbox, State
from scheduler.timing import Times
from scheduler.workers import AVAILABLE, ModelSlot, WorkerView

_SETTLE_AGAIN_S = 0.25


def registered(state: State, event: events.WorkerRegistered, now: float, out: Outbox) -> None:
    """A record appeared or changed: make sure that its worker is dialled."""
    record = event.record
    worker = state.workers.get(record.worker_id)
    if worker is None:
        worker = state.workers[record.worker_id] = WorkerView(record)
        out.append(Dial(record.worker_id, record.address))
    elif worker.record.address != record.address:
        out += (HangUp(worker.id), Dial(worker.id, record.address))
    worker.record = record
    worker.registered = True
    fresh = [ModelSlot(model) for model in record.models if model.model.name not in worker.slots]
    for slot in fresh:
        slot.times = Times(state.times_of(slot.key))
        # What comes into the record of a worker that has reported already is there to be loaded.
        slot.state = AVAILABLE if worker.connected else slot.state
        worker.slots[slot.key[0]] = slot
    if fresh and worker.connected:
        order_loads(state, worker, out)
        refresh_catalogue(state, now, out)


def deregistered(state: State, event: events.WorkerDeregistered, now: float, out: Outbox) -> None:
    """A record is gone. Membership is not life: while its stream lives the worker goes on serving."""
    worker = state.workers.get(event.worker_id)
    if worker is not None:
        worker.registered = False
        if not worker.connected:
            _forget(state, worker, out)


def listed(state: State, event: events.MembersListed, now: float, out: Outbox) -> None:
    """Everybody who was registered at the election is known now."""
    state.members_listed = True
    _settle_early(state, now, out)


def attached(state: State, event: events.WorkerAttached, now: float, out: Outbox) -> None:
    """A worker answered: learn what it has, order what it may load, sort out what it runs."""
    worker = state.workers.get(event.worker_id)
    if worker is None:
        return
    if worker.connected:
        _disconnect(state, worker, "stream replaced", out)
    worker.connected = True
    worker.draining = False
    if worker.health.hung:
        health.on_trial(state, worker)
    heard_draining(state, worker, event.report.draining)
    if event.report.drain_reason:  # an earlier leader ordered it
        report = event.report
        worker.restart = work_pb2.Drain(restart=True, reason=report.drain_reason, detail=report.drain_detail)
    if worker.drain_wanted is not None and worker.drain_wanted != event.report.draining:
        order_drain(worker, out)
    worker.attachments += 1
    worker.step_at = now
    state.prefixes.clear(worker.id)
    worker.fingerprint = event.report.numerics_fingerprint
    state.standing_changed(worker)
    for slot in worker.slots.values():
        slot.ordered = slot.unload_sent = False
    models_changed(state, worker, event.report.models, now, out)
    order_loads(state, worker, out)
    refresh_catalogue(state, now, out)
    for running in event.report.running:
        _reconcile(state, worker, running, now, out)
    settled_at = now + state.policy.settle_s
    state.timers.at(settled_at, events.WorkerSettled(worker.id, worker.attachments))
    _settle_early(state, now, out)


def detached(state: State, event: events.WorkerDetached, now: float, out: Outbox) -> None:
    """A stream ended: what ran there goes on elsewhere."""
    worker = state.workers.get(event.worker_id)
    if worker is not None and worker.connected:
        if event.damaged:
            state.counters["damaged_streams"] += 1
            health.struck(state, worker, event.reason, now)
        _disconnect(state, worker, event.reason, out)
        if not worker.registered:
            _forget(state, worker, out)


def _disconnect(state: State, worker: WorkerView, reason: str, out: Outbox) -> None:
    worker.connected = False
    state.prefixes.clear(worker.id)
    state.standing_changed(worker)
    for request_id in worker.unclaimed:
        state.claims.pop(request_id, None)
    worker.unclaimed.clear()
    for slot in worker.slots.values():
        state.lost_room(worker.id, slot)
    for request_id, attempt in list(worker.running.items()):
        state.counters["migrations"] += 1
        migrate(state, state.requests[request_id], attempt, f"worker lost: {reason}", out, tell=False)
    health.rescue(state)


def _forget(state: State, worker: WorkerView, out: Outbox) -> None:
    del state.workers[worker.id]
    state.prefixes.forget(worker.id)
    state.standing_changed(worker)
    state.book.touched.add(worker.id)
    out.append(HangUp(worker.id))


def order_drain(worker: WorkerView, out: Outbox) -> None:
    """Tell a worker what an operator wants of it. One that is away is told when it comes back."""
    if worker.connected and worker.drain_wanted is not None:
        drain = worker.restart or work_pb2.Drain(undo=not worker.drain_wanted)
        out.append(Order(worker.id, work_pb2.Command(drain=drain)))


def heard_draining(state: State, worker: WorkerView, said: bool) -> None:
    """A worker says whether it empties itself. While an order to do so is on its way, it does not know yet."""
    draining = said or worker.drain_wanted is True
    if draining != worker.draining:
        set_draining(state, worker, draining)


def set_draining(state: State, worker: WorkerView, draining: bool) -> None:
    """A worker empties itself, or has changed its mind."""
    worker.draining = draining
    if draining:
        worker.drain_look += 1
        state.timers.at(state.now, events.DrainDue(worker.id, worker.drain_look))
    state.standing_changed(worker)
    for slot in worker.slots.values():
        state.room_changed(worker, slot)
    health.rescue(state)


def models_changed(
    state: State, worker: WorkerView, said: Iterable[fleet_pb2.NodeModel], now: float, out: Outbox
) -> None:
    """Take over what a worker says of its models; order loads and tell gateways where that changes something."""
    changed = False
    for model in said:
        slot = worker.slots.get(model.name)
        if slot is None or slot.key[1] != model.version:
            continue
        if (slot.state, slot.total_blocks) != (model.state, model.total_blocks):
            changed = True
        before = slot.budget
        slot.report(model)
        state.book.learn(slot.record, model)
        if slot.budget != before:
            state.book.touched.add(worker.id)
            state.book.due = True
        state.room_changed(worker, slot)
    if state.book.restored:
        restore_jobs(state.book, worker)
    if changed:
        state.standing_changed(worker)
        order_loads(state, worker, out)
        refresh_catalogue(state, now, out)


def refresh_catalogue(state: State, now: float, out: Outbox) -> None:
    """Tell gateways if the models that can be asked for have changed, and look at requests that wait for one."""
    book, grace_s = state.book, state.policy.no_worker_grace_s
    changed = state.catalogue.refresh(state.workers.values(), now, grace_s, book.of, listed=book.listed)
    if changed and state.settled:
        _publish(state, out)
    if changed and state.parked:
        admission.unpark(state, now, out)


def _publish(state: State, out: Outbox) -> None:
    message = state.catalogue.message()
    out += [SendCatalogue(gateway.stream_id, message) for gateway in state.gateways.values()]


def _settle_early(state: State, now: float, out: Outbox) -> None:
    """Settle as soon as every registered worker has reported."""
    if state.members_listed and state.workers and all(worker.connected for worker in state.workers.values()):
        settle(state, events.Settled(), now, out)


def settle(state: State, event: events.Settled, now: float, out: Outbox) -> None:
    """From now on a model that nobody has reported does not exist. Gateways get their first catalogue."""
    if state.settled:
        return
    silent = any(not worker.attachments for worker in state.workers.values())
    if silent and now < state.elected_at + state.policy.settle_limit_s:
        state.timers.at(now + _SETTLE_AGAIN_S, event)
        return
    state.settled = True
    state.looking.update(state.waiting.keys())
    _publish(state, out)
    admission.unpark(state, now, out)


def _reconcile(state: State, worker: WorkerView, running: work_pb2.RunningAttempt, now: float, out: Outbox) -> None:
    """Keep what a gateway may yet ask for; cancel what is certainly unwanted."""
    request_id = running.request_id
    live = state.requests.get(request_id)
    wanted = live.attempt is None if live is not None else not state.settled
    if wanted and state.tombstones.get(request_id, now) is None and _newest(state, running):
        forget_claim(state, request_id, out, tell=True)
        worker.unclaimed[request_id] = running.epoch
        state.claims[request_id] = worker.id
        if live is not None and request_id in state.waiting:
            state.looking.add(live.key)
    else:
        _cancel(worker, request_id, running.epoch, out)


def _newest(state: State, running: work_pb2.RunningAttempt) -> bool:
    """No other worker has reported a later attempt at the same request."""
    other = state.workers.get(state.claims.get(running.request_id, ""))
    if other is None:
        return True
    epoch = other.unclaimed[running.request_id]
    return (running.epoch.term, running.epoch.attempt) > (epoch.term, epoch.attempt)


def worker_settled(state: State, event: events.WorkerSettled, now: float, out: Outbox) -> None:
    """Nobody has asked for the rest of what this worker runs."""
    worker = state.workers.get(event.worker_id)
    if worker is None or worker.attachments != event.attachment:
        return
    for request_id in list(worker.unclaimed):
        forget_claim(state, request_id, out, tell=True)


def _cancel(worker: WorkerView, request_id: str, epoch: request_pb2.Epoch, out: Outbox) -> None:
    cancel = work_pb2.CancelAttempt(request_id=request_id, epoch=epoch)
    out.append(Order(worker.id, work_pb2.Command(cancel=cancel)))
