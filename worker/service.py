"""The Work service: one scheduler's stream at a time, and files by their hash. I/O only; `core` decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc

from llmos.errors import DeadlineExceeded, LlmosError
from llmos.internal.v1 import work_pb2, work_pb2_grpc
from worker.core import WorkerCore
from worker.models import HeldModel, chunks, find_blob

HEARTBEAT_S = 0.5
_HELLO_S = 10.0


class SchedulerStream:
    """One open stream. Implements `worker.core.Stream`."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._over = False

    @property
    def term(self) -> int:
        """See `Stream`."""
        return self._term

    def wake(self) -> None:
        """See `Stream`."""
        self._wake.set()

    def replace(self, error: LlmosError) -> None:
        """See `Stream`."""
        self.end(error)

    def end(self, error: Exception | None) -> None:
        """The stream is over: because the scheduler closed it, or with an error; the first one counts."""
        self._error = self._error or error
        self._over = True
        self._wake.set()

    async def turn(self) -> bool:
        """Wait for something to send, or the next heartbeat. False at the end; raises the error that ended it."""
        # Both may come at once: at a heartbeat, too, an ended stream must not take a frame that another one counts.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await self._wake.wait()
        self._wake.clear()
        if self._error is not None:
            raise self._error
        return not self._over


class WorkService(work_pb2_grpc.WorkServicer):
    """Implements `llmos.internal.v1.Work`."""

    def __init__(self, core: WorkerCore, models: Sequence[HeldModel]) -> None:
        self._core = core
        self._models = models

    async def Attach(  # noqa: N802 - the contract's name
        self,
        request_iterator: AsyncIterator[work_pb2.AttachRequest],
        context: grpc.aio.ServicerContext[work_pb2.AttachRequest, work_pb2.AttachResponse],
    ) -> AsyncIterator[work_pb2.AttachResponse]:
        """Frames until the scheduler goes, or a newer stream takes over."""
        first = await _first(request_iterator)
        if first is None:
            return
        stream = SchedulerStream(first.term)
        report = self._core.attach(first, stream)
        reader = asyncio.create_task(self._read(request_iterator, stream), name="work-commands")
        try:
            yield work_pb2.AttachResponse(report=report)
            while await stream.turn():
                yield work_pb2.AttachResponse(frame=self._core.next_frame())
        finally:
            self._core.detach(stream)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def FetchBlob(  # noqa: N802 - the contract's name
        self,
        request: work_pb2.WorkFetchBlobRequest,
        context: grpc.aio.ServicerContext[work_pb2.WorkFetchBlobRequest, work_pb2.WorkFetchBlobResponse],
    ) -> AsyncIterator[work_pb2.WorkFetchBlobResponse]:
        """A file of a model in chunks of at most 1 MiB. Raises NotFound."""
        pieces = chunks(find_blob(self._models, request.sha256))
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield work_pb2.WorkFetchBlobResponse(data=piece)

    async def _read(self, requests: AsyncIterator[work_pb2.AttachRequest], stream: SchedulerStream) -> None:
        try:
            async for request in requests:
                self._core.receive(request, stream)
        except Exception as error:
            # `turn` raises it: a refusal, or a bug, which must not look like an orderly end.
            stream.end(error)
        finally:
            stream.end(None)


async def _first(requests: AsyncIterator[work_pb2.AttachRequest]) -> work_pb2.AttachRequest | None:
    """The stream's first message; None if it ends before."""
    try:
        async with asyncio.timeout(_HELLO_S):
            return await anext(requests, None)
    except TimeoutError as error:
        raise DeadlineExceeded("The stream did not begin with hello in time.") from error
