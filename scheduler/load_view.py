"""What the fleet does now, as `GetLoad` shows it: queues, models, workers. Reads the core's state only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmos.v1 import fleet_pb2
from scheduler.fairness import CLASSES
from scheduler.meters import Histogram
from scheduler.requests import LiveRequest, ModelKey, most_tokens
from scheduler.state import State
from scheduler.views import priority_of
from scheduler.workers import HOPELESS, LOADED, ModelSlot, WorkerView

_SHARES = (0.5, 0.95, 0.99)
_QUIET = 0.01
"""Tokens per second below which nothing is recent."""


@dataclass(slots=True)
class _Queue:
    waiting: int = 0
    waiting_tokens: int = 0
    running: int = 0
    rate: float = 0.0
    weight: int = 1


@dataclass(slots=True)
class _Model:
    replicas: int = 0
    wanted: int = 0
    waiting: int = 0
    running: int = 0
    rate: float = 0.0


@dataclass(slots=True)
class _Sums:
    queues: dict[tuple[int, str], _Queue] = field(default_factory=dict)
    models: dict[ModelKey, _Model] = field(default_factory=dict)


def load(state: State, nodes: Sequence[fleet_pb2.Node], now: float) -> fleet_pb2.GetLoadResponse:
    """One snapshot; linear in live requests and workers."""
    sums = _Sums()
    for live in state.requests.values():
        _count(sums, live)
    for (rank, tenant, key), cell in state.meters.cells.items():
        produced, read = cell.flow.rate(cell.produced, now), cell.prompts.rate(cell.read, now)
        if cell.live or produced + read > _QUIET:
            number = int(CLASSES[rank])
            sums.queues.setdefault((number, tenant), _Queue()).rate += produced + read
            sums.models.setdefault(key, _Model()).rate += produced
    for worker in state.workers.values():
        for slot in worker.slots.values():
            _count_slot(sums, worker, slot)
    return fleet_pb2.GetLoadResponse(
        term=state.term,
        queues=[_queue(*key, queue) for key, queue in sorted(sums.queues.items())],
        models=[_model(state, key, model, now) for key, model in sorted(sums.models.items())],
        workers=[_worker(state, worker, now) for _, worker in sorted(state.workers.items())],
        nodes=nodes,
        counters={name: count for name, count in state.counters.items() if count >= 0},
    )


def _count(sums: _Sums, live: LiveRequest) -> None:
    request = live.request
    queue = sums.queues.setdefault((priority_of(live), request.tenant), _Queue())
    queue.weight = max(queue.weight, request.tenant_weight)
    model = sums.models.setdefault(live.key, _Model())
    if live.attempt is not None:
        queue.running += 1
        model.running += 1
        return
    queue.waiting += 1
    queue.waiting_tokens += most_tokens(request)
    model.waiting += 1


def _count_slot(sums: _Sums, worker: WorkerView, slot: ModelSlot) -> None:
    if slot.base or slot.state in HOPELESS or not worker.connected:
        return
    model = sums.models.setdefault(slot.key, _Model())
    model.replicas += slot.state == LOADED
    model.wanted += slot.state == LOADED or slot.ordered


def _queue(priority: int, tenant: str, queue: _Queue) -> fleet_pb2.QueueLoad:
    return fleet_pb2.QueueLoad(
        priority=fleet_pb2.PriorityClass.ValueType(priority),
        tenant=tenant,
        waiting=queue.waiting,
        waiting_tokens=queue.waiting_tokens,
        running=queue.running,
        tokens_per_s=queue.rate,
        weight=queue.weight,
    )


def _model(state: State, key: ModelKey, model: _Model, now: float) -> fleet_pb2.ModelLoad:
    meter = state.meters.models.get(key)
    return fleet_pb2.ModelLoad(
        name=key[0],
        version=key[1],
        replicas=model.replicas,
        wanted=model.wanted,
        waiting=model.waiting,
        running=model.running,
        tokens_per_s=model.rate,
        ttft=_percentiles(meter.ttft, now) if meter is not None else None,
        gap=_percentiles(meter.gap, now) if meter is not None else None,
    )


def _percentiles(times: Histogram, now: float) -> fleet_pb2.Percentiles:
    p50, p95, p99 = (1000 * seconds for seconds in times.quantiles(_SHARES, now))
    return fleet_pb2.Percentiles(p50_ms=p50, p95_ms=p95, p99_ms=p99)


def _worker(state: State, worker: WorkerView, now: float) -> fleet_pb2.WorkerLoad:
    tokens, steps = state.meters.worker_rates(worker, now)
    return fleet_pb2.WorkerLoad(node_id=worker.id, running=len(worker.running), tokens_per_s=tokens, steps_per_s=steps)
