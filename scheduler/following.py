"""Standing by: follow the leader's journal, so that this scheduler can begin with it once it leads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from llmos.clock import Clock
from llmos.errors import StaleTerm
from llmos.internal.v1 import journal_pb2, journal_pb2_grpc
from llmos.sealed import sealed
from scheduler.events import JournalInherited
from scheduler.replica import OutOfStep, Replica

log = logging.getLogger(__name__)

_SILENCE_S = 3.0
"""Without a batch for so long the leader counts as frozen; they come every second."""
_PAUSE_S = 0.25


class JournalFollower:
    """Owned by a scheduler process. `leader` says where the one that leads listens, empty if none or this one does."""

    def __init__(
        self,
        scheduler_id: str,
        leader: Callable[[], str],
        connect: Callable[[str], grpc.aio.Channel],
        clock: Clock,
        ttl_s: float,
        tombstone_ttl_s: float,
    ) -> None:
        """`ttl_s` and `tombstone_ttl_s` as in the policy: how long what is over is kept, and a cancelled id refused."""
        self.replica = Replica(ttl_s, tombstone_ttl_s)
        self._scheduler_id = scheduler_id
        self._leader = leader
        self._connect = connect
        self._clock = clock

    def inheritance(self, term: int) -> JournalInherited:
        """What a reign of this term begins with. Nothing of a lower term is taken in any more."""
        self.replica.term = max(self.replica.term, term)
        return self.replica.inheritance(self._clock.monotonic())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            address = self._leader()
            if address:
                try:
                    await self._follow(address)
                except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
                    log.debug("the journal at %s: %s", address, error)
                except (OutOfStep, StaleTerm) as error:
                    log.warning("the journal at %s: %s", address, error)
                except asyncio.CancelledError:
                    # A channel that closes cancels whoever waits on it. Only a cancelled task may pass for cancelled.
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise
            await asyncio.sleep(_PAUSE_S)

    async def _follow(self, address: str) -> None:
        channel = self._connect(address)
        try:
            stub: Any = journal_pb2_grpc.JournalStub(sealed(channel))
            request = journal_pb2.FollowRequest(scheduler_id=self._scheduler_id, highest_term=self.replica.term)
            call = stub.Follow(request)
            self.replica.begin()
            while self._leader() == address:
                async with asyncio.timeout(_SILENCE_S):
                    batch = await call.read()
                if batch is grpc.aio.EOF or batch is None or self._leader() != address:
                    return
                self.replica.take(batch, self._clock.monotonic())
        finally:
            await channel.close()
