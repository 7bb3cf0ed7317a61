"""One call over the simulated network, from both ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from llmos import rpc
from llmos.errors import LlmosError
from tests.sim.vloop import NOWHERE, Node

if TYPE_CHECKING:
    from tests.sim.network import Network

Methods = dict[str, Any]
"""Handlers by path."""
_WINDOW = 64
"""Messages of one direction that may be under way before a writer waits: HTTP/2's flow control."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailing: tuple[tuple[str, str], ...] = ()


class Broken(grpc.aio.AioRpcError):
    """A call that did not end well."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Pipe:
    """One direction of a call: ordered, with a delay of its own for each message."""

    def __init__(self, network: Network, path: str) -> None:
        self._network = network
        self._path = path
        self.source = self.target = ""
        self._last = 0.0
        self._held: deque[Any] = deque()
        """Arrived where the wire is cut; goes on once it is whole again."""
        self.stalled = False
        self.damage_next = False
        self.under_way = 0
        self.inbox: deque[Any] = deque()
        self.ended = False
        """The reader gets nothing after what is in the inbox."""
        self.dead = False
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def push(self, message: Any) -> None:
        """Put a message, or the end, on the wire."""
        if self.dead:
            return
        network = self._network
        self.under_way += 1
        self._last = max(self._last, network.loop.now + network.delay_s(self.source, self.target))
        network.loop.call_at(self._last, self._arrive, message, context=NOWHERE)

    async def room(self) -> None:
        """Wait until the window is open."""
        while self.under_way >= _WINDOW and not self.dead:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def release(self) -> None:
        """The wire is whole: what waited arrives."""
        while self._held and not self.stopped:
            self._deliver(self._held.popleft())

    @property
    def stopped(self) -> bool:
        """Nothing passes at present."""
        return self.stalled or self._network.is_blocked(self.source, self.target)

    def kill(self) -> None:
        """Nothing arrives any more; the reader finds the end."""
        self.dead = self.ended = True
        self._held.clear()
        self.inbox.clear()
        self._wake()
        self._give_room()

    async def next(self) -> Any:
        """The next message; `END` once there is none."""
        while not self.inbox:
            if self.ended:
                return END
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self.under_way -= 1
        self._give_room()
        return self.inbox.popleft()

    def _arrive(self, message: Any) -> None:
        if self.dead:
            return
        if self._held or self.stopped:
            self._held.append(message)
        else:
            self._deliver(message)

    def _deliver(self, message: Any) -> None:
        if callable(message):
            self.under_way -= 1
            message()
            return
        self._network.trace.note(f"{self.source}>{self.target}{self._path}", message)
        if self.damage_next:
            self.damage_next = False
            message = DAMAGED
        self.inbox.append(message)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


END = object()


class Call:
    """Both ends of one call."""

    def __init__(self, network: Network, client: Node, address: str, path: str) -> None:
        self.network = network
        self.client = client
        self.address, self.path = address, path
        self.server_name = network.name_at(address)
        self.server: Node | None = None
        self.number = 0
        self.task: asyncio.Task[Any] | None = None
        self.up, self.down = Pipe(network, path), Pipe(network, path)
        self.up.source = self.down.target = client.name
        self.up.target = self.down.source = self.server_name
        self.status: Status | None = None
        """As the client knows it."""
        self.over = asyncio.Event()

    def connect(self) -> None:
        """The handshake needs both directions; then the call's beginning travels like a message."""
        self.down.push(lambda: self.up.push(lambda: self.network.accept(self)))

    def release(self, source: str, target: str) -> None:
        """A direction is open again."""
        for pipe in (self.up, self.down):
            if (pipe.source, pipe.target) == (source, target):
                pipe.release()

    def stall(self) -> None:
        """Nothing passes on this call any more."""
        self.up.stalled = self.down.stalled = True

    def unstall(self) -> None:
        """It does again."""
        self.up.stalled = self.down.stalled = False
        self.up.release()
        self.down.release()

    def answer(self, status: Status) -> None:
        """The server has ended the call: the status follows its last message."""
        self.down.push(lambda: self._ended(status))

    def cancel(self) -> None:
        """The client gives up; the server hears of it."""
        if self.status is None:
            self._set(Status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))
            self.down.kill()
            self.up.push(self.lose_server)

    def break_off(self, reason: str) -> None:
        """The connection breaks: both ends notice, what was under way is lost."""
        self.lose_client(reason)
        self.lose_server()

    def orphan(self, dead: Node) -> None:
        """One end was killed. The other one notices when the reset reaches it."""
        if dead is self.client:
            self.down.kill()
            self.up.push(self.lose_server)
        else:
            self.up.kill()
            self.down.push(lambda: self.lose_client("connection reset by peer"))

    def lose_client(self, reason: str) -> None:
        """The client's end breaks."""
        if self.status is None and not self.client.dead:
            self._set(Status(_UNAVAILABLE, reason))
        self.down.kill()

    def lose_server(self) -> None:
        """The server's end breaks: its handler is cancelled, as grpc.aio does."""
        self.up.kill()
        if self.task is not None and self.server is not None and not self.server.dead:
            self.task.cancel()
        if self.status is not None:
            self.network.forget(self)

    def _ended(self, status: Status) -> None:
        if self.status is None:
            self._set(status)
        self.down.ended = True
        self.down._wake()
        self.network.forget(self)

    def _set(self, status: Status) -> None:
        self.status = status
        self.over.set()


