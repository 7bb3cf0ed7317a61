"""Intent in etcd: promises are read, promises and assignments are written, all under the fence of the leader's term.

Every write is one transaction that holds only while the leader's key is this leader's: what a deposed leader still
writes is refused, and counted. While etcd is away nothing is written and nothing else changes; assignments wait, the
latest one per worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from llmos.errors import Conflict, EtcdError, EtcdUnavailable, NotLeader, Unavailable
from llmos.etcd import Compare, Delete, EtcdClient, Put, WatchBatch
from llmos.etcd.kv import Operation
from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2
from scheduler import events, registry

log = logging.getLogger(__name__)


class Intent:
    """One reign's. `post` takes events without waiting: they are as few as changes of promises."""

    def __init__(self, client: EtcdClient, post: Callable[[events.Event], None], term: Callable[[], int]) -> None:
        self._client = client
        self._post = post
        self._term = term
        self._to_write: dict[str, registry_pb2.AssignmentRecord] = {}
        self._filled = asyncio.Event()
        self._read_assignments = False
        self.refused = 0
        """Writes that etcd refused because another scheduler leads."""

    @property
    def waiting(self) -> int:
        """Assignments that are not written yet."""
        return len(self._to_write)

    # -- reading

    async def watch(self) -> None:
        """Post promises, first all, then changes, until cancelled. Raises EtcdError."""
        async with self._client.watch(registry.ALLOCATIONS) as watch:
            async for batch in watch:
                if batch.snapshot:
                    await self._snapshot(batch)
                    continue
                for event in batch.events:
                    name = event.key.removeprefix(registry.ALLOCATIONS)
                    allocation = (
                        None if event.value is None else _allocation(event.key, event.value, event.mod_revision)
                    )
                    self._post(events.PromiseChanged(name, allocation, event.mod_revision))

    async def _snapshot(self, batch: WatchBatch) -> None:
        known = [
            _allocation(event.key, event.value, event.mod_revision) for event in batch.events if event.value is not None
        ]
        assignments: list[registry_pb2.AssignmentRecord] = []
        if not self._read_assignments:
            rows, _ = await self._client.get_prefix(registry.ASSIGNMENTS)
            read = (registry.read(row.key, row.value, registry_pb2.AssignmentRecord()) for row in rows)
            assignments = [record for record in read if record is not None and record.worker_id]
            self._read_assignments = True
        promises = tuple(allocation for allocation in known if allocation is not None)
        self._post(events.PromisesListed(promises, tuple(assignments)))

    # -- writing

    def assign(self, record: registry_pb2.AssignmentRecord) -> None:
        """Write an assignment soon; one that waits for the same worker is replaced."""
        self._to_write[record.worker_id] = record
        self._filled.set()

    async def write(self) -> None:
        """Write what waits, through outages, until cancelled."""
        backoff = self._client.backoff()
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._to_write:
                worker_id, record = next(iter(self._to_write.items()))
                try:
                    await self._write(record)
                except NotLeader as error:
                    log.warning("the assignment of %s is not written: %s", worker_id, error.message)
                except EtcdError as error:
                    log.warning("assignments wait: %s", error.message)
                    await asyncio.sleep(backoff.next_s())
                    continue
                else:
                    backoff.reset()
                if self._to_write.get(worker_id) is record:
                    del self._to_write[worker_id]

    async def _write(self, record: registry_pb2.AssignmentRecord) -> None:
        key = registry.ASSIGNMENTS + record.worker_id
        await self._fenced(Put(key, registry.to_bytes(record)) if record.assignments else Delete(key))

    async def set(self, allocation: fleet_pb2.Allocation) -> fleet_pb2.Allocation:
        """Write a promise. Raises Conflict if it has changed since, NotLeader, Unavailable."""
        key = registry.ALLOCATIONS + allocation.name
        written = fleet_pb2.Allocation()
        written.CopyFrom(allocation)
        written.ClearField("revision")
        record = registry_pb2.AllocationRecord(allocation=written, term=self._term())
        seen = [Compare(key, "mod_revision", "==", allocation.revision)] if allocation.revision else []
        with _said_plainly():
            written.revision = await self._fenced(Put(key, registry.to_bytes(record)), seen)
        self._post(events.PromiseChanged(written.name, written, written.revision))
        return written

    async def delete(self, name: str) -> None:
        """Take a promise back. Raises NotLeader, Unavailable."""
        with _said_plainly():
            revision = await self._fenced(Delete(registry.ALLOCATIONS + name))
        self._post(events.PromiseChanged(name, None, revision))

    async def _fenced(self, operation: Operation, seen: Sequence[Compare] = ()) -> int:
        """Raises NotLeader if another scheduler leads, Conflict if `seen` does not hold, EtcdError."""
        mine = Compare(registry.LEADER, "create_revision", "==", self._term())
        result = await self._client.txn([mine, *seen], [operation])
        if result.succeeded:
            return result.revision
        still = await self._client.txn([mine], [])
        if still.succeeded and seen:
            raise Conflict("The allocation has changed meanwhile: read it again.", param="revision")
        self.refused += 1
        raise NotLeader("This scheduler does not lead any more.")


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    """etcd's absence in words for people."""
    try:
        yield
    except EtcdUnavailable as error:
        raise Unavailable(
            "etcd does not answer: nothing can be promised now, what runs goes on. Whether this change was written is "
            "not known; look again later.",
            retry_after_s=5.0,
        ) from error


def _allocation(key: str, value: bytes, revision: int) -> fleet_pb2.Allocation | None:
    record = registry.read(key, value, registry_pb2.AllocationRecord())
    if record is None or record.allocation.name != key.removeprefix(registry.ALLOCATIONS):
        return None
    record.allocation.revision = revision
    return record.allocation
