"""Streams of gateways under one leader: read what they say into events, write what the core has for them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable

from llmos.errors import SlowReader
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.loop import Loop
from scheduler.outflow import LIMIT_BYTES, Outflow

log = logging.getLogger(__name__)

_LEAVE_S = 1.0
UNHEARD_S = 10.0
"""A gateway acknowledges within a second. One that has not for so long does not read what it is sent: it is frozen, or
a damaged length has made it wait for bytes that never come, which its answers to probes would not show."""
_STOOD_STILL_S = 1.0
"""A longer pause between two looks is this process's own, and says nothing about gateways."""


class GatewayStream:
    """One open stream. A write that is stuck cannot be ended from here: keep-alive ends it, or the peer reads on."""

    def __init__(self, stream_id: int, node: fleet_pb2.Node, outflow: Outflow) -> None:
        self.id = stream_id
        self.node = node
        self.outflow = outflow
        self._catalogue: requests_pb2.Catalogue | None = None
        self._farewell: requests_pb2.ExchangeResponse | None = None
        self._error: Exception | None = None
        self._idle = False
        self._wake = asyncio.Event()
        self.over = False
        """Nothing more is sent, and nothing of what still arrives is heeded."""
        self._heard = 0
        self._heard_at = self._looked_at = 0.0

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def set_catalogue(self, catalogue: requests_pb2.Catalogue) -> None:
        """Send the catalogue before the next frame; only the newest one."""
        self._catalogue = catalogue
        self.wake()

    def end(self, farewell: requests_pb2.ExchangeResponse | None = None) -> None:
        """Say farewell, then close."""
        if not self.over:
            self.over = True
            self._farewell = farewell
            self.outflow = Outflow()
            self.wake()

    def fail(self, error: Exception) -> None:
        """Close with an error; what was collected is dropped."""
        self._error = error
        self.end()

    def unheard(self, now: float) -> bool:
        """Whether frames have been on their way for `UNHEARD_S` and none has arrived. Look often."""
        acknowledged = self.outflow.acknowledged
        stood_still = now - self._looked_at > _STOOD_STILL_S
        self._looked_at = now
        if stood_still or acknowledged != self._heard or not self.outflow.unacknowledged:
            self._heard, self._heard_at = acknowledged, now
        return now - self._heard_at >= UNHEARD_S

    @property
    def choking(self) -> bool:
        """More waits than may, and it is the peer who holds it up."""
        return self.outflow.overflowing and not (self._idle and self.outflow.open)

    async def next(self) -> requests_pb2.ExchangeResponse | None:
        """Wait for the next message; None at the end."""
        while True:
            if self._error is not None:
                raise self._error
            if self.over:
                farewell, self._farewell = self._farewell, None
                return farewell
            if self._catalogue is not None:
                catalogue, self._catalogue = self._catalogue, None
                return requests_pb2.ExchangeResponse(catalogue=catalogue)
            frame = self.outflow.take()
            if frame is not None:
                return requests_pb2.ExchangeResponse(frame=frame)
            self._idle = True
            self._wake.clear()
            await self._wake.wait()
            self._idle = False


