"""One claim after another, best first: take room that is there, wait for room that comes, or have others give way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from scheduler.allocation.book import SPARE, JobHolding, Reservation
from scheduler.allocation.holdings import Holding, coming, firmly_held, holdings, memory_of, need_of, room
from scheduler.allocation.leaving import retire
from scheduler.loads import load_model, order_loads
from scheduler.state import Outbox, State
from scheduler.workers import AVAILABLE, ModelSlot, WorkerView


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere that a claim could be met."""

    worker: WorkerView
    device_id: str
    need: int
    slot: ModelSlot | None = None
    """Of a model; None: a job."""


@dataclass(slots=True)
class Round:
    """One look at all claims."""

    state: State
    now: float
    out: Outbox
    waiting: dict[str, int]
    """Requests that wait, by model."""
    met: set[str] = field(default_factory=set)
    """Claims that were looked at."""
    released: set[str] = field(default_factory=set)
    """Workers where room is no longer kept, or was given up by a job: others may have it."""

    def meet(self, claim: str, rank: int, places: Iterable[Place], job: JobHolding | None = None) -> bool:
        """Try to give a claim its place; whether it has it now. If room is coming somewhere, it is kept for it."""
        found = self._in_order(claim, rank, places)
        before = self.state.book.reserved.pop(claim, None)
        self.met.add(claim)
        if any(self._take(place, rank, claim, job) for place in found):
            return True
        for place in found:
            if self._make_way(place, rank, claim):
                if self._take(place, rank, claim, job):
                    return True
                kept = Reservation(place.worker.id, place.device_id, rank, place.need)
                self.state.book.reserved[claim] = kept
                break
        if before is not None and before != self.state.book.reserved.get(claim):
            self.released.add(before.worker_id)
        return False

    def forget_unmet(self) -> None:
        """Room that was kept for claims which nobody makes any more is free."""
        for claim in self.state.book.reserved.keys() - self.met:
            self.released.add(self.state.book.reserved.pop(claim).worker_id)

    def _in_order(self, claim: str, rank: int, places: Iterable[Place]) -> list[Place]:
        """Where it already waits, then where most is free or comes free."""
        kept = self.state.book.reserved.get(claim)
        chosen = None if kept is None else kept.worker_id

        def key(place: Place) -> tuple[bool, int, str]:
            free = self._room(place, rank, claim) + coming(place.worker, place.device_id)
            return place.worker.id != chosen, -free, place.worker.id

        return sorted(places, key=key)

    def _room(self, place: Place, rank: int, claim: str) -> int:
        return room(self.state.book, place.worker, place.device_id, rank, claim)

    def _take(self, place: Place, rank: int, claim: str, job: JobHolding | None) -> bool:
        if self._room(place, rank, claim) < place.need:
            return False
        if place.slot is not None:
            return load_model(self.state, place.worker, place.slot, place.device_id, rank, claim, self.out)
        assert job is not None
        self.state.book.jobs[job.name] = JobHolding(
            job.name, place.worker.id, place.device_id, job.memory_bytes, job.cpu_cores, job.disk_bytes
        )
        self.state.book.touched.add(place.worker.id)
        return True

    def _make_way(self, place: Place, rank: int, claim: str) -> bool:
        """Whether room will be there: it is coming, or what has a lesser claim gives way now."""
        short = place.need - self._room(place, rank, claim) - coming(place.worker, place.device_id)
        if short <= 0:
            return True
        victims: list[Holding] = []
        for holding, gain in self._yielding(place, rank):
            if short <= 0:
                break
            victims.append(holding)
            short -= gain
        if short > 0:
            return False
        for victim in victims:
            self._evict(place.worker, victim)
        return True

    def _yielding(self, place: Place, rank: int) -> Iterator[tuple[Holding, int]]:
        """Who would give way, and what that brings: least claim first. A firm claim also gets what others have beyond
        their need: they are loaded again with less."""
        state = self.state
        held = holdings(state.book, state.workers, place.worker, place.device_id, self.waiting)
        lesser = [holding for holding in held if holding.rank > rank]
        yield from (
            (holding, holding.bytes)
            for holding in sorted(lesser, key=lambda h: (-h.rank, _running(place.worker, h), -h.bytes, h.name))
        )
        if not firmly_held(rank):
            return
        for holding in sorted(held, key=lambda h: (-h.rank, -h.bytes, h.name)):
            if holding.rank <= rank and holding.slot is not None:
                surplus = holding.slot.budget - need_of(state.book, holding.slot.record, state.policy)
                if surplus > 0:
                    yield holding, surplus

    def _evict(self, worker: WorkerView, victim: Holding) -> None:
        state = self.state
        state.counters["evictions"] += 1
        state.book.touched.add(worker.id)
        if victim.slot is None:
            del state.book.jobs[victim.name]
            return
        patience = 0.0 if victim.rank == SPARE else state.policy.unload_drain_s
        retire(state, worker, victim.slot, patience, self.now)


def model_places(state: State, workers: Iterable[WorkerView], model: str) -> Iterator[Place]:
    """Usable workers that could load a model that they have not loaded, each on its roomiest device."""
    for worker in workers:
        slot = worker.slots.get(model)
        if slot is None or not worker.usable or slot.state != AVAILABLE or slot.ordered or slot.holds:
            continue
        need = need_of(state.book, slot.record, state.policy)
        device = _device(state, worker, need)
        if device is not None:
            yield Place(worker, device, need, slot)


def job_places(state: State, workers: Iterable[WorkerView], job: JobHolding) -> Iterator[Place]:
    """Usable workers that are large enough for a job beside the other jobs' processors and disk."""
    for worker in workers:
        others = [other for other in state.book.jobs.values() if other.worker_id == worker.id]
        cores = worker.record.capacity.cpu_cores - sum(other.cpu_cores for other in others)
        disk = worker.record.capacity.disk_bytes - sum(other.disk_bytes for other in others)
        if not worker.usable or job.cpu_cores > cores or job.disk_bytes > disk:
            continue
        device = _device(state, worker, job.memory_bytes)
        if device is not None:
            yield Place(worker, device, job.memory_bytes)


def _device(state: State, worker: WorkerView, need: int) -> str | None:
    """The roomiest device of the default's kind on which `need` bytes could ever lie; another kind if there is none."""
    devices = [device for device in worker.record.capacity.devices if memory_of(worker, device.id) >= need]
    if not devices:
        return None
    default = worker.record.capacity.devices[0].kind
    free = {device.id: room(state.book, worker, device.id, SPARE, "") for device in devices}
    return max(devices, key=lambda device: (device.kind == default, free[device.id] + coming(worker, device.id))).id


def load_again(state: State, worker_ids: Iterable[str], out: Outbox) -> None:
    """Workers where room was kept for somebody who no longer waits: others may have it."""
    for worker_id in sorted(set(worker_ids)):
        worker = state.workers.get(worker_id)
        if worker is not None and worker.usable:
            order_loads(state, worker, out)


def _running(worker: WorkerView, holding: Holding) -> int:
    return sum(attempt.model == holding.name for attempt in worker.running.values())
