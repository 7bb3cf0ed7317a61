"""Whether a promise makes sense and could ever be kept: judged before it is written, from what the fleet has."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmos.errors import Conflict, InvalidRequest, ModelNotFound
from llmos.v1 import fleet_pb2
from scheduler.allocation.book import GUARANTEED, is_pinned, minimum
from scheduler.allocation.holdings import need_of
from scheduler.state import State
from scheduler.workers import WorkerView

MOST_ALLOCATIONS = 1000
_MOST_REPLICAS = 10_000
_MOST_PINS = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_GIB = 2**30


def check(state: State, allocation: fleet_pb2.Allocation) -> None:
    """Raises InvalidRequest, ModelNotFound or Conflict if it could never be kept. A fleet may still grow: what lacks a
    worker now, in a pool without any, is let through."""
    if not _NAME.fullmatch(allocation.name):
        raise InvalidRequest(
            "An allocation's name has 1 to 63 letters, digits, dots, dashes or underscores.", param="name"
        )
    known = state.book.promises
    if allocation.name not in known and len(known) >= MOST_ALLOCATIONS:
        raise Conflict(f"There are {MOST_ALLOCATIONS} allocations already: delete one first.", param="name")
    kind = allocation.WhichOneof("holder")
    workers = [worker for worker in state.workers.values() if worker.record.pool == allocation.pool]
    if kind == "model":
        _check_model(state, allocation, workers)
    elif kind == "job":
        _check_job(allocation.job, workers)
    else:
        raise InvalidRequest("An allocation is for a model or for a job: name one.", param="holder")
    if allocation.resource_class == GUARANTEED:
        _check_sum(state, allocation, workers)


def _check_model(state: State, allocation: fleet_pb2.Allocation, workers: list[WorkerView]) -> None:
    spec = allocation.model
    if not spec.model:
        raise InvalidRequest("Name the model whose replicas are promised.", param="model")
    other = state.book.of(spec.model, allocation.pool)
    if other is not None and other.name != allocation.name:
        raise Conflict(
            f"The replicas of '{spec.model}' in that pool are promised by '{other.name}': change that one.",
            param="model",
        )
    _check_numbers(spec)
    _check_shares(spec.reserved)
    holders = [worker for worker in workers if spec.model in worker.slots]
    if workers and not holders:
        raise ModelNotFound(f"No worker of {_pool(allocation)} holds a model '{spec.model}'.", param="model")
    if any(worker.slots[spec.model].base for worker in holders):
        raise InvalidRequest(
            f"'{spec.model}' is an adapter, which is loaded on request beside its base: promise that.", param="model"
        )
    _check_room(state, allocation, holders)


def _check_numbers(spec: fleet_pb2.ModelReplicas) -> None:
    if spec.max_replicas and spec.min_replicas > spec.max_replicas:
        raise InvalidRequest(
            f"At least {spec.min_replicas} and at most {spec.max_replicas} replicas contradict each other.",
            param="max_replicas",
        )
    if spec.max_replicas and len(spec.pinned_workers) > spec.max_replicas:
        raise InvalidRequest(
            f"{len(spec.pinned_workers)} pinned workers are more than the {spec.max_replicas} replicas allowed.",
            param="pinned_workers",
        )
    if max(spec.min_replicas, spec.max_replicas) > _MOST_REPLICAS or len(spec.pinned_workers) > _MOST_PINS:
        raise InvalidRequest(f"At most {_MOST_REPLICAS} replicas and {_MOST_PINS} pins.", param="min_replicas")
    if len(set(spec.pinned_workers)) < len(spec.pinned_workers):
        raise InvalidRequest("A worker is pinned twice.", param="pinned_workers")


def _check_shares(shares: Iterable[fleet_pb2.ReservedShare]) -> None:
    total = 0
    for share in shares:
        if not 1 <= share.percent <= 100:
            raise InvalidRequest("A reserved share has 1 to 100 percent.", param="reserved")
        if not share.tenant and not share.priority:
            raise InvalidRequest("A reserved share names a tenant, a class, or both.", param="reserved")
        total += share.percent
    if total > 100:
        raise InvalidRequest(f"The reserved shares make {total} percent.", param="reserved")


def _check_room(state: State, allocation: fleet_pb2.Allocation, holders: list[WorkerView]) -> None:
    """Each replica by itself: workers whose largest device could hold it, had they nothing else."""
    if not holders:
        return
    spec = allocation.model
    needs = {worker.id: need_of(state.book, worker.slots[spec.model].record, state.policy) for worker in holders}
    able = [worker for worker in holders if _largest(worker) >= needs[worker.id]]
    for pin in spec.pinned_workers:
        pinned = [worker for worker in holders if pin in (worker.id, worker.record.host)]
        if not pinned:
            raise InvalidRequest(f"No worker '{pin}' of that pool holds '{spec.model}'.", param="pinned_workers")
        if not any(worker in able for worker in pinned):
            raise Conflict(
                f"'{spec.model}' needs {needs[pinned[0].id] / _GIB:.1f} GiB, the largest device of '{pin}' has "
                f"{_largest(pinned[0]) / _GIB:.1f} GiB.",
                param="pinned_workers",
            )
    if spec.min_replicas > len(able):
        raise Conflict(
            f"{spec.min_replicas} replicas of '{spec.model}' could never stand: {len(able)} of {len(holders)} workers "
            f"that hold it are large enough ({min(needs.values()) / _GIB:.1f} GiB).",
            param="min_replicas",
        )


def _check_job(job: fleet_pb2.JobResources, workers: list[WorkerView]) -> None:
    if not (job.memory_bytes or job.cpu_cores or job.disk_bytes):
        raise InvalidRequest("A job takes memory, processors or disk: say how much.", param="memory_bytes")
    if not 0 <= job.cpu_cores <= 10_000:
        raise InvalidRequest("A job takes 0 to 10,000 processors.", param="cpu_cores")
    if workers and not any(_fits(job, worker) for worker in workers):
        roomiest = max(workers, key=_largest)
        raise Conflict(
            f"No worker is large enough for the job: the largest device has {_largest(roomiest) / _GIB:.1f} GiB, "
            f"the most processors are {max(worker.record.capacity.cpu_cores for worker in workers):g}, "
            f"the most disk is {max(worker.record.capacity.disk_bytes for worker in workers) / _GIB:.1f} GiB.",
            param="memory_bytes",
        )


def _check_sum(state: State, allocation: fleet_pb2.Allocation, workers: list[WorkerView]) -> None:
    """What is guaranteed must fit together: into the pool as a whole, and on each worker what is pinned there."""
    pledged = [
        promise
        for promise in state.book.promises.values()
        if promise.resource_class == GUARANTEED and promise.pool == allocation.pool and promise.name != allocation.name
    ]
    pledged.append(allocation)
    if not workers:
        return
    total = sum(device.memory_bytes for worker in workers for device in worker.record.capacity.devices)
    wanted = sum(_least_bytes(state, promise, workers) for promise in pledged)
    if wanted > total:
        raise Conflict(
            f"What is guaranteed would need {wanted / _GIB:.1f} GiB, the pool has {total / _GIB:.1f} GiB.",
            param="class",
        )
    for worker in workers:
        pinned = [p for p in pledged if p.HasField("model") and is_pinned(p, worker.record)]
        there = [p for p in pinned if p.model.model in worker.slots]
        need = sum(need_of(state.book, worker.slots[p.model.model].record, state.policy) for p in there)
        has = sum(device.memory_bytes for device in worker.record.capacity.devices)
        if need > has:
            raise Conflict(
                f"What is guaranteed on '{worker.id}' would need {need / _GIB:.1f} GiB, it has {has / _GIB:.1f} GiB.",
                param="pinned_workers",
            )


def _least_bytes(state: State, promise: fleet_pb2.Allocation, workers: list[WorkerView]) -> int:
    if promise.HasField("job"):
        return promise.job.memory_bytes
    model = promise.model.model
    needs = [need_of(state.book, w.slots[model].record, state.policy) for w in workers if model in w.slots]
    return minimum(promise) * min(needs, default=0)


def _pool(allocation: fleet_pb2.Allocation) -> str:
    return f"the pool '{allocation.pool}'" if allocation.pool else "the default pool"


def _fits(job: fleet_pb2.JobResources, worker: WorkerView) -> bool:
    capacity = worker.record.capacity
    return (
        job.memory_bytes <= _largest(worker)
        and job.cpu_cores <= capacity.cpu_cores
        and job.disk_bytes <= capacity.disk_bytes
    )


def _largest(worker: WorkerView) -> int:
    return max((device.memory_bytes for device in worker.record.capacity.devices), default=0)
