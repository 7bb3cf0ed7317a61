"""What is taken of each device, and by whom: the accounts that every load and every job is checked against.

A model counts from the order to load it until its worker says that its memory is free; a job from the moment it is
placed. The sum never exceeds the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmos.internal.v1 import registry_pb2
from scheduler.allocation.book import EXTRA, IDLE, PLEDGED, SPARE, Book, JobHolding, claim_rank, is_pinned, minimum
from scheduler.ledger import demand
from scheduler.policy import Policy
from scheduler.workers import LOADED, ModelSlot, WorkerView


@dataclass(frozen=True, slots=True)
class Holding:
    """A part of a device that is taken."""

    name: str
    """Of the model or the job's allocation."""
    bytes: int
    rank: int
    slot: ModelSlot | None = None
    """None: a job."""


def need_of(book: Book, record: registry_pb2.ModelRecord, policy: Policy) -> int:
    """Bytes without which a model is of no use, corrected by measurement."""
    return demand(record, policy.min_kv_tokens, book.fixed_of(record)).total


def memory_of(worker: WorkerView, device_id: str) -> int:
    """Bytes of a device; 0 if the worker has none of that id."""
    return next((device.memory_bytes for device in worker.record.capacity.devices if device.id == device_id), 0)


def jobs_on(book: Book, worker_id: str) -> Iterator[JobHolding]:
    """Jobs that a worker has been given."""
    return (job for job in book.jobs.values() if job.worker_id == worker_id)


def taken(book: Book, worker: WorkerView, device_id: str) -> int:
    """Bytes of a device that are given out."""
    models = sum(slot.budget + slot.beside for slot in worker.slots.values() if slot.device == device_id)
    return models + sum(job.memory_bytes for job in jobs_on(book, worker.id) if job.device_id == device_id)


def room(book: Book, worker: WorkerView, device_id: str, rank: int, claim: str) -> int:
    """Bytes of a device that a claim of that rank may take now: not what a better or equal one waits for."""
    waiting = sum(
        kept.bytes
        for name, kept in book.reserved.items()
        if kept.worker_id == worker.id and kept.device_id == device_id and kept.rank <= rank and name != claim
    )
    return memory_of(worker, device_id) - taken(book, worker, device_id) - waiting


def restore_jobs(book: Book, worker: WorkerView) -> None:
    """A worker has said what it holds: jobs that an earlier leader had placed there stay if there is room. What it
    wrote may be older than what it did last."""
    for job in [job for job in book.restored.values() if job.worker_id == worker.id]:
        del book.restored[job.name]
        free = memory_of(worker, job.device_id) - taken(book, worker, job.device_id)
        others = list(jobs_on(book, worker.id))
        cores = worker.record.capacity.cpu_cores - sum(other.cpu_cores for other in others)
        disk = worker.record.capacity.disk_bytes - sum(other.disk_bytes for other in others)
        fits = job.memory_bytes <= free and job.cpu_cores <= cores and job.disk_bytes <= disk
        if fits and job.name not in book.jobs and job.name in book.promises:
            book.jobs[job.name] = job
        book.touched.add(worker.id)


def coming(worker: WorkerView, device_id: str) -> int:
    """Bytes of a device that are being freed."""
    going = (slot for slot in worker.slots.values() if slot.device == device_id and slot.leaving)
    return sum(slot.budget + slot.beside for slot in going)


def replicas_of(
    book: Book, workers: dict[str, WorkerView], model: str, pool: str
) -> list[tuple[WorkerView, ModelSlot]]:
    """Where a model is loaded, or about to be, and does not leave: on usable workers of a pool, by id."""
    found = []
    for worker_id in sorted(workers):
        worker = workers[worker_id]
        slot = worker.slots.get(model)
        if slot is not None and worker.record.pool == pool and worker.usable and slot.holds and not slot.leaving:
            found.append((worker, slot))
    return found


def holdings(
    book: Book, workers: dict[str, WorkerView], worker: WorkerView, device_id: str, waiting: dict[str, int]
) -> list[Holding]:
    """Who holds what of a device and with which claim. `waiting`: requests that wait, by model."""
    found = [
        Holding(slot.key[0], slot.budget + slot.beside, rank_of(book, workers, worker, slot, waiting), slot)
        for slot in worker.slots.values()
        if slot.holds and slot.device == device_id and not slot.leaving
    ]
    for job in jobs_on(book, worker.id):
        if job.device_id == device_id:
            promise = book.promises.get(job.name)
            found.append(Holding(job.name, job.memory_bytes, SPARE if promise is None else claim_rank(promise)))
    return found


def rank_of(
    book: Book, workers: dict[str, WorkerView], worker: WorkerView, slot: ModelSlot, waiting: dict[str, int]
) -> int:
    """With which claim a model holds its place on a worker."""
    model = slot.key[0]
    promise = book.of(model, worker.record.pool)
    if promise is None:
        return EXTRA
    least = claim_rank(promise)
    if least == SPARE or is_pinned(promise, worker.record):
        return least
    elsewhere = len(replicas_of(book, workers, model, worker.record.pool))
    if elsewhere <= minimum(promise):
        return least
    idle = slot.state == LOADED and not waiting.get(model) and not _runs(worker, model)
    return IDLE if idle else EXTRA


def _runs(worker: WorkerView, model: str) -> bool:
    return any(attempt.model == model for attempt in worker.running.values())


def firmly_held(rank: int) -> bool:
    """Whether a holding of that rank can only be taken by a better promise."""
    return PLEDGED <= rank < EXTRA
