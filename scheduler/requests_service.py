"""The Requests service: gateways' streams and blobs. A scheduler that does not lead says who does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc

from llmos.errors import DeadlineExceeded, InvalidRequest, NotFound
from llmos.internal.v1 import requests_pb2, requests_pb2_grpc
from llmos.rpc import MAX_MESSAGE_BYTES
from scheduler.blobs import BlobCache, chunks
from scheduler.seat import ReignSeat

_HELLO_S = 10.0
_MOST_NAMES = 8


class RequestsService(requests_pb2_grpc.RequestsServicer):
    """Implements `llmos.internal.v1.Requests`."""

    def __init__(self, seat: ReignSeat, challenged: Callable[[], None]) -> None:
        """`challenged` is called when a gateway has seen a higher term than ours."""
        self._seat = seat
        self._challenged = challenged
        self._blobs = BlobCache()

    async def Exchange(  # noqa: N802 - the contract's name
        self,
        request_iterator: AsyncIterator[requests_pb2.ExchangeRequest],
        context: grpc.aio.ServicerContext[requests_pb2.ExchangeRequest, requests_pb2.ExchangeResponse],
    ) -> AsyncIterator[requests_pb2.ExchangeResponse]:
        """One gateway's stream."""
        hello = await _hello(request_iterator)
        reign = self._seat.reign
        if reign is not None and hello.highest_term > reign.term:
            self._challenged()
            reign = None
        if reign is None:
            not_leader = requests_pb2.NotLeader(leader_address=self._seat.leader_address)
            yield requests_pb2.ExchangeResponse(not_leader=not_leader)
            return
        async with contextlib.aclosing(reign.gateways.serve(hello, request_iterator, reign.loop)) as responses:
            async for response in responses:
                yield response

    async def FetchBlob(  # noqa: N802 - the contract's name
        self,
        request: requests_pb2.FetchBlobRequest,
        context: grpc.aio.ServicerContext[requests_pb2.FetchBlobRequest, requests_pb2.FetchBlobResponse],
    ) -> AsyncIterator[requests_pb2.FetchBlobResponse]:
        """A blob of the catalogue, in chunks. Raises NotLeader, NotFound, Unavailable."""
        for chunk in chunks(await self._blobs.read(self._seat.leading(), request.sha256)):
            yield requests_pb2.FetchBlobResponse(data=chunk)

    async def TakeUp(  # noqa: N802 - the contract's name
        self,
        request: requests_pb2.TakeUpRequest,
        context: grpc.aio.ServicerContext[requests_pb2.TakeUpRequest, requests_pb2.TakeUpResponse],
    ) -> requests_pb2.TakeUpResponse:
        """A stream that a client has come back to. Raises NotLeader, NotFound."""
        names = tuple(request.origin_ids[:_MOST_NAMES])
        entry = await self._seat.leading().inquiries.take_up(request.tenant, names)
        answer = requests_pb2.TakeUpResponse(entry=entry)
        if answer.ByteSize() > MAX_MESSAGE_BYTES:
            raise NotFound("The stream has become too long to be taken up.")
        return answer

    async def Leads(  # noqa: N802 - the contract's name
        self,
        request: requests_pb2.LeadsRequest,
        context: grpc.aio.ServicerContext[requests_pb2.LeadsRequest, requests_pb2.LeadsResponse],
    ) -> requests_pb2.LeadsResponse:
        """Whether this scheduler leads."""
        reign = self._seat.reign
        return requests_pb2.LeadsResponse(term=0 if reign is None else reign.term)


async def _hello(requests: AsyncIterator[requests_pb2.ExchangeRequest]) -> requests_pb2.GatewayHello:
    """The stream's first message."""
    try:
        async with asyncio.timeout(_HELLO_S):
            first = await anext(requests, None)
    except TimeoutError as error:
        raise DeadlineExceeded("The stream did not begin with hello in time.") from error
    if first is None or first.WhichOneof("message") != "hello" or not first.hello.node.id:
        raise InvalidRequest("The stream must begin with hello, and the node needs an id.")
    return first.hello
