"""A scripted Work server on port 0: real gRPC, made-up tokens, faults on command."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Self

from google.protobuf import json_format

from llmos.config import TlsConfig
from llmos.errors import NotFound, StaleTerm
from llmos.etcd import EtcdClient, Lease
from llmos.internal.v1 import registry_pb2, work_pb2, work_pb2_grpc
from llmos.rpc import RpcServer
from tests.fakes.contract import SimWorker, make_record

HEARTBEAT_S = 0.2


class FakeWorker(work_pb2_grpc.WorkServicer):
    """`async with FakeWorker("w1") as worker:` serves. Each step gives every running sequence one token."""

    def __init__(
        self,
        worker_id: str,
        *,
        blocks: int = 64,
        step_s: float = 0.002,
        loaded: bool = True,
        tls: TlsConfig | None = None,
    ) -> None:
        self.id = worker_id
        self.sim = SimWorker(worker_id, blocks, loaded=loaded)
        self.dispatches: list[work_pb2.Dispatch] = []
        self.commands: list[work_pb2.Command] = []
        self.terms: list[int] = []
        """Term of each stream that was accepted."""
        self.refused = 0
        """Streams and batches of too low a term."""
        self.acknowledged = 0
        self.files: dict[str, bytes] = {}
        self.spans: list[Any] = []
        """Sent with the next frame."""
        self._step_s = step_s
        self._going = asyncio.Event()
        self._going.set()
        self._stream = 0
        self._server = RpcServer("127.0.0.1", 0, tls=tls)
        self.lease: Lease | None = None

    async def __aenter__(self) -> Self:
        self._server.add(work_pb2_grpc.add_WorkServicer_to_server, self, "llmos.internal.v1.Work")
        await self._server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.kill()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.port}"

    def record(self) -> registry_pb2.WorkerRecord:
        record = make_record(self.id)
        record.address = self.address
        return record

    async def register(self, etcd: EtcdClient, ttl_s: float = 2.0) -> Lease:
        """Put the record under a lease, which is kept alive until it is closed."""
        self.lease = await etcd.lease(ttl_s)
        value = json_format.MessageToJson(self.record(), preserving_proto_field_name=True).encode()
        await etcd.put(f"/llmos/v1/workers/{self.id}", value, self.lease.id)
        return self.lease

    async def kill(self) -> None:
        """Every connection is reset; the record stays until its lease is over."""
        self._going.set()
        if self.lease is not None:
            await self.lease.close()
            self.lease = None
        await self._server.stop(0)

    def freeze(self) -> None:
        """Send nothing and obey nothing, with connections open."""
        self._going.clear()

    def thaw(self) -> None:
        """Go on as if nothing had happened."""
        self._going.set()

    def break_stream(self) -> None:
        """End the present stream; the worker computes on."""
        self._stream += 1

    async def Attach(  # noqa: N802
        self, request_iterator: AsyncIterator[work_pb2.AttachRequest], context: Any
    ) -> AsyncIterator[work_pb2.AttachResponse]:
        first = await anext(request_iterator)
        self._check(first.term)
        assert first.commands[0].WhichOneof("order") == "hello"
        self.terms.append(first.term)
        self._stream += 1
        mine = self._stream
        self.sim.sequence = 0
        reader = asyncio.create_task(self._read(request_iterator, mine))
        try:
            yield work_pb2.AttachResponse(report=self.sim.report())
            async for frame in self._frames(mine):
                if reader.done():
                    break
                yield work_pb2.AttachResponse(frame=frame)
            if reader.done() and not reader.cancelled() and reader.exception() is not None:
                raise reader.exception()  # type: ignore[misc]
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def FetchBlob(  # noqa: N802
        self, request: work_pb2.WorkFetchBlobRequest, context: Any
    ) -> AsyncIterator[work_pb2.WorkFetchBlobResponse]:
        if request.sha256 not in self.files:
            raise NotFound("no such file")
        data = self.files[request.sha256]
        for start in range(0, len(data), 1000):
            yield work_pb2.WorkFetchBlobResponse(data=data[start : start + 1000])

    async def _frames(self, mine: int) -> AsyncIterator[work_pb2.WorkFrame]:
        quiet = 0.0
        while mine == self._stream:
            await asyncio.sleep(self._step_s)
            await self._going.wait()
            quiet += self._step_s
            if mine == self._stream and (self.sim.running or self.sim.failures or self.spans or quiet >= HEARTBEAT_S):
                quiet = 0.0
                frame = self.sim.step()
                frame.spans.extend(self.spans)
                self.spans.clear()
                yield frame

    async def _read(self, requests: AsyncIterator[work_pb2.AttachRequest], mine: int) -> None:
        async for request in requests:
            await self._going.wait()
            self._check(request.term)
            if mine != self._stream:
                return
            self.acknowledged = request.acknowledged
            for command in request.commands:
                self.commands.append(command)
                if command.WhichOneof("order") == "dispatch":
                    self.dispatches.append(command.dispatch)
                    self.sim.obey(command.dispatch)
                else:
                    self.sim.obey(command)

    def _check(self, term: int) -> None:
        if term < self.sim.highest_term:
            self.refused += 1
            raise StaleTerm(f"term {term} is below {self.sim.highest_term}")
        self.sim.highest_term = term


@contextlib.asynccontextmanager
async def worker_in(etcd: EtcdClient, worker_id: str, **options: Any) -> AsyncIterator[FakeWorker]:
    """A worker that serves and is registered."""
    async with FakeWorker(worker_id, **options) as worker:
        await worker.register(etcd)
        yield worker
