"""Answering a generation over HTTP, streamed or whole, for as long as its client is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.config import HttpLimits
from gateway.http.attend import ClientGone, attended
from gateway.http.errors import Headers, error_object, visible
from gateway.http.event_encoder import EventEncoder
from gateway.http.shapes import Shape
from gateway.http.sse import DONE, SseWriter, event
from gateway.types import Delta, Done, Event, Generation, Started
from llmos.errors import InternalError, SlowReader

log = logging.getLogger(__name__)


class _Direct:
    """Writes events as they come. What cannot be written at once waits for its turn in the stream's buffer."""

    def __init__(self, encoder: EventEncoder, writer: SseWriter) -> None:
        self._encoder = encoder
        self._writer = writer

    def push(self, delta: Delta) -> bool:
        if not self._writer.direct:
            return False
        data = self._encoder.encode(delta)
        if data:
            self._writer.write_now(data)
        return True


class _Collected:
    """The deltas of an answer that is given as a whole."""

    def __init__(self) -> None:
        self.by_choice: dict[int, list[Delta]] = {}

    def push(self, delta: Delta) -> bool:
        self.by_choice.setdefault(delta.choice, []).append(delta)
        return True


class GenerationResponse:
    """An ASGI response. Once the client is gone, or does not read, the generation is cancelled."""

    def __init__(
        self, start: Callable[[], Coroutine[Any, Any, Generation]], shape: Shape, limits: HttpLimits, *, stream: bool
    ) -> None:
        """`start` begins the generation, once; `stream`: events instead of one answer."""
        self._start = start
        self._is_stream = stream
        self._shape = shape
        self._limits = limits
        self._encoder = EventEncoder(shape)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises LlmosError until the status line is out; after that errors are events of the stream."""
        generation = None
        try:
            generation = await attended(self._start(), receive)
            scope["state"]["request_id"] = generation.request_id
            deliver = self._stream(scope, generation, send) if self._is_stream else self._whole(generation, send)
            await attended(deliver, receive)
        except ClientGone:
            log.debug("the client of request %s is gone", scope["state"]["request_id"])
        finally:
            if generation is not None:
                await generation.aclose()

    async def _whole(self, generation: Generation, send: Send) -> None:
        collected = _Collected()
        generation.feed(collected)
        headers: Headers = []
        done = Done(0, 0)
        async for happened in _complete(generation.events()):
            if isinstance(happened, Started):
                self._shape.start(happened)
                headers = _start_headers(happened)
            elif isinstance(happened, Delta):
                collected.push(happened)
            else:
                done = happened
        body = msgspec.json.encode(self._shape.whole(collected.by_choice, done))
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, scope: Scope, generation: Generation, send: Send) -> None:
        writer = SseWriter(send, self._limits, scope["state"]["cut"], scope["state"]["wire"])
        try:
            await self._write_events(generation, writer)
        except Exception as error:
            if not writer.started:
                raise
            if writer.is_cut:
                log.info("request %s: its stream was not read", generation.request_id)
                return
            shown = visible(error)
            if isinstance(shown, InternalError):
                log.error("request %s broke in the middle of its stream", generation.request_id, exc_info=error)
            with suppress(SlowReader):  # then nobody reads the reason either, and the connection is cut
                await writer.finish(event(error_object(shown, generation.request_id)))
        finally:
            await writer.close()

    async def _write_events(self, generation: Generation, writer: SseWriter) -> None:
        events = _complete(generation.events())
        started = await anext(events)
        if not isinstance(started, Started):
            raise InternalError("output before the start")
        self._shape.start(started)
        headers = _start_headers(started)
        first = await self._await_first(events, writer, headers)
        if not writer.started:
            await writer.start(headers)
        if await self._write_event(first, writer):
            return
        generation.feed(_Direct(self._encoder, writer))
        async for happened in events:
            await self._write_event(happened, writer)

    async def _await_first(self, events: AsyncIterator[Event], writer: SseWriter, headers: Headers) -> Event:
        """The first output. Until it is there, or a client would grow impatient, the status line waits for it, so
        that a refusal by the fleet (overload, say) is still a status and no event."""
        first: asyncio.Future[Event] = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait({first}, timeout=self._limits.refusal_wait_s)
            if not first.done():
                await writer.start(headers)
            return await first
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    async def _write_event(self, happened: Event, writer: SseWriter) -> bool:
        """Send what a client should see of an event; whether it was the last."""
        if isinstance(happened, Done):
            usage = self._shape.usage_chunk(happened)
            await writer.finish((event(usage) if usage else b"") + DONE)
            return True
        if isinstance(happened, Delta):
            data = self._encoder.encode(happened)
            if data:
                await writer.write(data)
        return False


async def _complete(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """`events`, up to Done, which must come."""
    async for happened in events:
        yield happened
        if isinstance(happened, Done):
            return
    raise InternalError("the stream ended without an end")


def _start_headers(started: Started) -> Headers:
    return [
        (b"llmos-seed", b"%d" % started.seed),
        (b"llmos-model-version", started.model_version.encode("ascii", "replace")),
    ]
