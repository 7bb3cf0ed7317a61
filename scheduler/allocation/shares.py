"""KV blocks of a model that are kept for a tenant or a class: others find them taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler.allocation.book import Book
from scheduler.placement import Ask, Option
from scheduler.requests import LiveRequest
from scheduler.workers import ModelSlot, WorkerView


class Reserved:
    """A `scheduler.placement.Filter`. Costs nothing where nothing is reserved."""

    def __init__(self, book: Book, requests: Mapping[str, LiveRequest]) -> None:
        self._book = book
        self._requests = requests

    def admits(self, ask: Ask, option: Option) -> bool:
        """Whether the request leaves alone what is kept for others."""
        if not self._book.reserving:
            return True
        worker, slot = option.worker, option.slot
        promise = self._book.of(ask.live.key[0], worker.record.pool)
        if promise is None or not promise.model.reserved:
            return True
        kept = kept_for_others(promise.model.reserved, ask.live.request, slot, worker, self._requests)
        return slot.available - ask.blocks >= kept


def kept_for_others(
    shares: Sequence[fleet_pb2.ReservedShare],
    request: request_pb2.Request,
    slot: ModelSlot,
    worker: WorkerView,
    requests: Mapping[str, LiveRequest],
) -> int:
    """Blocks of a slot that stay free for the holders of shares to which a request does not belong."""
    return sum(
        max(0, share.percent * slot.total_blocks // 100 - _used(share, slot, worker, requests))
        for share in shares
        if not belongs(share, request)
    )


def belongs(share: fleet_pb2.ReservedShare, request: request_pb2.Request) -> bool:
    """Whether a request may use a share."""
    priority = request.priority or fleet_pb2.PRIORITY_CLASS_STANDARD
    return share.tenant in ("", request.tenant) and share.priority in (0, priority)


def _used(
    share: fleet_pb2.ReservedShare, slot: ModelSlot, worker: WorkerView, requests: Mapping[str, LiveRequest]
) -> int:
    return sum(
        attempt.blocks
        for request_id, attempt in worker.running.items()
        if attempt.model == slot.key[0] and request_id in requests and belongs(share, requests[request_id].request)
    )
