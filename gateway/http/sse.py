"""Writing server-sent events with back-pressure, keep-alive comments and a deadline for a client that does not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from starlette.types import Send

from gateway.config import HttpLimits
from gateway.http.protocol import Wire
from llmos.errors import SlowReader

Headers = list[tuple[bytes, bytes]]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n"
"""A comment line without the blank line that ends an event: OpenAI's client takes that for an event with empty data."""

_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: object, event_id: str = "") -> bytes:
    """One event; `event_id` is what a client that reconnects sends as `Last-Event-ID`."""
    data = b"data: " + msgspec.json.encode(value) + b"\n\n"
    return b"id: " + event_id.encode() + b"\n" + data if event_id else data


class SseWriter:
    """One response. `cut` drops the connection at once, unsent bytes included."""

    def __init__(self, send: Send, limits: HttpLimits, cut: Callable[[], None], wire: Wire | None = None) -> None:
        self._send = send
        self._wire = wire
        self._time = asyncio.get_running_loop().time
        self._limits = limits
        self._cut = cut
        self._writing = False
        self._wrote_at = 0.0
        self._keeper: asyncio.Task[None] | None = None
        self.started = False
        """Whether the status line is out, so that an error can only be an event."""
        self.is_cut = False
        """Whether the connection was dropped because its client did not read."""

    async def start(self, headers: Headers) -> None:
        """Send the head and begin to keep the stream alive."""
        self.started = True
        await self._deliver({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
        await self._deliver({"type": "http.response.body", "body": b"", "more_body": True})
        self._keeper = asyncio.create_task(self._keep_alive(), name="sse-keep-alive")

    @property
    def direct(self) -> bool:
        """Whether `write_now` may be called: the client takes what is sent, and nobody waits to send."""
        return self._wire is not None and not self._writing and self._wire.open

    def write_now(self, data: bytes) -> None:
        """Send without waiting. Only while it is `direct`."""
        assert self._wire is not None
        self._wire.write(data)
        self._wrote_at = self._time()

    async def write(self, data: bytes) -> None:
        """Send, waiting for the client to take what was sent before. Raises SlowReader."""
        await self._deliver({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, last: bytes) -> None:
        """Send the last bytes and end the response."""
        await self._deliver({"type": "http.response.body", "body": last, "more_body": False})

    async def close(self) -> None:
        """Stop keeping the stream alive; idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def _deliver(self, message: dict[str, object]) -> None:
        self._writing = True
        try:
            async with asyncio.timeout(self._limits.write_timeout_s):
                await self._send(message)
        except TimeoutError:
            self.is_cut = True
            self._cut()
            raise SlowReader("The stream was not read in time.") from None
        finally:
            self._writing = False
            self._wrote_at = self._time()

    async def _keep_alive(self) -> None:
        while True:
            silent_s = self._time() - self._wrote_at
            await asyncio.sleep(max(self._limits.keep_alive_s - silent_s, self._limits.keep_alive_s / 10))
            if not self._writing and self._time() - self._wrote_at >= self._limits.keep_alive_s:
                await self.write(KEEP_ALIVE)
