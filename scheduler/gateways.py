"""Streams of gateways under one leader: read what they say into events, write what the core has for them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable

from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.loop import Loop
from scheduler.outflow import Outflow

log = logging.getLogger(__name__)

_LEAVE_S = 1.0


class GatewayStream:
    """One open stream. Its task is the handler's own: only cancelling that ends a write which is stuck."""

    def __init__(self, stream_id: int, node: fleet_pb2.Node, task: asyncio.Task[object] | None) -> None:
        self.id = stream_id
        self.node = node
        self.outflow = Outflow()
        self.task = task
        self._catalogue: requests_pb2.Catalogue | None = None
        self._farewell: requests_pb2.ExchangeResponse | None = None
        self._over = False
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def set_catalogue(self, catalogue: requests_pb2.Catalogue) -> None:
        """Send the catalogue before the next frame; only the newest one."""
        self._catalogue = catalogue
        self.wake()

    def end(self, farewell: requests_pb2.ExchangeResponse | None = None) -> None:
        """Say farewell, then close."""
        self._over = True
        self._farewell = farewell
        self.wake()

    def abandon(self) -> None:
        """Close a stream whose peer takes nothing any more."""
        if self.task is not None:
            self.task.cancel()

    async def next(self) -> requests_pb2.ExchangeResponse | None:
        """Wait for the next message; None at the end."""
        while True:
            if self._over:
                farewell, self._farewell = self._farewell, None
                return farewell
            if self._catalogue is not None:
                catalogue, self._catalogue = self._catalogue, None
                return requests_pb2.ExchangeResponse(catalogue=catalogue)
            frame = self.outflow.take()
            if frame is not None:
                return requests_pb2.ExchangeResponse(frame=frame)
            self._wake.clear()
            await self._wake.wait()


class GatewayDesk:
    """All gateways' streams of one leader. Owned by the reign; the loop's carrier writes to it."""

    def __init__(self, welcome: requests_pb2.Welcome, keep_spans: Callable[[Iterable[fleet_pb2.Span]], None]) -> None:
        self._welcome = welcome
        self._keep_spans = keep_spans
        self._streams: dict[int, GatewayStream] = {}
        self._touched: set[GatewayStream] = set()
        self._ids = itertools.count(1)
        self.overflows = 0
        """Streams given up because their gateway did not take its output."""

    def output(self, stream_id: int, output: request_pb2.Output) -> None:
        """Collect a piece for the next frame."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.outflow.add(output)
            self._touched.add(stream)

    def failure(self, stream_id: int, failure: request_pb2.Failure) -> None:
        """Collect a failure for the next frame."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.outflow.add_failure(failure)
            self._touched.add(stream)

    def catalogue(self, stream_id: int, catalogue: requests_pb2.Catalogue) -> None:
        """Replace a gateway's catalogue."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.set_catalogue(catalogue)

    def close(self, stream_id: int) -> None:
        """End a stream."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.end()

    def flush(self) -> None:
        """Send what was collected; give up streams that have too much of it."""
        for stream in self._touched:
            if stream.outflow.overflowing:
                log.warning("gateway %s does not take its output; closing its stream", stream.node.id)
                self.overflows += 1
                stream.abandon()
            else:
                stream.wake()
        self._touched.clear()

    async def serve(
        self,
        hello: requests_pb2.GatewayHello,
        requests: AsyncIterator[requests_pb2.ExchangeRequest],
        loop: Loop,
    ) -> AsyncIterator[requests_pb2.ExchangeResponse]:
        """One stream's whole life, after its hello."""
        stream = GatewayStream(next(self._ids), hello.node, asyncio.current_task())
        self._streams[stream.id] = stream
        reader = asyncio.create_task(self._read(stream, requests, loop), name=f"gateway-{hello.node.id}")
        try:
            await loop.post(events.GatewayConnected(stream.id, hello.node))
            log.info("gateway %s connected", hello.node.id)
            yield requests_pb2.ExchangeResponse(welcome=self._welcome)
            while (message := await stream.next()) is not None:
                yield message
        finally:
            del self._streams[stream.id]
            self._touched.discard(stream)
            loop.post_now(events.GatewayLost(stream.id))
            log.info("gateway %s disconnected", hello.node.id)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def leave(self, not_leader: requests_pb2.NotLeader) -> None:
        """Tell every gateway that another scheduler leads, and close; streams that are stuck are cut."""
        for stream in self._streams.values():
            stream.end(requests_pb2.ExchangeResponse(not_leader=not_leader))
        tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=_LEAVE_S)
            for task in stuck:
                task.cancel()

    async def _read(
        self, stream: GatewayStream, requests: AsyncIterator[requests_pb2.ExchangeRequest], loop: Loop
    ) -> None:
        try:
            async for request in requests:
                await self._said(stream, request, loop)
        finally:
            stream.end()

    async def _said(self, stream: GatewayStream, request: requests_pb2.ExchangeRequest, loop: Loop) -> None:
        match request.WhichOneof("message"):
            case "ack":
                stream.outflow.acknowledge(request.ack.sequence)
                stream.wake()
            case "submit":
                await loop.post(events.Submitted(stream.id, request.submit.request))
            case "cancel":
                await loop.post(events.Cancelled(stream.id, request.cancel.request_id, request.cancel.reason))
            case "finish":
                finish = request.finish
                await loop.post(events.ChoiceFinished(stream.id, finish.request_id, finish.choice, finish.keep_until))
            case "spans":
                self._keep_spans(request.spans.spans)
