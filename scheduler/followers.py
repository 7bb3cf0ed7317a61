"""Streams of the journal to schedulers that stand by: bounded, so that a slow one is dropped and starts over."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from llmos.errors import SlowReader
from llmos.internal.v1 import journal_pb2
from scheduler.commands import SendJournal
from scheduler.events import FollowerJoined, FollowerLeft
from scheduler.loop import Loop

log = logging.getLogger(__name__)

LIMIT_BYTES = 32 * 1024 * 1024
"""Most bytes of changes that wait for a follower; what it begins with does not count."""
_BATCH_BYTES = 1024 * 1024
"""Most bytes of a batch, unless one record is larger; `replication.LIMIT_BYTES` bounds those."""
_BEAT_S = 1.0


class _Follower:
    def __init__(self) -> None:
        self.beginning: deque[journal_pb2.JournalRecord] = deque()
        self.is_new = True
        self.changes: deque[journal_pb2.JournalRecord] = deque()
        self.bytes = 0
        self.wake = asyncio.Event()
        self.slow = False
        self.over = False


class FollowerDesk:
    """All followers of one leader. Owned by the reign; the loop's carrier writes to it."""

    def __init__(self, loop: Loop, term: Callable[[], int], limit_bytes: int = LIMIT_BYTES) -> None:
        self._loop = loop
        self._term = term
        self._limit_bytes = limit_bytes
        self._followers: dict[int, _Follower] = {}
        self._ids = itertools.count(1)
        self.dropped = 0
        """Followers that could not keep up."""

    def send(self, command: SendJournal) -> None:
        """Carry out the command."""
        if command.newcomer:
            follower = self._followers.get(command.newcomer)
            if follower is not None:
                follower.beginning.extend(command.records)
                follower.is_new = False
                follower.wake.set()
            return
        size = sum(record.ByteSize() for record in command.records)
        for follower in self._followers.values():
            if not follower.is_new:
                self._append(follower, command.records, size)

    def close(self) -> None:
        """This scheduler leads no more."""
        for follower in self._followers.values():
            follower.over = True
            follower.wake.set()

    def _append(self, follower: _Follower, records: Sequence[journal_pb2.JournalRecord], size: int) -> None:
        # One change alone may be larger: it was just as large in what the follower would begin anew with.
        too_much = follower.bytes + size > self._limit_bytes and follower.changes
        follower.bytes += size
        if follower.slow or too_much:
            self.dropped += not follower.slow
            follower.slow = True
            follower.changes.clear()
        else:
            follower.changes.extend(records)
        follower.wake.set()

    async def serve(self, scheduler_id: str) -> AsyncGenerator[journal_pb2.FollowResponse, None]:
        """One follower's stream. Raises SlowReader when too much waits for it."""
        number = next(self._ids)
        follower = self._followers[number] = _Follower()
        log.info("scheduler %s follows the journal", scheduler_id)
        try:
            await self._loop.post(FollowerJoined(number))
            for sequence in itertools.count(1):
                batch = await self._next(follower, sequence)
                if follower.over:
                    return
                yield batch
        finally:
            del self._followers[number]
            self._loop.post_now(FollowerLeft(number))

    async def _next(self, follower: _Follower, sequence: int) -> journal_pb2.FollowResponse:
        """The next batch; an empty one after a while without changes."""
        while not follower.over and (follower.is_new or not (follower.beginning or follower.changes or follower.slow)):
            follower.wake.clear()
            try:
                async with asyncio.timeout(_BEAT_S):
                    await follower.wake.wait()
            except TimeoutError:
                if not follower.is_new:
                    break
            if sequence == 1 and not follower.is_new:
                break  # the beginning is complete even if there is nothing in it
        if follower.slow:
            raise SlowReader("The journal was not taken fast enough; follow it anew.")
        batch = journal_pb2.FollowResponse(term=self._term(), sequence=sequence)
        queue = follower.beginning or follower.changes
        size = 0
        while queue and (not size or size + queue[0].ByteSize() <= _BATCH_BYTES):
            record = queue.popleft()
            size += record.ByteSize()
            batch.records.append(record)
        if queue is follower.changes:
            follower.bytes -= size
        batch.snapshot = bool(follower.beginning)
        return batch
