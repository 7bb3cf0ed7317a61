"""What people see of the fleet: nodes and requests as the Fleet API shows them. Reads the core's state only."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2
from scheduler.fairness import CLASSES
from scheduler.requests import LiveRequest
from scheduler.state import State
from scheduler.workers import LOADED, WELL, ModelSlot, WorkerView


def nodes(
    state: State, schedulers: Iterable[registry_pb2.SchedulerRecord], me: registry_pb2.SchedulerRecord
) -> list[fleet_pb2.Node]:
    """Every node, in order of role and id."""
    others = [record for record in schedulers if record.scheduler_id != me.scheduler_id]
    found = [_scheduler(me, fleet_pb2.NODE_STATE_READY)]
    found += [_scheduler(record, fleet_pb2.NODE_STATE_STANDBY) for record in others]
    found += [_gateway(gateway.node) for gateway in state.gateways.values()]
    found += [_worker(worker) for worker in state.workers.values()]
    return sorted(found, key=lambda node: (node.role, node.id))


def requests(state: State, now: float, limit: int) -> list[fleet_pb2.RequestInfo]:
    """Live requests, oldest first."""
    oldest = sorted(state.requests.values(), key=lambda live: (live.accepted_at, live.id))
    return [_request(live, now) for live in oldest[:limit]]


def _scheduler(record: registry_pb2.SchedulerRecord, state: fleet_pb2.NodeState.ValueType) -> fleet_pb2.Node:
    return fleet_pb2.Node(
        id=record.scheduler_id,
        role=fleet_pb2.NODE_ROLE_SCHEDULER,
        pid=record.pid,
        host=record.host,
        address=record.address,
        state=state,
    )


def _gateway(said: fleet_pb2.Node) -> fleet_pb2.Node:
    node = fleet_pb2.Node()
    node.CopyFrom(said)
    node.role = fleet_pb2.NODE_ROLE_GATEWAY
    node.state = node.state or fleet_pb2.NODE_STATE_READY
    return node


def _worker(worker: WorkerView) -> fleet_pb2.Node:
    record = worker.record
    return fleet_pb2.Node(
        id=worker.id,
        role=fleet_pb2.NODE_ROLE_WORKER,
        pid=record.pid,
        host=record.host,
        address=record.address,
        backend=record.backend,
        models=[_model(slot) for slot in worker.slots.values()],
        state=_worker_state(worker),
        capacity=record.capacity,
        running=len(worker.running),
        uses=worker.decay.uses.values(),
        drain_reason=_drain_reason(worker),
        drain_detail=worker.restart.detail if worker.restart is not None else "",
        ejection_detail=worker.health.reason if worker.health.standing != WELL else "",
    )


def _drain_reason(worker: WorkerView) -> fleet_pb2.DrainReason.ValueType:
    if not worker.draining:
        return fleet_pb2.DRAIN_REASON_UNSPECIFIED
    if worker.restart is not None:
        return worker.restart.reason
    return fleet_pb2.DRAIN_REASON_ORDERED if worker.drain_wanted else fleet_pb2.DRAIN_REASON_LEAVING


def _worker_state(worker: WorkerView) -> fleet_pb2.NodeState.ValueType:
    if not worker.connected:
        return fleet_pb2.NODE_STATE_LOST if worker.attachments else fleet_pb2.NODE_STATE_STARTING
    if worker.draining:
        return fleet_pb2.NODE_STATE_DRAINING
    if worker.health.standing != WELL:
        return fleet_pb2.NODE_STATE_EJECTED
    loaded = any(slot.state == LOADED for slot in worker.slots.values())
    return fleet_pb2.NODE_STATE_READY if loaded else fleet_pb2.NODE_STATE_STARTING


def _model(slot: ModelSlot) -> fleet_pb2.NodeModel:
    return fleet_pb2.NodeModel(
        name=slot.key[0],
        version=slot.key[1],
        state=slot.state,
        total_blocks=slot.total_blocks,
        free_blocks=slot.free_blocks,
        detail=slot.detail,
    )


def _request(live: LiveRequest, now: float) -> fleet_pb2.RequestInfo:
    return fleet_pb2.RequestInfo(
        request_id=live.id,
        state=_request_state(live),
        model=live.request.adapter or live.request.model,
        tenant=live.request.tenant,
        worker=live.attempt.worker_id if live.attempt is not None else "",
        attempt=live.attempt.number if live.attempt is not None else live.attempts,
        tokens_in=len(live.request.token_ids),
        tokens_out=live.tokens_out,
        age_ms=max(0, int((now - live.accepted_at) * 1000)),
        trace_id=_trace_id(live.request.trace.traceparent),
        priority=priority_of(live),
    )


def priority_of(live: LiveRequest) -> fleet_pb2.PriorityClass.ValueType:
    """Its class of service."""
    return fleet_pb2.PriorityClass.ValueType(int(CLASSES[live.rank]))


def _request_state(live: LiveRequest) -> fleet_pb2.RequestState.ValueType:
    if live.attempt is None:
        return fleet_pb2.REQUEST_STATE_QUEUED
    return fleet_pb2.REQUEST_STATE_DECODE if live.attempt.produced else fleet_pb2.REQUEST_STATE_PREFILL


def _trace_id(traceparent: str) -> str:
    """The second field of W3C's header."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else ""
