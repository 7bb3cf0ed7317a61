"""A message that changes on the way ends its stream with a typed error, in either direction, over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from llmos.errors import DamagedMessage
from llmos.internal.v1 import work_pb2, work_pb2_grpc
from llmos.rpc import RpcServer, error_from_rpc, open_channel
from llmos.sealed import Opener, sealed, sealing

METHOD = "/llmos.internal.v1.Work/Attach"


class Worker(work_pb2_grpc.WorkServicer):
    """Answers each batch with a frame of the same number."""

    async def Attach(  # noqa: N802 - the contract's name
        self, request_iterator: AsyncIterator[work_pb2.AttachRequest], context: object
    ) -> AsyncIterator[work_pb2.AttachResponse]:
        async for request in request_iterator:
            yield work_pb2.AttachResponse(frame=work_pb2.WorkFrame(sequence=request.term))


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer("127.0.0.1", 0)
    server.add(work_pb2_grpc.add_WorkServicer_to_server, Worker(), "llmos.internal.v1.Work")
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel
    await server.stop(0)


def flipping(change: Callable[[bytes], bytes], at: int) -> Callable[[bytes], bytes]:
    """From its `at`-th call on, what passes is changed."""
    seen = 0

    def passed(data: bytes) -> bytes:
        nonlocal seen
        seen += 1
        return data if seen < at else change(data)

    return passed


def flip(data: bytes) -> bytes:
    """Another number in the message, which is as valid as before."""
    return data[:1] + bytes([data[1] ^ 1]) + data[2:]


async def test_what_is_whole_passes(channel: grpc.aio.Channel) -> None:
    call = work_pb2_grpc.WorkStub(sealed(channel)).Attach()
    for number in (1, 2, 3):
        await call.write(work_pb2.AttachRequest(term=number))
        assert (await call.read()).frame.sequence == number
    call.cancel()


async def test_a_server_refuses_a_changed_message(channel: grpc.aio.Channel) -> None:
    seal, spoil = sealing(work_pb2.AttachRequest.SerializeToString), flipping(flip, 2)
    call = channel.stream_stream(METHOD, lambda message: spoil(seal(message)), work_pb2.AttachResponse.FromString)()
    await call.write(work_pb2.AttachRequest(term=4))
    assert (await call.read()).frame.sequence == 4
    await call.write(work_pb2.AttachRequest(term=4))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(error_from_rpc(caught.value), DamagedMessage)


async def test_a_client_is_handed_nothing_of_a_changed_message(channel: grpc.aio.Channel) -> None:
    opener = Opener(work_pb2.AttachResponse.FromString)
    spoil = flipping(lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:], 2)
    call = channel.stream_stream(
        METHOD, sealing(work_pb2.AttachRequest.SerializeToString), lambda data: opener(spoil(data))
    )()
    for number, expected in ((4, True), (5, False)):
        await call.write(work_pb2.AttachRequest(term=number))
        assert (await call.read() is not None) is expected
    call.cancel()
