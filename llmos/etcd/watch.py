"""Watches that miss no change and repeat none, across restarts, fail-over and compaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

import grpc

from llmos.errors import EtcdAuthFailed, EtcdUnavailable
from llmos.etcd import messages as pb
from llmos.etcd.failures import to_error
from llmos.etcd.kv import KeyValue, decode_key, key_range, key_value
from llmos.etcd.rpcs import RANGE
from llmos.etcd.transport import Transport
from llmos.etcd.watch_stream import WatchStream

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchEvent:
    """One change of one key, or in a snapshot one key as it is."""

    key: str
    """The whole key."""

    value: bytes | None
    """The new value; None: the key was deleted."""

    mod_revision: int
    """Revision of the change."""

    create_revision: int = 0
    """Revision in which the key came into being; 0 for a deletion."""

    lease: int = 0
    """Id of the lease that the key lives under, or 0."""


@dataclass(frozen=True)
class WatchBatch:
    """Changes in the order of their revisions. All changes of one transaction are in one batch."""

    events: list[WatchEvent]
    """Never empty, except in a snapshot of nothing."""

    revision: int
    """Everything up to this revision has been delivered: another watch may start at `revision + 1`."""

    snapshot: bool
    """True: `events` are all keys that exist; replace your state, what is not among them is gone."""


class Cursor:
    """How far a watch has delivered, and what an answer of etcd adds to that. Pure.

    `next_revision` is the first revision not delivered yet; None: a snapshot must come first.
    """

    def __init__(self, next_revision: int | None) -> None:
        self.next_revision = next_revision

    def snapshot(self, pairs: list[KeyValue], revision: int) -> WatchBatch:
        """Start over from all keys as they are at `revision`."""
        self.next_revision = revision + 1
        events = [WatchEvent(kv.key, kv.value, kv.mod_revision, kv.create_revision, kv.lease) for kv in pairs]
        return WatchBatch(events, revision, snapshot=True)

    def advance(self, raw_events: Any) -> WatchBatch | None:
        """Take in the events of one answer. What was delivered before is dropped; None: nothing is left."""
        if self.next_revision is None:
            return None
        events = [_event(raw) for raw in raw_events if raw.kv.mod_revision >= self.next_revision]
        if not events:
            return None
        revision = max(event.mod_revision for event in events)
        self.next_revision = revision + 1
        return WatchBatch(events, revision, snapshot=False)

    def relist(self) -> None:
        """etcd cannot tell what comes next; a snapshot must."""
        self.next_revision = None


def _event(raw: Any) -> WatchEvent:
    if raw.type == pb.Event.DELETE:
        return WatchEvent(decode_key(raw.kv.key), None, raw.kv.mod_revision)
    kv = key_value(raw.kv)
    return WatchEvent(kv.key, kv.value, kv.mod_revision, kv.create_revision, kv.lease)


class Watch:
    """An endless iterator of batches. It reconnects by itself; only EtcdAuthFailed and bugs end it.

    Use it as `async with client.watch(prefix) as watch: async for batch in watch: ...`, from one task at a time. It
    reads only while it is iterated: a slow consumer holds etcd back, and resumes or relists if it was too slow.
    """

    def __init__(
        self,
        transport: Transport,
        key: str,
        *,
        prefix: bool,
        start_revision: int | None,
        on_close: Callable[[Watch], None],
    ) -> None:
        self._transport = transport
        self._key, self._range_end = key_range(key, prefix=prefix)
        self._cursor = Cursor(start_revision)
        self._stream: WatchStream | None = None
        self._backoff = transport.backoff()
        self._refusals = 0
        self._closed = False
        self._on_close = on_close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        """Wait for the next batch; cancelling that loses nothing. Raises EtcdAuthFailed; ends after `aclose`."""
        while not self._closed:
            try:
                batch = await self._step()
            except EtcdUnavailable as error:
                await self._drop_stream()
                if not self._closed:
                    _log.info("watch broken, reconnecting: %s", error.message)
                    await asyncio.sleep(self._backoff.next_s())
            else:
                if batch is not None:
                    return batch
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the watch and release its stream."""
        self._closed = True
        self._on_close(self)
        await self._drop_stream()

    async def _step(self) -> WatchBatch | None:
        """One answer of etcd. Returns None if it brought nothing to deliver."""
        if self._cursor.next_revision is None:
            return self._cursor.snapshot(*await self._list())
        if self._stream is None:
            return await self._connect(self._cursor.next_revision)
        answer = await self._stream.read()
        self._backoff.reset()  # not earlier: a server may accept every stream and break it
        return await self._take(answer)

    async def _connect(self, next_revision: int) -> WatchBatch | None:
        async with AsyncExitStack() as undo:
            stream = await WatchStream.open(self._transport)
            undo.push_async_callback(stream.close)
            answer = await stream.create(self._key, self._range_end, next_revision)
            if not answer.canceled and await self._has_gone_back(answer.header.revision, next_revision):
                self._cursor.relist()
                return None
            self._stream = stream
            undo.pop_all()
        return await self._take(answer)

    async def _has_gone_back(self, member_revision: int, next_revision: int) -> bool:
        """Whether the store is younger than what we saw: it was wiped or restored, and counts from a past revision.

        One member may merely lag behind the others; a read through consensus tells.
        """
        if member_revision >= next_revision - 1:
            return False
        _, revision = await self._list(count_only=True)
        if revision >= next_revision - 1:
            return False
        _log.warning("etcd went back from revision %d to %d: relisting", next_revision - 1, revision)
        return True

    async def _take(self, answer: Any) -> WatchBatch | None:
        if not answer.canceled:
            self._refusals = 0
            return self._cursor.advance(answer.events)
        if answer.compact_revision:
            _log.info("watch below compaction at revision %d: relisting", answer.compact_revision)
            self._cursor.relist()
            await self._drop_stream()
        else:
            await self._refused(answer.cancel_reason)
        return None

    async def _refused(self, reason: str) -> None:
        """etcd cancelled the watch. An expired token looks like a missing permission (etcd issue 12385): retry once."""
        error = to_error(grpc.StatusCode.UNKNOWN, reason)
        if self._stream is not None:
            self._stream.token_refused()
        await self._drop_stream()
        self._refusals += 1
        may_be_token = isinstance(error, EtcdAuthFailed) and self._transport.tokens.has_user
        if self._refusals > 1 or not may_be_token:
            raise error

    async def _list(self, *, count_only: bool = False) -> tuple[list[KeyValue], int]:
        request = pb.RangeRequest(key=self._key, range_end=self._range_end, count_only=count_only)
        answer = await self._transport.call(RANGE, request)
        return [key_value(raw) for raw in answer.kvs], answer.header.revision

    async def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()
