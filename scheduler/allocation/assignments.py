"""What each worker ought to hold, as records of intent: written when it changes, read by the next leader."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.internal.v1 import registry_pb2
from scheduler.allocation.book import Book, JobHolding
from scheduler.allocation.holdings import jobs_on
from scheduler.commands import WriteAssignment
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView


def restore(book: Book, records: Iterable[registry_pb2.AssignmentRecord]) -> None:
    """Jobs stay where they were, if there is room. What models are where, workers say themselves."""
    for record in records:
        book.written[record.worker_id] = record
        book.touched.add(record.worker_id)
        for held in record.assignments:
            if not held.model and held.allocation in book.promises:
                book.restored[held.allocation] = JobHolding(
                    held.allocation,
                    record.worker_id,
                    held.device_id,
                    held.budget_bytes,
                    held.cpu_cores,
                    held.disk_bytes,
                )


def write(state: State, out: Outbox) -> None:
    """Write down what has changed since."""
    book = state.book
    if not (book.touched and book.listed and state.settled):
        return
    for worker_id in sorted(book.touched):
        worker = state.workers.get(worker_id)
        record = registry_pb2.AssignmentRecord(worker_id=worker_id, term=state.term)
        if worker is not None:
            record.assignments.extend(_assignments(state, worker))
        known = book.written.get(worker_id)
        if list(record.assignments) == ([] if known is None else list(known.assignments)):
            continue
        if record.assignments:
            book.written[worker_id] = record
        else:
            book.written.pop(worker_id, None)
        out.append(WriteAssignment(record))
    book.touched.clear()


def _assignments(state: State, worker: WorkerView) -> Iterable[registry_pb2.Assignment]:
    for name, slot in sorted(worker.slots.items()):
        if slot.holds and not slot.leaving:
            promise = state.book.of(name, worker.record.pool)
            yield registry_pb2.Assignment(
                model=name,
                version=slot.key[1],
                allocation="" if promise is None else promise.name,
                device_id=slot.device,
                budget_bytes=slot.budget,
            )
    for job in sorted(jobs_on(state.book, worker.id), key=lambda job: job.name):
        yield registry_pb2.Assignment(
            allocation=job.name,
            device_id=job.device_id,
            budget_bytes=job.memory_bytes,
            cpu_cores=job.cpu_cores,
            disk_bytes=job.disk_bytes,
        )
