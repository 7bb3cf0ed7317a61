"""A model of etcd's state machine: revisions, transactions, leases, history, compaction. Pure; time is an argument.

After etcd's own documents (API guarantees; lease and mvcc packages of 3.5). What one cluster agrees on is here; what
members and wires do to it is in `etcd_cluster.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmos.etcd import messages as pb

LEAST_TTL_S = 2


@dataclass(slots=True)
class Stored:
    """One key."""

    value: bytes
    create: int
    mod: int
    version: int
    lease: int


@dataclass(slots=True)
class Granted:
    """One lease."""

    ttl_s: int
    expires_at: float
    keys: set[bytes] = field(default_factory=set)


class LeaseNotFound(Exception):
    """etcd's answer to a write under a lease that is gone."""


def in_range(key: bytes, start: bytes, end: bytes) -> bool:
    """etcd's ranges: no end is one key, a zero byte is everything from the start on."""
    if not end:
        return key == start
    return key >= start and (end == b"\0" or key < end)


class EtcdStore:
    """One linearizable history. Listeners hear every revision's events, in order."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.keys: dict[bytes, Stored] = {}
        self.leases: dict[int, Granted] = {}
        self.history: list[tuple[int, list[Any]]] = []
        self.listeners: list[Callable[[int, list[Any]], None]] = []
        self._next_lease = 1000

    def header(self) -> Any:
        """As it stands in every answer."""
        return pb.ResponseHeader(revision=self.revision)

    def range(self, request: Any) -> Any:
        """A read."""
        found = sorted(key for key in self.keys if in_range(key, request.key, request.range_end))
        kvs = [] if request.count_only else [self._key_value(key) for key in found]
        return pb.RangeResponse(header=self.header(), kvs=kvs, count=len(found))

    def put(self, request: Any) -> Any:
        """A write of its own."""
        events = self._put(request, self.revision + 1)
        self._commit(events)
        return pb.PutResponse(header=self.header())

    def delete_range(self, request: Any) -> Any:
        """A deletion of its own."""
        events = self._delete(request, self.revision + 1)
        self._commit(events)
        return pb.DeleteRangeResponse(header=self.header(), deleted=len(events))

    def txn(self, request: Any) -> Any:
        """All or nothing, in one revision."""
        holds = all(self._compare(one) for one in request.compare)
        operations = request.success if holds else request.failure
        for one in operations:
            if one.WhichOneof("request") == "request_put":
                self._check_lease(one.request_put.lease)
        events: list[Any] = []
        responses = [self._operate(one, events) for one in operations]
        self._commit(events)
        return pb.TxnResponse(header=self.header(), succeeded=holds, responses=responses)

    def grant(self, ttl_s: int, now: float) -> Any:
        """A lease; etcd has a least TTL."""
        ttl_s = max(LEAST_TTL_S, ttl_s)
        self._next_lease += 1
        self.leases[self._next_lease] = Granted(ttl_s, now + ttl_s)
        return pb.LeaseGrantResponse(header=self.header(), ID=self._next_lease, TTL=ttl_s)

    def keep_alive(self, lease_id: int, now: float, *, lie: bool) -> Any:
        """A renewal; TTL 0: no such lease. `lie`: a lease that is gone is reported as renewed."""
        lease = self.leases.get(lease_id)
        if lease is None:
            return pb.LeaseKeepAliveResponse(header=self.header(), ID=lease_id, TTL=5 if lie else 0)
        lease.expires_at = now + lease.ttl_s
        return pb.LeaseKeepAliveResponse(header=self.header(), ID=lease_id, TTL=lease.ttl_s)

    def revoke(self, lease_id: int) -> None:
        """End a lease and its keys."""
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            raise LeaseNotFound
        revision = self.revision + 1
        events = []
        for key in sorted(lease.keys):
            if key in self.keys and self.keys[key].lease == lease_id:
                del self.keys[key]
                events.append(_deleted(key, revision))
        self._commit(events)

    def expire(self, now: float) -> None:
        """End what has run out."""
        for lease_id in [one for one, lease in self.leases.items() if lease.expires_at <= now]:
            self.revoke(lease_id)

    def renew_all(self, now: float) -> None:
        """What a new leader does."""
        for lease in self.leases.values():
            lease.expires_at = now + lease.ttl_s

    def compact(self) -> None:
        """Forget all history up to now."""
        self.compacted = self.revision
        self.history.clear()

    def since(self, revision: int) -> list[tuple[int, list[Any]]]:
        """History from `revision` on."""
        return [(at, events) for at, events in self.history if at >= revision]

    def _commit(self, events: list[Any]) -> None:
        if not events:
            return
        self.revision += 1
        self.history.append((self.revision, events))
        for listener in list(self.listeners):
            listener(self.revision, events)

    def _check_lease(self, lease_id: int) -> None:
        if lease_id and lease_id not in self.leases:
            raise LeaseNotFound

    def _put(self, request: Any, revision: int) -> list[Any]:
        self._check_lease(request.lease)
        old = self.keys.get(request.key)
        create, version = (old.create, old.version + 1) if old is not None else (revision, 1)
        if old is not None and old.lease in self.leases:
            self.leases[old.lease].keys.discard(request.key)
        self.keys[request.key] = Stored(request.value, create, revision, version, request.lease)
        if request.lease:
            self.leases[request.lease].keys.add(request.key)
        return [pb.Event(type=pb.Event.PUT, kv=self._key_value(request.key))]

    def _delete(self, request: Any, revision: int) -> list[Any]:
        found = sorted(key for key in self.keys if in_range(key, request.key, request.range_end))
        for key in found:
            lease = self.leases.get(self.keys.pop(key).lease)
            if lease is not None:
                lease.keys.discard(key)
        return [_deleted(key, revision) for key in found]

    def _operate(self, operation: Any, events: list[Any]) -> Any:
        revision = self.revision + 1
        match operation.WhichOneof("request"):
            case "request_put":
                events += self._put(operation.request_put, revision)
                return pb.ResponseOp(response_put=pb.PutResponse())
            case "request_delete_range":
                gone = self._delete(operation.request_delete_range, revision)
                events += gone
                return pb.ResponseOp(response_delete_range=pb.DeleteRangeResponse(deleted=len(gone)))
        return pb.ResponseOp(response_range=self.range(operation.request_range))

    def _compare(self, compare: Any) -> bool:
        stored = self.keys.get(compare.key)
        kind = pb.Compare
        target = kind.CompareTarget
        if compare.target == target.Value("VALUE"):
            if stored is None:
                return False
            actual, wanted = stored.value, compare.value
        else:
            field_of = {"VERSION": "version", "CREATE": "create", "MOD": "mod", "LEASE": "lease"}
            name = target.Name(compare.target)
            actual = getattr(stored, field_of[name]) if stored is not None else 0
            wanted = getattr(compare, compare.WhichOneof("target_union") or "version")
        results = {"EQUAL": actual == wanted, "NOT_EQUAL": actual != wanted}
        results |= {"LESS": actual < wanted, "GREATER": actual > wanted}
        return results[kind.CompareResult.Name(compare.result)]

    def _key_value(self, key: bytes) -> Any:
        stored = self.keys[key]
        return pb.KeyValue(
            key=key,
            value=stored.value,
            create_revision=stored.create,
            mod_revision=stored.mod,
            version=stored.version,
            lease=stored.lease,
        )


def _deleted(key: bytes, revision: int) -> Any:
    return pb.Event(type=pb.Event.DELETE, kv=pb.KeyValue(key=key, mod_revision=revision))
