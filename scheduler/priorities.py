"""A person moves a request to another class of service."""

from __future__ import annotations

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler import charges, events
from scheduler.commands import Order
from scheduler.fairness import CLASSES, rank_of
from scheduler.lifecycle import send_class, wait
from scheduler.state import Outbox, State


def reprioritized(state: State, event: events.Reprioritized, now: float, out: Outbox) -> None:
    """From now on the request waits, or runs, and is charged in that class. Its gateway tells a new leader."""
    live = state.requests.get(event.request_id)
    rank = rank_of(event.priority)
    if live is None or live.rank == rank:
        return
    waiting = state.waiting.discard(live)
    if live.attempt is not None:
        charges.stopped(live)
    live.rank = rank
    state.meters.enter(live, now)
    send_class(state, live, out)
    if waiting:
        wait(state, live)
    elif live.attempt is not None:
        live.account = state.waiting.account(live)
        charges.moved(live)
        priority = fleet_pb2.PriorityClass.ValueType(int(CLASSES[rank]))
        for attempt in live.running:
            change = work_pb2.SetPriority(request_id=live.id, epoch=attempt.epoch, priority=priority)
            out.append(Order(attempt.worker_id, work_pb2.Command(set_priority=change)))
