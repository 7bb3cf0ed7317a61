"""Counters of service on their way from one leader to the next."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping

from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2
from scheduler.fairness import CLASSES, STANDARD, FairClass, FairQueue
from scheduler.requests import ModelKey

LIMIT = 2048
"""Most tenants' counters that are handed on; those that are furthest ahead count most."""
_PRIORITY = tuple(fleet_pb2.PriorityClass.ValueType(int(priority)) for priority in CLASSES)


def counters(queues: Mapping[ModelKey, FairQueue]) -> list[registry_pb2.TenantService]:
    """Of all models. A tenant that is behind those who wait will begin level with them anyway, and is left out."""
    found: list[registry_pb2.TenantService] = []
    for (model, _), queue in sorted(queues.items()):
        for one in queue.classes:
            if one.virtual > 0:
                found.append(_counter(model, one, "", one.virtual))
                ahead = _ahead(one)
                found += (_counter(model, one, tenant, virtual) for virtual, tenant in ahead)
    if len(found) > LIMIT:
        found = heapq.nlargest(LIMIT, found, key=lambda counter: (not counter.tenant, counter.virtual_tokens))
    return found


def restore(queue: FairQueue, said: Iterable[registry_pb2.TenantService]) -> None:
    """Add an earlier leader's counters to a queue's own: what was charged since comes on top."""
    lowest: dict[int, float] = {}
    for counter in said:
        rank = _PRIORITY.index(counter.priority) if counter.priority in _PRIORITY else STANDARD
        one = queue.classes[rank]
        if not counter.tenant:
            one.virtual += counter.virtual_tokens
            continue
        account = one.accounts.get(counter.tenant) or one.account(counter.tenant, 1)
        account.virtual += counter.virtual_tokens
        lowest[rank] = min(lowest.get(rank, math.inf), counter.virtual_tokens)
    for rank, virtual in lowest.items():
        queue.classes[rank].base += virtual


def _ahead(one: FairClass) -> list[tuple[float, str]]:
    floor = one.floor()
    return [(a.virtual, a.tenant) for a in one.accounts.values() if a.waiting or a.running or a.virtual >= floor]


def _counter(model: str, one: FairClass, tenant: str, virtual: float) -> registry_pb2.TenantService:
    return registry_pb2.TenantService(
        model=model, priority=_PRIORITY[one.rank], tenant=tenant, virtual_tokens=round(virtual, 3)
    )
