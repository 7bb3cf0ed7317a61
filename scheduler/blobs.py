"""Files of models by their hash (tokenizers, chat templates): read from a worker that has them, verified, kept."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import grpc

from llmos.errors import LlmosError, NotFound, Unavailable
from llmos.internal.v1 import work_pb2, work_pb2_grpc
from scheduler.reign import Reign
from scheduler.workers import WorkerView

log = logging.getLogger(__name__)

CACHE_BYTES = 256 * 1024 * 1024
_BLOB_BYTES = 128 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_FETCH_S = 30.0


class BlobCache:
    """Verified blobs; those used least recently give way. A blob is fetched by one caller at a time."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._blobs: dict[str, bytes] = {}
        self._size = 0
        self._fetching = asyncio.Lock()

    async def read(self, reign: Reign, sha256: str) -> bytes:
        """The whole blob. Raises NotFound if no worker names it, Unavailable if none of those can be reached."""
        async with self._fetching:
            blob = self._blobs.pop(sha256, None)
            if blob is None:
                blob = await _fetch(reign, sha256)
                self._size += len(blob)
            self._blobs[sha256] = blob
            while self._size > self._limit_bytes and len(self._blobs) > 1:
                oldest = next(iter(self._blobs))
                self._size -= len(self._blobs.pop(oldest))
        return blob


def chunks(blob: bytes) -> Iterator[bytes]:
    """A blob in pieces of at most 1 MiB; an empty one is one empty piece."""
    for start in range(0, max(1, len(blob)), _CHUNK_BYTES):
        yield blob[start : start + _CHUNK_BYTES]


def _holders(reign: Reign, sha256: str) -> list[WorkerView]:
    """Workers whose records name the file. Nothing else is fetched, so that a caller cannot make workers search."""
    return [
        worker
        for worker in reign.core.state.workers.values()
        if any(sha256 in (m.model.tokenizer_hash, m.model.chat_template_hash) for m in worker.record.models)
    ]


async def _fetch(reign: Reign, sha256: str) -> bytes:
    holders = _holders(reign, sha256)
    if not sha256 or not holders:
        raise NotFound("No worker has a file of that hash.", param="sha256")
    for worker in holders:
        link = reign.workers.get(worker.id)
        if link is None or link.channel is None:
            continue
        try:
            blob = await _read(link.channel, sha256)
        except (grpc.aio.AioRpcError, LlmosError, TimeoutError, asyncio.InvalidStateError) as error:
            log.warning("blob %s from worker %s: %s", sha256, worker.id, error)
            continue
        if hashlib.sha256(blob).hexdigest() == sha256:
            return blob
        log.error("worker %s sent a blob that does not match its hash %s", worker.id, sha256)
    raise Unavailable("The model's files cannot be read at present; try again.", retry_after_s=1.0)


async def _read(channel: grpc.aio.Channel, sha256: str) -> bytes:
    stub: Any = work_pb2_grpc.WorkStub(channel)
    parts: list[bytes] = []
    size = 0
    call = stub.FetchBlob(work_pb2.WorkFetchBlobRequest(sha256=sha256), timeout=_FETCH_S)
    async for answer in call:
        parts.append(answer.data)
        size += len(answer.data)
        if size > _BLOB_BYTES:
            call.cancel()
            raise Unavailable("A file of the model is larger than 128 MiB.")
    return b"".join(parts)
