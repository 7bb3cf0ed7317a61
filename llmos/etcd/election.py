"""Leader election: one key, under a lease; its create revision is the term."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from llmos.errors import EtcdUnavailable, LeaseLost
from llmos.etcd.client import EtcdClient
from llmos.etcd.kv import Compare, Delete, Get, Put
from llmos.etcd.lease import Lease
from llmos.etcd.watch import WatchBatch

_T = TypeVar("_T")


@dataclass(frozen=True)
class Leader:
    """Who leads."""

    value: bytes
    """What the leader campaigned with, such as its address."""

    term: int
    """Its fencing token: a later leader has a higher one."""


class Election:
    """A candidate and an observer of the election at the key `name`. One campaign at a time.

    Terms are create revisions, which etcd counts upwards over the whole store, so they grow with each leader and need
    no counter of their own. What a leader writes must carry its term: it may learn late that it was replaced.
    After a cancelled campaign revoke the lease, because the key may have been won unheard.
    """

    def __init__(self, client: EtcdClient, name: str, value: bytes) -> None:
        self._client = client
        self._key = name
        self._value = value
        self._lease: Lease | None = None
        self._term = 0

    @property
    def term(self) -> int:
        """The term won by the last campaign; 0 before."""
        return self._term

    async def campaign(self, lease: Lease) -> int:
        """Wait, however long, until this candidate leads; return the term. Raises LeaseLost, EtcdAuthFailed."""
        self._term = await _while_held(lease, self._win(lease))
        self._lease = lease
        return self._term

    async def hold(self) -> None:
        """Wait until the leadership ends, then raise LeaseLost: the lease is lost, or the key is gone or another's."""
        if self._lease is None:
            raise LeaseLost("No campaign has been won")
        await _while_held(self._lease, self._displaced())
        raise LeaseLost("The election key was deleted or taken over")

    async def resign(self) -> None:
        """Give the leadership up; the lease stays. Does nothing if it is another's already. Raises EtcdUnavailable."""
        if self._lease is None:
            return
        mine = Compare(self._key, "create_revision", "==", self._term)
        await self._client.txn([mine], [Delete(self._key)], [])
        self._lease = None

    async def observe(self) -> AsyncGenerator[Leader | None, None]:
        """Yield the leader now, None for none, and again after every change, without end. Raises EtcdAuthFailed."""
        last: Leader | None = None
        first = True
        async with self._client.watch_key(self._key) as watch:
            async for batch in watch:
                for leader in _leaders(batch):
                    if first or leader != last:
                        yield leader
                    first, last = False, leader

    async def _win(self, lease: Lease) -> int:
        backoff = self._client.backoff()
        while True:
            try:
                term, seen_revision = await self._try(lease)
            except EtcdUnavailable:
                await asyncio.sleep(backoff.next_s())
                continue
            if term:
                return term
            backoff.reset()
            await self._vacant(seen_revision)

    async def _try(self, lease: Lease) -> tuple[int, int]:
        """Put the key if it is absent. Returns (term or 0, revision at which that was so)."""
        absent = Compare(self._key, "create_revision", "==", 0)
        put = Put(self._key, self._value, lease.id)
        result = await self._client.txn([absent], [put], [Get(self._key)])
        if result.succeeded:
            return result.revision, result.revision
        holder = result.rows[0][0]
        won_unheard = holder.lease == lease.id and holder.value == self._value  # an attempt whose answer was lost
        return holder.create_revision if won_unheard else 0, result.revision

    async def _vacant(self, seen_revision: int) -> None:
        """Wait until the key is deleted, at some time after `seen_revision`."""
        async with self._client.watch_key(self._key, seen_revision + 1) as watch:
            async for batch in watch:
                if None in _leaders(batch):
                    return

    async def _displaced(self) -> None:
        async with self._client.watch_key(self._key, self._term + 1) as watch:
            async for batch in watch:
                if any(leader is None or leader.term != self._term for leader in _leaders(batch)):
                    return


def _leaders(batch: WatchBatch) -> list[Leader | None]:
    """The states that a batch of the election key goes through."""
    if batch.snapshot and not batch.events:
        return [None]
    return [None if one.value is None else Leader(one.value, one.create_revision) for one in batch.events]


async def _while_held(lease: Lease, work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` as long as the lease stands; raise LeaseLost when it is lost first."""
    working = asyncio.ensure_future(work)
    losing = asyncio.ensure_future(lease.lost.wait())
    try:
        await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
        if lease.is_lost():
            raise LeaseLost("The lease was lost")
        return working.result()
    finally:
        for task in (working, losing):
            task.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)
