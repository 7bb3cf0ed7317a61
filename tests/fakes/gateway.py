"""A scripted gateway: a real Requests stream that checks every index, follows the leader, and submits anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc

from llmos.config import TlsConfig
from llmos.internal.v1 import request_pb2, requests_pb2, requests_pb2_grpc
from llmos.rpc import open_channel
from llmos.v1 import fleet_pb2
from tests.fakes.contract import Client, SimGateway

_HELLO_S = 2.0
_RETRY_S = 0.05


class FakeGateway:
    """`async with FakeGateway("g1", addresses) as gateway:` keeps a stream to whichever scheduler leads."""

    def __init__(self, gateway_id: str, schedulers: Sequence[str], *, tls: TlsConfig | None = None) -> None:
        self.sim = SimGateway(gateway_id)
        self.schedulers = list(schedulers)
        self.term = 0
        self.connects = 0
        self.not_leader: list[str] = []
        """Leader addresses that other schedulers named."""
        self.acknowledging = True
        self._tls = tls
        self._reading = asyncio.Event()
        self._reading.set()
        self._changed = asyncio.Condition()
        self._call: Any = None
        self._writing = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._errors: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if exc_info[0] is None:
            self.check()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The leader's channel."""
        assert self._channel is not None
        return self._channel

    def check(self) -> None:
        """Raise what the stream's checks found."""
        if self._errors:
            raise self._errors[0]

    def pause(self) -> None:
        """Read nothing more for now."""
        self._reading.clear()

    def resume(self) -> None:
        """Read on."""
        self._reading.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait for something that a message from the scheduler makes true."""
        async with asyncio.timeout(timeout_s), self._changed:
            while not condition():
                self.check()
                await self._changed.wait()
        self.check()

    async def ready(self, timeout_s: float = 20.0) -> None:
        """Connected to a leader that has a model."""
        await self.until(lambda: self.sim.catalogue is not None and bool(self.sim.catalogue.models), timeout_s)

    async def submit(self, request: request_pb2.Request) -> Client:
        """Hand over a request; if no leader listens now, later."""
        client = Client(request, [[] for _ in range(request.choices)], [False] * request.choices)
        self.sim.clients[request.request_id] = client
        await self._say(requests_pb2.ExchangeRequest(submit=requests_pb2.Submit(request=request)))
        return client

    async def cancel(self, request_id: str, reason: str = "client_gone") -> None:
        """Stop a request."""
        self.sim.clients[request_id].cancelled = True
        cancel = requests_pb2.Cancel(request_id=request_id, reason=reason)
        await self._say(requests_pb2.ExchangeRequest(cancel=cancel))

    async def send_spans(self, spans: Sequence[fleet_pb2.Span]) -> None:
        """Ship finished spans."""
        await self._say(requests_pb2.ExchangeRequest(spans=requests_pb2.Spans(spans=spans)))

    async def ended(self, *clients: Client, timeout_s: float = 20.0) -> None:
        """Wait until requests have ended, well or not."""
        await self.until(lambda: not any(client.open for client in clients), timeout_s)

    async def disconnect(self) -> None:
        """Break the stream; another one is opened at once."""
        if self._call is not None:
            self._call.cancel()

    async def _say(self, message: requests_pb2.ExchangeRequest) -> None:
        # A broken stream is noticed by its reader, which submits what is unfinished again.
        async with self._writing:
            if self._call is not None:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await self._call.write(message)

    async def _run(self) -> None:
        turn = 0
        hint = ""
        while True:
            address = hint or self.schedulers[turn % len(self.schedulers)]
            hint, turn = "", turn + 1
            channel = open_channel(address, self._tls)
            try:
                # A scheduler that is gone or silent is what this loop is for: it tries the next address.
                with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError):
                    hint = await self._attend(channel)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
            except AssertionError as error:
                self._errors.append(error)
                async with self._changed:
                    self._changed.notify_all()
                return
            finally:
                self._call = self._channel = None
                await channel.close()
            await asyncio.sleep(_RETRY_S)

    async def _attend(self, channel: grpc.aio.Channel) -> str:
        """One stream; returns the address of the leader if another one leads."""
        stub: Any = requests_pb2_grpc.RequestsStub(channel)
        call = stub.Exchange()
        node = fleet_pb2.Node(id=self.sim.id, role=fleet_pb2.NODE_ROLE_GATEWAY, pid=1, host="here")
        hello = requests_pb2.GatewayHello(node=node, highest_term=self.term)
        async with asyncio.timeout(_HELLO_S):
            await call.write(requests_pb2.ExchangeRequest(hello=hello))
            answer = await call.read()
        if answer is grpc.aio.EOF or answer.WhichOneof("message") == "not_leader":
            leader = "" if answer is grpc.aio.EOF else answer.not_leader.leader_address
            self.not_leader.append(leader)
            return leader
        assert answer.welcome.term >= self.term
        self.term = answer.welcome.term
        self.connects += 1
        self._channel, self._call = channel, call
        for request in self.sim.unfinished():
            await self._say(requests_pb2.ExchangeRequest(submit=requests_pb2.Submit(request=request)))
        return await self._read(call)

    async def _read(self, call: Any) -> str:
        sequence = 0
        while (answer := await call.read()) is not grpc.aio.EOF:
            await self._reading.wait()
            kind = answer.WhichOneof("message")
            if kind == "not_leader":
                self.not_leader.append(answer.not_leader.leader_address)
                return str(answer.not_leader.leader_address)
            if kind == "catalogue":
                self.sim.catalogue = answer.catalogue
            else:
                sequence += 1
                assert answer.frame.sequence == sequence
                for message in (*answer.frame.class_changes, *answer.frame.outputs, *answer.frame.failures):
                    self.sim.take(message)
                if self.acknowledging:
                    await self._say(requests_pb2.ExchangeRequest(ack=requests_pb2.Ack(sequence=sequence)))
            async with self._changed:
                self._changed.notify_all()
        return ""
