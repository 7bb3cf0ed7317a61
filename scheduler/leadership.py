"""Who leads: campaign in etcd, keep the lease, and notice when somebody else has won.

Losing the lease, or etcd, ends the right to write intent and nothing else: the leader goes on serving until somebody
shows a higher term. When etcd is back and the leader's key still stands, it takes it under its new lease and keeps its
term; if the key is gone it campaigns again, and wins a higher term unless another one was faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

from llmos.errors import EtcdError, LeaseLost
from llmos.etcd import Compare, Election, EtcdClient, Leader, Lease, Put
from llmos.internal.v1 import registry_pb2
from llmos.lifetime import first_of
from scheduler import registry

log = logging.getLogger(__name__)


class Seat(Protocol):
    """Who is told."""

    async def elected(self, term: int) -> None:
        """This scheduler leads in `term`; if it led already, `term` is at least as high as before."""
        ...

    async def deposed(self, leader_address: str) -> None:
        """Another scheduler leads, or nobody does that is known (empty address). Called whether or not one led."""
        ...


class Leadership:
    """One scheduler's part in the election."""

    def __init__(
        self, client: EtcdClient, record: registry_pb2.SchedulerRecord, lease_ttl_s: float, seat: Seat
    ) -> None:
        self._client = client
        self._record = record
        self._value = registry.to_bytes(record)
        self._lease_ttl_s = lease_ttl_s
        self._seat = seat
        self._lease: Lease | None = None
        self._won: Lease | None = None
        """The lease that the leader's key is under."""
        self._election: Election | None = None
        self._challenged = asyncio.Event()
        self._campaign: asyncio.Task[None] | None = None
        self._resigned = False
        self._deposed = asyncio.Event()
        self.term = 0
        """The term that this scheduler leads in; 0 while it does not."""

    @property
    def may_write_intent(self) -> bool:
        """Whether records that decide may be written to etcd now."""
        return self.term > 0 and self._won is not None and not self._won.is_lost()

    async def run(self) -> None:
        """Campaign and observe until cancelled; then leave, so that a standby takes over at once."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._observe(), name="leader-observe")
                self._campaign = group.create_task(self._stand(), name="leader-campaign")
        finally:
            await asyncio.shield(self._leave())

    async def hand_over(self, patience_s: float) -> None:
        """Resign now and for good, so that a standby wins at once; lead on until it shows itself, at most `patience_s`,
        so that gateways can be told where to go. `run` goes on until it is cancelled."""
        self._resigned = True
        if self._campaign is not None:
            self._campaign.cancel()
            await asyncio.wait({self._campaign})
        leading = self.term
        self._deposed.clear()
        await self._leave()
        if leading:
            log.info("resigned in term %d", leading)
            await first_of(self._deposed, timeout_s=patience_s)

    async def challenged(self) -> None:
        """Somebody has seen a higher term: this reign is over, whatever etcd last said."""
        # Once resigned, it is the successor that is meant, and its address comes from etcd within a moment.
        if self.term and not self._resigned:
            log.warning("a higher term than %d exists; this scheduler leads no more", self.term)
            self._challenged.set()
            await self._depose("")

    async def _stand(self) -> None:
        backoff = self._client.backoff()
        while True:
            try:
                self._lease = await self._client.lease(self._lease_ttl_s)
                backoff.reset()
                await self._hold(self._lease)
            except EtcdError as error:
                log.warning("out of the election for now: %s", error.message)
                if self._lease is not None:
                    # Not revoked: the leader's key must not vanish before its new lease has taken it over.
                    await self._lease.close()
                    self._lease = None
            await asyncio.sleep(backoff.next_s())

    async def _hold(self, lease: Lease) -> None:
        """Stay in the election as long as the lease stands. Raises LeaseLost, EtcdError."""
        while True:
            await self._client.put(registry.SCHEDULERS + self._record.scheduler_id, self._value, lease.id)
            await self._keep_key(lease)
            self._election = Election(self._client, registry.LEADER, self._value)
            term = await self._election.campaign(lease)
            self._challenged.clear()
            log.info("elected in term %d", term)
            self.term = term
            self._won = lease
            await self._seat.elected(term)
            await self._until_displaced(lease)

    async def _keep_key(self, lease: Lease) -> None:
        """Put the leader's key under the new lease if it still is this leader's."""
        if self.term:
            mine = Compare(registry.LEADER, "create_revision", "==", self.term)
            await self._client.txn([mine], [Put(registry.LEADER, self._value, lease.id)], [])

    async def _until_displaced(self, lease: Lease) -> None:
        """Return when the key is another's or this leader was challenged. Raises LeaseLost if the lease is lost."""
        assert self._election is not None
        holding = asyncio.ensure_future(self._election.hold())
        challenged = asyncio.ensure_future(self._challenged.wait())
        try:
            await asyncio.wait({holding, challenged}, return_when=asyncio.FIRST_COMPLETED)
            if lease.is_lost():
                raise LeaseLost("The lease was lost")
            if challenged.done():
                await self._election.resign()
        finally:
            holding.cancel()
            challenged.cancel()
            await asyncio.gather(holding, challenged, return_exceptions=True)

    async def _observe(self) -> None:
        election = Election(self._client, registry.LEADER, self._value)
        async for leader in election.observe():
            if leader is not None:
                await self._seen(leader)

    async def _seen(self, leader: Leader) -> None:
        record = registry.scheduler_record(leader.value)
        if record.scheduler_id != self._record.scheduler_id and leader.term > self.term:
            await self._depose(record.address)

    async def _depose(self, leader_address: str) -> None:
        self.term = 0
        self._won = None
        await self._seat.deposed(leader_address)
        self._deposed.set()

    async def _leave(self) -> None:
        """Give the lease up, and with it the leader's key and the record."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(EtcdError, TimeoutError):  # it ends by itself within its TTL
                async with asyncio.timeout(1.0):
                    await lease.revoke()
