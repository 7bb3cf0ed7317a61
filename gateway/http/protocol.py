"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: heads, idle heads, connections, bodies nobody reads."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.config import HttpLimits
from gateway.http.errors import error_headers, error_json
from llmos.errors import InvalidRequest, LlmosError, PayloadTooLarge, Unavailable

_MAX_IGNORED_BYTES = 64 << 20
"""How much of a body is read and dropped after its request was refused, so that a client that still writes gets to read
why."""


class Wire:
    """A short way for the parts of one response's chunked body, past ASGI's messages and their coroutines."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @property
    def open(self) -> bool:
        """The body has begun, and the client takes what is written."""
        cycle = self._cycle
        return not (self._flow.write_paused or cycle.disconnected or cycle.response_complete) and bool(
            cycle.response_started and cycle.chunked_encoding
        )

    def write(self, part: bytes) -> None:
        """Write a part, which must not be empty. Only while it is `open`."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(part), part))


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `limits` and `new_id` belong to the class, because uvicorn makes the instances: `bounded`."""

    limits: ClassVar[HttpLimits]
    new_id: ClassVar[Callable[[], str]]
    retiring_s: ClassVar[float | None] = None
    """Set when the server goes: see `retire`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._boundaries = 0
        self._head_bytes = 0
        self._in_head = True
        self._ignored_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and start to wait for its first head."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(Unavailable("This gateway has as many connections as it can hold; try again."))
            return
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_overdue)
        if self.retiring_s is not None:
            self.retire(self.retiring_s)

    def retire(self, idle_s: float) -> None:
        """The server goes: close after the next response, which says so, or once nothing was asked for `idle_s`.

        A response that has begun has not said so. Its client may ask once more on this connection, and would meet a
        reset if that were closed with the response.
        """
        self.timeout_keep_alive = idle_s  # type: ignore[assignment]
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(idle_s, self.timeout_keep_alive_handler)
        elif not cycle.response_started:
            cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless the head has become too large."""
        if self.transport.is_closing():
            return
        boundaries = self._boundaries
        super().data_received(data)
        if self._boundaries > boundaries or not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.limits.max_header_bytes:
            limit = self.limits.max_header_bytes
            self._refuse(PayloadTooLarge(f"Request line and headers are larger than {limit} bytes."))

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._ignored_bytes = 0
        self.scope["state"]["cut"] = self._cut
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_overdue)

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self._in_head = False
        self._boundaries += 1
        self._stop_head_timer()
        super().on_headers_complete()
        if self.retiring_s is not None:
            self.cycle.keep_alive = False
        self.scope["state"]["wire"] = Wire(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body, or drop it if its request is answered already."""
        if self.cycle.response_complete:
            self._ignored_bytes += len(body)
            if self._ignored_bytes > _MAX_IGNORED_BYTES:
                self._cut()
                return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next byte begins a head."""
        self._boundaries += 1
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP."""
        self._refuse(InvalidRequest("This is not valid HTTP/1.1."))

    def _head_overdue(self) -> None:
        self._head_timer = None
        self._cut()

    def _cut(self) -> None:
        """Drop the connection with a reset, so that the kernel drops at once what the client did not take."""
        if not self.transport.is_closing():
            connection = self.transport.get_extra_info("socket")
            with suppress(OSError):  # gone by itself in the meantime
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: LlmosError) -> None:
        """Answer without an application behind, and close."""
        request_id = type(self).new_id()
        body = error_json(error, request_id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", request_id.encode()),
            *error_headers(error),
        ]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[error.http_status] + lines + b"\r\n" + body)
        self.transport.close()


def bounded(limits: HttpLimits, new_id: Callable[[], str]) -> type[BoundedProtocol]:
    """The protocol with these limits; `new_id` names what is refused before it is a request."""
    return type("LimitedProtocol", (BoundedProtocol,), {"limits": limits, "new_id": staticmethod(new_id)})
