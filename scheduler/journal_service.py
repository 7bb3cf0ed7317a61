"""The Journal service: schedulers that stand by follow the leader's journal."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import grpc

from llmos.errors import NotLeader
from llmos.internal.v1 import journal_pb2, journal_pb2_grpc
from scheduler.seat import ReignSeat


class JournalService(journal_pb2_grpc.JournalServicer):
    """Implements `llmos.internal.v1.Journal`."""

    def __init__(self, seat: ReignSeat, challenged: Callable[[], None]) -> None:
        """`challenged` is called when a follower has seen a higher term than ours."""
        self._seat = seat
        self._challenged = challenged

    async def Follow(  # noqa: N802 - the contract's name
        self,
        request: journal_pb2.FollowRequest,
        context: grpc.aio.ServicerContext[journal_pb2.FollowRequest, journal_pb2.FollowResponse],
    ) -> AsyncIterator[journal_pb2.FollowResponse]:
        """One follower's stream. Raises NotLeader, SlowReader."""
        reign = self._seat.leading()
        if request.highest_term > reign.term:
            self._challenged()
            raise NotLeader("A higher term exists.")
        async with contextlib.aclosing(reign.followers.serve(request.scheduler_id)) as batches:
            async for batch in batches:
                yield batch
