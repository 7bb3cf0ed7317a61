"""Leases whose end the holder knows by its own clock, not by the server's word."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import Self

from llmos.errors import EtcdError, LeaseLost
from llmos.etcd import messages as pb
from llmos.etcd.rpcs import LEASE_GRANT, LEASE_KEEP_ALIVE, LEASE_REVOKE
from llmos.etcd.transport import Answer, Transport

_RENEWALS_PER_TTL = 3

_log = logging.getLogger(__name__)


class Validity:
    """Until when a lease may be relied on. Pure.

    The server counts the TTL from when it handled the request, which is after we sent it: *sent + TTL* is never later
    than the server's own end. Once the end has passed, or the server said that the lease is gone, it stays lost: a late
    answer, even one that claims a renewal (etcd before 3.4.42 and 3.5.33 can report one for a revoked lease), revives
    nothing.
    """

    def __init__(self, sent_at: float, ttl_s: float) -> None:
        self.deadline = sent_at + ttl_s
        self.ttl_s = ttl_s
        self._gone = ttl_s <= 0

    def is_lost(self, now: float) -> bool:
        self._gone = self._gone or now >= self.deadline
        return self._gone

    def renewed(self, sent_at: float, ttl_s: float, now: float) -> None:
        """Take in the answer to a renewal that was sent at `sent_at` and arrived `now`. A TTL of 0 means revoked."""
        if self.is_lost(now):
            return
        if ttl_s <= 0:
            self._gone = True
            return
        self.ttl_s = ttl_s
        self.deadline = max(self.deadline, sent_at + ttl_s)

    def give_up(self) -> None:
        """Stop relying on it."""
        self._gone = True


class Lease:
    """A lease that is kept alive by a task until it is lost, revoked, or its client closes.

    `async with lease:` revokes it at the end, which deletes its keys. The client that granted it owns the task.
    """

    def __init__(self, transport: Transport, lease_id: int, validity: Validity) -> None:
        self.id = lease_id
        self.lost = asyncio.Event()
        """Set, for good, when the lease can no longer be relied on; at the latest when `deadline` passes."""
        self._transport = transport
        self._validity = validity
        self._task = asyncio.create_task(self._keep_alive(), name=f"etcd-lease-{lease_id:x}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with contextlib.suppress(EtcdError):  # unreachable: the lease ends by itself within its TTL
            await self.revoke()

    @property
    def ttl_s(self) -> float:
        """Seconds that the server grants; it may be more than was asked for."""
        return self._validity.ttl_s

    def deadline(self) -> float:
        """Time on the client's monotonic clock from which on the lease may belong to somebody else.

        Compare it when you act: after a long pause of this process, `lost` is set only once the event loop runs again.
        """
        return self._validity.deadline

    def is_lost(self) -> bool:
        """Whether the deadline has passed, or the server said that the lease is gone; even before `lost` is set."""
        return self._validity.is_lost(self._transport.clock.monotonic())

    async def revoke(self) -> None:
        """End the lease now; its keys vanish. Does nothing if it has ended already. Raises EtcdUnavailable."""
        await self.close()
        with contextlib.suppress(LeaseLost):  # it ended by itself
            await self._transport.call(LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self.id))

    async def close(self) -> None:
        """Stop renewing, without revoking: the keys vanish when the TTL is over. Sets `lost`."""
        self._validity.give_up()
        self._task.cancel()
        await asyncio.wait({self._task})
        self.lost.set()
        if not self._task.cancelled():
            self._task.result()  # raises only if the task ended by a bug

    async def _keep_alive(self) -> None:
        backoff = self._transport.backoff()
        wait_s = self._renewal_interval_s()
        try:
            while await self._sleep(wait_s):
                try:
                    self._take(await self._renew())
                except EtcdError as error:
                    _log.warning("lease %x not renewed, %.1f s left: %s", self.id, self._left_s(), error.message)
                    wait_s = backoff.next_s()
                else:
                    backoff.reset()
                    wait_s = self._renewal_interval_s()
        finally:
            self._validity.give_up()
            self.lost.set()

    async def _renew(self) -> Answer:
        limit_s = min(self._transport.config.call_timeout_s, self._left_s())
        request = pb.LeaseKeepAliveRequest(ID=self.id)
        return await self._transport.timed_call(LEASE_KEEP_ALIVE, request, timeout_s=limit_s)

    def _take(self, answer: Answer) -> None:
        self._validity.renewed(answer.sent_at, answer.message.TTL, self._transport.clock.monotonic())

    async def _sleep(self, wait_s: float) -> bool:
        """Wait, but not past the deadline. Returns whether the lease still stands."""
        if not self.is_lost():
            await asyncio.sleep(min(wait_s, self._left_s()))
        return not self.is_lost()

    def _left_s(self) -> float:
        return max(0.0, self.deadline() - self._transport.clock.monotonic())

    def _renewal_interval_s(self) -> float:
        return self.ttl_s / _RENEWALS_PER_TTL


async def grant(transport: Transport, ttl_s: float, timeout_s: float | None) -> Lease:
    """Ask for a lease of at least `ttl_s` seconds (etcd counts whole seconds, and has a minimum near 2)."""
    request = pb.LeaseGrantRequest(TTL=math.ceil(ttl_s))
    answer = await transport.timed_call(LEASE_GRANT, request, timeout_s=timeout_s)
    return Lease(transport, answer.message.ID, Validity(answer.sent_at, answer.message.TTL))
