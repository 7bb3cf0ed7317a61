"""The ledger's hand: twice a second, and when something has changed, see that every promise is kept.

Pure. Promises arrive as events; loads, unloads and assignments leave as commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.allocation import assignments
from scheduler.allocation.book import EXTRA, IDLE, SPARE, JobHolding, claim_rank, is_pinned, minimum
from scheduler.allocation.claims import Place, Round, job_places, load_again, model_places
from scheduler.allocation.holdings import replicas_of
from scheduler.allocation.leaving import go_on, retire
from scheduler.allocation.replicas import Bounds, Load, Replicas
from scheduler.loads import order_loads
from scheduler.members import refresh_catalogue
from scheduler.state import Outbox, State
from scheduler.workers import AVAILABLE, LOADED, ModelSlot, WorkerView


def listed(state: State, event: events.PromisesListed, now: float, out: Outbox) -> None:
    """All promises that stand. Jobs are where an earlier leader had placed them: it names its assignments once."""
    book = state.book
    book.listed = True
    book.revisions = {allocation.name: allocation.revision for allocation in event.allocations}
    names = book.revisions.keys()
    for name in [name for name in book.promises if name not in names]:
        book.promise(name, None)
    for allocation in event.allocations:
        book.promise(allocation.name, allocation)
    assignments.restore(book, event.assignments)
    _promises_changed(state, now, out)


def changed(state: State, event: events.PromiseChanged, now: float, out: Outbox) -> None:
    """A promise was made, changed or taken back. An older revision than the one known is late news."""
    if event.revision and event.revision < state.book.revisions.get(event.name, 0):
        return
    if event.revision:
        state.book.revisions[event.name] = event.revision
    state.book.promise(event.name, event.allocation)
    _promises_changed(state, now, out)


def _promises_changed(state: State, now: float, out: Outbox) -> None:
    for worker in state.workers.values():
        for slot in worker.slots.values():
            if slot.unfit:  # by what was promised then
                slot.state, slot.unfit, slot.detail = AVAILABLE, False, ""
        if worker.connected:
            order_loads(state, worker, out)
    refresh_catalogue(state, now, out)
    state.book.due = True


def rebalance(state: State, event: events.Rebalance, now: float, out: Outbox) -> None:
    """Timer."""
    state.timers.at(now + state.policy.ledger_s, event)
    keep(state, now, out)


def keep(state: State, now: float, out: Outbox) -> None:
    """See that promises are kept, as far as there is room."""
    book = state.book
    book.due = False
    go_on(state, now, out)
    if book.listed and state.settled and (book.promises or book.jobs or book.reserved):
        look = Round(state, now, out, _waiting(state))
        _end_jobs(look)
        for claim in sorted(_claims(look), key=lambda claim: (claim.rank, claim.name)):
            look.meet(claim.name, claim.rank, _places(look, claim), claim.job)
        look.forget_unmet()
        load_again(state, look.released, out)
        go_on(state, now, out)
    assignments.write(state, out)


@dataclass(frozen=True, slots=True)
class _Claim:
    name: str
    rank: int
    promise: fleet_pb2.Allocation
    worker_id: str = ""
    """The only worker that will do; empty: any."""
    job: JobHolding | None = None


def _waiting(state: State) -> dict[str, int]:
    """Requests that wait, of models whose replicas are counted."""
    counted = {promise.model.model for promise in state.book.promises.values() if promise.HasField("model")}
    keys = [key for key in state.waiting.keys() if key[0] in counted]  # noqa: SIM118 - no mapping
    return {key[0]: sum(1 for _ in state.waiting.waiting_for(key)) for key in keys}


def _end_jobs(look: Round) -> None:
    """Jobs that nobody has promised any more, that have changed, or whose worker is gone or empties itself."""
    state = look.state
    for job in list(state.book.jobs.values()):
        promise = state.book.promises.get(job.name)
        worker = state.workers.get(job.worker_id)
        same = promise is not None and promise.HasField("job") and _as_job(promise).memory_bytes == job.memory_bytes
        if same and worker is not None and not worker.draining:
            continue
        del state.book.jobs[job.name]
        state.book.touched.add(job.worker_id)
        look.released.add(job.worker_id)


def _as_job(promise: fleet_pb2.Allocation) -> JobHolding:
    job = promise.job
    return JobHolding(promise.name, "", "", job.memory_bytes, job.cpu_cores, job.disk_bytes)


def _claims(look: Round) -> Iterator[_Claim]:
    """What lacks, of every promise. What is there beyond what is wanted is sent away."""
    look.state.book.asleep.clear()
    for name, promise in sorted(look.state.book.promises.items()):
        if promise.HasField("job"):
            if name not in look.state.book.jobs:
                yield _Claim(name, claim_rank(promise), promise, job=_as_job(promise))
        elif promise.HasField("model"):
            yield from _replica_claims(look, promise)


def _replica_claims(look: Round, promise: fleet_pb2.Allocation) -> Iterator[_Claim]:
    state, model = look.state, promise.model.model
    there = replicas_of(state.book, state.workers, model, promise.pool)
    wanted = _wanted(look, promise, there)
    if not wanted:
        state.book.asleep.add(model)
    rank = claim_rank(promise)
    holders = {worker.id for worker, _ in there}
    pool = [worker for worker in state.workers.values() if worker.record.pool == promise.pool]
    pins = [worker for worker in pool if is_pinned(promise, worker.record)]
    lacking = [worker.id for worker in pins if worker.usable and worker.id not in holders]
    for worker_id in sorted(lacking):
        yield _Claim(f"{promise.name}@{worker_id}", rank, promise, worker_id)
    away = max(0, len(promise.model.pinned_workers) - len(holders & {worker.id for worker in pins}) - len(lacking))
    count = len(there) + len(lacking)
    for number in range(count, wanted - away):
        firm = number < minimum(promise) - away or rank == SPARE
        # Two idle models must not take turns on one place.
        extra = EXTRA if look.waiting.get(model) else IDLE
        yield _Claim(f"{promise.name}#{number}", rank if firm else extra, promise)
    _send_away(look, promise, there, count - max(wanted - away, 0))


def _wanted(look: Round, promise: fleet_pb2.Allocation, there: list[tuple[WorkerView, ModelSlot]]) -> int:
    state, spec, policy = look.state, promise.model, look.state.policy
    able = sum(
        1 for worker in state.workers.values() if worker.record.pool == promise.pool and spec.model in worker.slots
    )
    least = minimum(promise)
    bounds = Bounds(
        least=least,
        most=max(least, spec.max_replicas or able),
        up_s=policy.replica_up_s,
        down_s=policy.replica_down_s,
        idle_s=policy.replica_idle_s,
    )
    known = state.book.replicas.get(promise.name)
    if known is None:
        known = state.book.replicas[promise.name] = Replicas(wanted=len(there))
    return known.look(_load(look, promise, there), bounds, look.now)


def _load(look: Round, promise: fleet_pb2.Allocation, there: list[tuple[WorkerView, ModelSlot]]) -> Load:
    state, model = look.state, promise.model.model
    attempts = [attempt for worker, _ in there for attempt in worker.running.values() if attempt.model == model]
    blocks = sum(slot.total_blocks for _, slot in there if slot.state == LOADED)
    loaded = sum(slot.state == LOADED for _, slot in there)
    most = promise.model.target_requests or state.policy.replica_requests
    if attempts and blocks:
        each = sum(attempt.blocks for attempt in attempts) / len(attempts)
        most = max(1, min(most, int(blocks / loaded / each)))
    return Load(
        waiting=look.waiting.get(model, 0),
        running=len(attempts),
        per_replica=most,
        loaded=loaded,
        arrivals=state.book.arrivals[model],
        departures=state.book.departures[model],
        load_s=load_time(state, model),
    )


def load_time(state: State, model: str) -> float:
    """Seconds that loading a model takes: as last measured, else estimated from its weights."""
    slots = [slot for worker in state.workers.values() if (slot := worker.slots.get(model)) is not None]
    measured = [state.book.load_s[slot.key] for slot in slots if slot.key in state.book.load_s]
    if measured:
        return max(measured)
    return max((slot.record.weight_bytes for slot in slots), default=0) / state.policy.load_bytes_per_s


def _places(look: Round, claim: _Claim) -> Iterator[Place]:
    state = look.state
    pool = [worker for worker in state.workers.values() if worker.record.pool == claim.promise.pool]
    if claim.job is not None:
        return job_places(state, pool, claim.job)
    siblings = {
        kept.worker_id
        for name, kept in state.book.reserved.items()
        if name != claim.name and name.rpartition("#")[0] == claim.promise.name
    }
    fit = (worker for worker in pool if claim.worker_id in ("", worker.id) and worker.id not in siblings)
    return model_places(state, fit, claim.promise.model.model)


def _send_away(
    look: Round, promise: fleet_pb2.Allocation, there: list[tuple[WorkerView, ModelSlot]], surplus: int
) -> None:
    """Take the emptiest replicas away, but none that is pinned."""
    free = [(worker, slot) for worker, slot in there if not is_pinned(promise, worker.record)]
    free.sort(key=lambda pair: pair[0].id, reverse=True)
    free.sort(key=lambda pair: pair[1].held)
    for worker, slot in free[: max(0, surplus)]:
        retire(look.state, worker, slot, look.state.policy.unload_drain_s, look.now)