class ClientCall:
    """What the services use of grpc.aio's calls."""

    def __init__(self, call: Call, serialize: Any, deserialize: Any) -> None:
        self._call = call
        self._serialize, self._deserialize = serialize, deserialize
        self._timer: asyncio.TimerHandle | None = None

    def done(self) -> bool:
        """Whether its status is known."""
        return self._call.status is not None

    def cancel(self) -> bool:
        """Give up."""
        if self.done():
            return False
        self._call.cancel()
        return True

    def say_all(self, request: Any) -> None:
        """The only message."""
        self._call.up.push(self._serialize(request))
        self._call.up.push(self._close_up)

    async def write(self, request: Any) -> None:
        """See grpc.aio: waits for room; a cancelled write cancels the call."""
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        try:
            await self._call.up.room()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.done():
            self._raise_for_status()
        self._call.up.push(self._serialize(request))

    async def read(self) -> Any:
        """See grpc.aio: EOF at a good end, raises at a bad one; a cancelled read cancels the call."""
        try:
            data = await self._call.down.next()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is not END:
            return None if data is DAMAGED else self._deserialize(data)
        if not self.done():
            await self._call.over.wait()
        self._raise_for_status()
        return grpc.aio.EOF

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._answers()

    async def _answers(self) -> AsyncIterator[Any]:
        while (answer := await self.read()) is not grpc.aio.EOF:
            yield answer

    async def code(self) -> grpc.StatusCode:
        """Waits for the end."""
        return (await self._ended()).code

    async def details(self) -> str:
        """Waits for the end."""
        return (await self._ended()).details

    async def initial_metadata(self) -> grpc.aio.Metadata:
        """Always empty."""
        return grpc.aio.Metadata()

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        """Waits for the end."""
        return grpc.aio.Metadata(*(await self._ended()).trailing)

    def expire_in(self, timeout_s: float) -> None:
        """gRPC's own deadline."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout_s, self._expire)

    def _expire(self) -> None:
        call = self._call
        if call.status is None:
            call._set(Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
            call.down.kill()
            call.up.push(call.lose_server)

    async def _ended(self) -> Status:
        await self._call.over.wait()
        assert self._call.status is not None
        return self._call.status

    def _raise_for_status(self) -> None:
        status = self._call.status
        assert status is not None
        if self._timer is not None:
            self._timer.cancel()
        if status.code is grpc.StatusCode.CANCELLED and status.details.startswith("Locally"):
            raise asyncio.CancelledError
        if status.code is not grpc.StatusCode.OK:
            raise Broken(status.code, status.details, status.trailing)

    def _close_up(self) -> None:
        self._call.up.ended = True
        self._call.up._wake()


DAMAGED = b"\xff damaged"
"""A message that cannot be parsed; grpc.aio hands None to the client then."""


class ServerContext:
    """What servicers use of grpc.aio's context."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.status = Status()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        self.status = Status(code, details, tuple(trailing))
        raise grpc.aio.AbortError(details)


async def serve(call: Call, handler: Any) -> None:
    """Run a handler the way `llmos.rpc` wraps it."""
    context = ServerContext(call)
    try:
        if handler.request_streaming or handler.response_streaming:
            await _serve_stream(call, handler, context)
        else:
            request = handler.request_deserializer(await call.up.next())
            answer = await rpc._unary(handler.unary_unary)(request, context)
            call.down.push(handler.response_serializer(answer))
    except (grpc.aio.AbortError, LlmosError):
        call.answer(context.status)
    except asyncio.CancelledError:
        call.network.forget(call)
        raise
    else:
        call.answer(Status())
    finally:
        call.up.kill()


async def _serve_stream(call: Call, handler: Any, context: ServerContext) -> None:
    behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
    said: Any = _requests(call, handler)
    if not handler.request_streaming:
        said = handler.request_deserializer(await call.up.next())
    async for response in rpc._streaming(behaviour)(said, context):
        await call.down.room()
        call.down.push(handler.response_serializer(response))


async def _requests(call: Call, handler: Any) -> AsyncIterator[Any]:
    while (data := await call.up.next()) is not END:
        yield handler.request_deserializer(data)