class GatewayDesk:
    """All gateways' streams of one leader. Owned by the reign; the loop's carrier writes to it."""

    def __init__(
        self,
        welcome: Callable[[], requests_pb2.Welcome],
        keep_spans: Callable[[Iterable[fleet_pb2.Span]], None],
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """`welcome` names the present term: a leader that was elected again greets with the later one."""
        self._limit_bytes = limit_bytes
        self._welcome = welcome
        self._keep_spans = keep_spans
        self._streams: dict[int, GatewayStream] = {}
        self._touched: dict[GatewayStream, None] = {}
        """In order, unlike a set: the same run is the same again."""
        self._ids = itertools.count(1)
        self._empty = asyncio.Event()
        self.overflows = 0
        """Streams given up because their gateway did not take its output."""

    def output(self, stream_id: int, output: request_pb2.Output) -> None:
        """Collect a piece for the next frame."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.outflow.add(output)
            self._touched[stream] = None

    def failure(self, stream_id: int, failure: request_pb2.Failure) -> None:
        """Collect a failure for the next frame."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.outflow.add_failure(failure)
            self._touched[stream] = None

    def class_change(self, stream_id: int, change: requests_pb2.ClassChange) -> None:
        """Collect a change of class for the next frame."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.outflow.add_class_change(change)
            self._touched[stream] = None

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

    def flush(self) -> list[int]:
        """Send what was collected. Returns the streams that were given up because too much of it waits."""
        choked: list[int] = []
        for stream in self._touched:
            if stream.choking:
                log.warning("gateway %s does not take its output; closing its stream", stream.node.id)
                self.overflows += 1
                del self._streams[stream.id]
                stream.fail(SlowReader("The gateway did not take its output."))
                choked.append(stream.id)
            else:
                stream.wake()
        self._touched.clear()
        return choked

    def drop_unheard(self, now: float) -> list[int]:
        """Give up streams on which nothing arrives; the gateway opens a new one. Returns them."""
        found = [stream for stream in self._streams.values() if stream.unheard(now)]
        for stream in found:
            log.warning("gateway %s acknowledges nothing; closing its stream", stream.node.id)
            self._touched.pop(stream, None)
            del self._streams[stream.id]
            stream.fail(SlowReader("The gateway acknowledged nothing."))
        return [stream.id for stream in found]

    async def serve(
        self,
        hello: requests_pb2.GatewayHello,
        requests: AsyncIterator[requests_pb2.ExchangeRequest],
        loop: Loop,
    ) -> AsyncGenerator[requests_pb2.ExchangeResponse, None]:
        """One stream's whole life, after its hello."""
        stream = GatewayStream(next(self._ids), hello.node, Outflow(limit_bytes=self._limit_bytes))
        self._streams[stream.id] = stream
        self._empty.clear()
        reader = asyncio.create_task(self._read(stream, requests, loop), name=f"gateway-{hello.node.id}")
        try:
            await loop.post(events.GatewayConnected(stream.id, hello.node))
            log.info("gateway %s connected", hello.node.id)
            yield requests_pb2.ExchangeResponse(welcome=self._welcome())
            while (message := await stream.next()) is not None:
                yield message
        finally:
            self._streams.pop(stream.id, None)
            self._touched.pop(stream, None)
            stream.end()
            loop.post_now(events.GatewayLost(stream.id))
            log.info("gateway %s disconnected", hello.node.id)
            if not self._streams:
                self._empty.set()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def leave(self, not_leader: requests_pb2.NotLeader) -> None:
        """Tell every gateway that another scheduler leads, and close."""
        for stream in self._streams.values():
            stream.end(requests_pb2.ExchangeResponse(not_leader=not_leader))
        if self._streams:
            with contextlib.suppress(TimeoutError):  # a stuck stream finds out when it gets on
                async with asyncio.timeout(_LEAVE_S):
                    await self._empty.wait()

    async def _read(
        self, stream: GatewayStream, requests: AsyncIterator[requests_pb2.ExchangeRequest], loop: Loop
    ) -> None:
        try:
            async for request in requests:
                if stream.over:
                    return
                await self._said(stream, request, loop)
        except Exception as error:
            if not stream.over:  # `next` raises it: a damaged message, or a bug, must not look like an orderly end
                log.warning("the stream of gateway %s ends: %r", stream.node.id, error)
                stream.fail(error)
        finally:
            stream.end()

    async def _said(self, stream: GatewayStream, request: requests_pb2.ExchangeRequest, loop: Loop) -> None:
        match request.WhichOneof("message"):
            case "ack":
                stream.outflow.acknowledge(request.ack.sequence)
                stream.wake()
            case "submit":
                said = request.submit
                await loop.post(events.Submitted(stream.id, said.request, said.sealed, said.origin_id, said.claim))
            case "cancel":
                cancel = request.cancel
                await loop.post(events.Cancelled(stream.id, cancel.request_id, cancel.reason, cancel.claim))
            case "finish":
                finish = request.finish
                await loop.post(events.ChoiceFinished(stream.id, finish.request_id, finish.choice, finish.keep_until))
            case "spans":
                self._keep_spans(request.spans.spans)
